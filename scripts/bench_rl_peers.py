"""What `scripts/bench_rl.py` runs in a fresh process of its own: steps of GRPO by ours, by MiniMind's loop
and by trl's GRPOTrainer. A job is a JSON file and so is its result:

    python scripts/bench_rl_peers.py JOB.json RESULT.json

Everybody starts from the same weights, answers the same token ids in the same order, samples from the whole
distribution at temperature 1 and is paid for the same thing: the different characters of an answer. That
costs nothing, and it tells answers of random weights apart: where all rewards of a group are equal, ours has
no gradient to compute and would win by not working.
"""

import copy
import json
import os
import runpy
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench_contenders
from scripts.bench_stages_peers import peak_bytes, peer_tokenizer

PAD, EOS = 0, 2
BETA = 0.1  # MiniMind's default: its loop has a reference whatever it is


def different_characters(text: str) -> float:
    return float(len(set(text)))


# --------------------------------------------------------------------------------------------------
# The same prompts and weights for everybody
# --------------------------------------------------------------------------------------------------


def job_prepare(job: dict) -> dict:
    """Write the weights that everybody starts from, and the prompts (token ids) of every step in the order in
    which our stage comes to them."""
    import torch

    bench_contenders.add_our_root()
    from dataset.prompts import load_prompts
    from dataset.rows import DataError
    from trainer import checkpoint
    from trainer.batches import Order

    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        train, _ = load_prompts(job["data_path"], checkpoint.load_tokenizer(), job["max_seq_len"])
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    order, size = Order(len(train), job["seed"]), job["prompts_per_step"]
    rows = [order.rows(range(step * size, (step + 1) * size)) for step in range(job["steps"])]
    prompts = [[train.ids(row) for row in of_step] for of_step in rows]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    torch.manual_seed(job["seed"])
    # Not the stages' own start, whose zeros would make most products trivial.
    model = bench_contenders.our_model(job["shape"] | {"residual_init": "normal"})
    if job["weights"]:
        bench_contenders.load_weights(model, read_weights(job["weights"]))
    path = folder / f"{checkpoint.stem('base', model.config)}.pth"
    checkpoint.save_weights(model, path, {"stage": "full_sft"})
    return dict(
        prompts=str(folder / "prompts.json"),
        weights=str(path),
        rows=len(train),
        prompt_tokens=sum(len(ids) for step in prompts for ids in step) / (size * job["steps"]),
    )


def read_weights(path) -> dict:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def read_prompts(job) -> list:
    return json.loads(Path(job["prompts"]).read_text(encoding="utf-8"))


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def cpu_share(began, job) -> float:
    """CPU seconds since `began` per wall second and thread: what others left to this process."""
    wall, cpu = (now - then for now, then in zip(clocks(), began))
    return cpu / (wall * job["threads"])


# --------------------------------------------------------------------------------------------------
# Ours
# --------------------------------------------------------------------------------------------------


def job_ours(job: dict) -> dict:
    """The stage as a user starts it, but for the reward, which no user would want."""
    bench_contenders.add_our_root()
    from trainer import rewards, rl  # noqa: F401 (rl: its imports belong to the process)

    rewards.COMPONENTS["characters"] = lambda answer: different_characters(answer.text)
    before, began = peak_bytes(), clocks()
    script = str(ROOT / "trainer" / "train_grpo.py")
    sys.argv = [script, *job["flags"], "--reward", "characters"]
    runpy.run_path(script, run_name="__main__")
    return steps_of_log(Path(job["log"])) | dict(rss_before_bytes=before, cpu_share=cpu_share(began, job))


def steps_of_log(path: Path) -> dict:
    """From the stage's log: what every step took, how many groups taught nothing, and whether it moved."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "rollout_s" in line]
    steps, earlier = [], 0.0
    for line in lines:
        seconds, earlier = line["time_s"] - earlier, line["time_s"]
        steps.append(figures(seconds, line["rollout_s"], round(line["sampled_tokens"])))
    return dict(
        steps=steps,
        cuda_peak_bytes=1e9 * (lines[-1].get("memory_gb") or 0),  # of tensors, when there is a GPU
        silent_share=sum(line.get("degenerate", 0) for line in lines) / len(lines),
        moved=min(line.get("grad_norm") or 0.0 for line in lines),
    )


def figures(seconds: float, rollout: float, sampled_tokens: int) -> dict:
    """A step: all that is no rollout (sampling and rewards) counts as update."""
    return dict(seconds=seconds, rollout_s=rollout, update_s=seconds - rollout, sampled_tokens=sampled_tokens)


# --------------------------------------------------------------------------------------------------
# MiniMind's loop
# --------------------------------------------------------------------------------------------------


def job_minimind(job: dict) -> dict:
    """MiniMind's way to make a step of GRPO, written anew around the model of a checkout (`minimind`) or,
    without one, around transformers' model with attention written out as MiniMind has it (`minimind_shape`).

    Every sample reads its own copy of the prompt, padded on the left; sampled tokens are scored three times
    over padded rows: by the sampler, and with the logits of all positions by the policy and a frozen
    reference. In MiniMind's favour: no top-k or top-p, whose sorting costs time, and no reward model.
    """
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    from_checkout = job["contender"] == "minimind"
    modules = bench_contenders.minimind_modules(job["minimind"]) if from_checkout else None
    tokenizer = peer_tokenizer()
    before = peak_bytes()
    model = minimind_model(job, modules).to(job["device"]).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"])
    generate = generate_of_checkout if from_checkout else generate_by_growing
    start = first_weights(model)
    steps, began = [], clocks()
    for prompts in read_prompts(job):
        begin = time.perf_counter()
        rollout = minimind_rollout(model, generate, prompts, tokenizer, job)
        wait(job)
        rollout_seconds = time.perf_counter() - begin
        minimind_update(model, reference, optimizer, rollout, job)
        wait(job)
        tokens = int(rollout["mask"].sum())
        steps.append(figures(time.perf_counter() - begin, rollout_seconds, tokens))
    share = cpu_share(began, job)
    return dict(
        steps=steps, rss_before_bytes=before, moved=moved(model, start), cpu_share=share, **cuda_peak(job)
    )


def minimind_model(job, modules=None):
    """The policy with the weights of the job."""
    shape, weights = job["shape"], read_weights(job["weights"])
    if modules is None:
        model = bench_contenders.transformers_model(shape, "qwen3" if shape["qk_norm"] else "llama")
        model.set_attn_implementation("eager")
    else:
        model = bench_contenders.minimind_model(modules, shape)
        if not shape["qk_norm"]:  # MiniMind always normalises heads
            own = model.state_dict()
            weights |= {name: own[name] for name in own if "q_norm" in name or "k_norm" in name}
    bench_contenders.load_weights(model, weights)
    return model


def left_padded(prompts: list[list[int]], copies: int, device="cpu"):
    """(ids, mask), int64 (prompts x copies, longest): a, a, b, b, padding in front."""
    import torch

    longest = max(map(len, prompts))
    ids = [[PAD] * (longest - len(p)) + p for p in prompts for _ in range(copies)]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(copies)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def generate_of_checkout(model, ids, mask, max_new_tokens):
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def generate_by_growing(model, ids, mask, max_new_tokens):
    """The same loop: a cache that is concatenated at every token, rows that go on until all have ended."""
    import torch

    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    cache, new = None, ids
    for _ in range(max_new_tokens):
        out = model(new, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        new = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1)
        new = torch.where(finished[:, None], EOS, new)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        finished |= new[:, 0] == EOS
        if finished.all():
            break
    return ids


def minimind_rollout(model, generate, prompts, tokenizer, job) -> dict:
    """Answers, what they are worth, and the sampler's log-probabilities: output (B, P + T) token ids; seen,
    its attention mask; mask (B, T), the tokens of an answer up to its end token; old (B, T); rewards (B,)."""
    import torch

    ids, given = left_padded(prompts, job["num_generations"], job["device"])
    with torch.no_grad(), autocast(job):
        output = generate(model, ids, given, job["max_gen_len"]).clone()
        answers = output[:, ids.shape[1] :]
        seen = torch.cat([given, torch.ones_like(answers)], 1)
        n = answers.shape[1]
        logits = model(output, attention_mask=seen, logits_to_keep=n + 1).logits[:, :-1]
        rows = [row.log_softmax(-1).gather(1, to[:, None])[:, 0] for row, to in zip(logits, answers)]
    ended_before = ((answers == EOS).cumsum(1) - (answers == EOS).long()) > 0
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor([different_characters(text) for text in texts], device=job["device"])
    return dict(output=output, seen=seen, mask=~ended_before, old=torch.stack(rows), rewards=rewards)


def answer_logprobs(model, output, seen, n: int):
    """Log-probabilities (B, n) of the last n tokens, by way of those of all words at all positions."""
    logps = model(output, attention_mask=seen).logits[:, :-1].log_softmax(-1)
    return logps.gather(2, output[:, 1:, None])[:, -n:, 0]


def minimind_update(model, reference, optimizer, rollout, job):
    """One step of AdamW on all answers at once: clipped ratio, k3 to the reference, mean over answers."""
    import torch

    mask, n = rollout["mask"], rollout["mask"].shape[1]
    with autocast(job):
        logps = answer_logprobs(model, rollout["output"], rollout["seen"], n)
    with torch.no_grad():
        of_reference = answer_logprobs(reference, rollout["output"], rollout["seen"], n)
    groups = rollout["rewards"].view(-1, job["num_generations"])
    spread = groups.std(1, keepdim=True, correction=0) + 1e-4
    advantages = ((groups - groups.mean(1, keepdim=True)) / spread).view(-1, 1)
    d = of_reference - logps
    ratio = (logps - rollout["old"]).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    losses = BETA * (d.exp() - d - 1) - gain
    loss = ((losses * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def autocast(job):
    import torch

    return torch.autocast(job["device"], torch.bfloat16) if job["dtype"] == "bfloat16" else nullcontext()


def wait(job):
    import torch

    if job["device"] == "cuda":
        torch.cuda.synchronize()


def cuda_peak(job) -> dict:
    import torch

    return dict(cuda_peak_bytes=torch.cuda.max_memory_allocated() if job["device"] == "cuda" else None)


def first_weights(model):
    """A copy of some weights that every step should move."""
    return model.model.embed_tokens.weight.detach().clone()


def moved(model, start) -> float:
    return float((model.model.embed_tokens.weight.detach() - start).abs().max())


# --------------------------------------------------------------------------------------------------
# trl
# --------------------------------------------------------------------------------------------------


def job_trl(job: dict) -> dict:
    """trl's GRPOTrainer without a reference (beta 0, its default), sampling with transformers."""
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    trainer, seen = trl_trainer(job)
    start = first_weights(trainer.model)
    began = clocks()
    seen["marks"].append(time.perf_counter())
    trainer.train()
    share = cpu_share(began, job)
    if seen["prompts"] != read_prompts(job):
        raise SystemExit("error: trl did not answer the prompts it was given, in their order")
    seconds = [b - a for a, b in zip(seen["marks"], seen["marks"][1:])]
    steps = [figures(*one) for one in zip(seconds, seen["rollouts"], seen["tokens"])]
    found = dict(steps=steps, rss_before_bytes=seen["rss"], moved=moved(trainer.model, start))
    return found | dict(cpu_share=share) | cuda_peak(job)


def trl_trainer(job):
    """The trainer, and what is seen of it: clock at the start and at the end of each step (marks), seconds of
    each rollout with its rewards, sampled tokens and prompts of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seen = dict(marks=[], rollouts=[], tokens=[], prompts=[], rss=peak_bytes())

    class Watched(GRPOTrainer):
        def _tokenize_prompts(self, prompts):
            """They are token ids already, as text: a column of lists would be taken for messages."""
            ids = [json.loads(prompt) for prompt in prompts]
            seen["prompts"].append(ids[:: job["num_generations"]])
            return ids, None, {}

        def _generate_single_turn(self, *more, **named):
            ids, logprobs = super()._generate_single_turn(*more, **named)
            seen["tokens"].append(sum(map(len, ids)))
            return ids, logprobs

        def _generate_and_score_completions(self, inputs):
            wait(job)
            begin = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            wait(job)
            seen["rollouts"].append(time.perf_counter() - begin)
            return found

    class StepEnd(TrainerCallback):
        def on_step_end(self, *_, **__):
            wait(job)
            seen["marks"].append(time.perf_counter())

    def reward(completions, **_):
        return [different_characters(text) for text in completions]

    shape = job["shape"]
    model = bench_contenders.transformers_model(shape, "qwen3" if shape["qk_norm"] else "llama")
    bench_contenders.load_weights(model, read_weights(job["weights"]))
    rows = [{"prompt": json.dumps(ids)} for step in read_prompts(job) for ids in step]
    trainer = Watched(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**trl_settings(job)),
        train_dataset=Dataset.from_list(rows),
        processing_class=peer_tokenizer(),
        callbacks=[StepEnd()],
    )
    return trainer, seen


def trl_settings(job) -> dict:
    """What is not here is as it ships."""
    answers = job["prompts_per_step"] * job["num_generations"]
    return dict(
        output_dir=job["folder"],
        max_steps=job["steps"],
        per_device_train_batch_size=answers // job["micro_batches"],
        gradient_accumulation_steps=job["micro_batches"],
        steps_per_generation=job["micro_batches"],
        num_generations=job["num_generations"],
        max_completion_length=job["max_gen_len"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=False,  # faster, as everybody else
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=job["device"] == "cpu",
        dataloader_pin_memory=False,
        seed=job["seed"],
    )


# --------------------------------------------------------------------------------------------------

bench_contenders.JOBS.update(
    rl_prepare=job_prepare, rl_ours=job_ours, rl_minimind=job_minimind, rl_trl=job_trl
)

if __name__ == "__main__":
    bench_contenders.main()
