"""What `scripts/bench_stages.py` runs in a fresh process of its own: the data both sides train on, and the
trainers of peft and trl. A job is a JSON file and so is its result:

    python scripts/bench_stages_peers.py JOB.json RESULT.json

Nothing of a peer is changed that costs or saves time. It gets our token ids instead of text (so that both
sides train on the same tokens, in the same order), and it is told to write nothing.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench_contenders

KINDS = {"lora": "sft", "dpo": "dpo"}  # stage -> kind of row it reads
ALPHA = 16  # of both sides' adapters; the stage's default
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = {"lora": 1e-3, "dpo": 5e-6}  # the stages' defaults; nothing here depends on them


# --------------------------------------------------------------------------------------------------
# Data: the same examples for everybody
# --------------------------------------------------------------------------------------------------


def job_prepare(job: dict) -> dict:
    """Choose what is trained on, write it for both sides, and write the weights both start from.

    Ours reads a file of rows (`data`) and decides for itself which of them meet in a step. The peer reads
    token ids (`examples`) in the very order in which ours comes to them.
    """
    import torch

    bench_contenders.add_our_root()
    from dataset.rows import DataError
    from trainer import checkpoint

    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = checkpoint.load_tokenizer()
    try:
        found = prepare_data(job, folder, tokenizer)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    torch.manual_seed(job["seed"])
    # Not the stages' own start, whose zeros would make most products trivial.
    model = bench_contenders.our_model(job["shape"] | {"residual_init": "normal"})
    weights = folder / f"{checkpoint.stem('base', model.config)}.pth"
    checkpoint.save_weights(model, weights, {"stage": "full_sft"})
    return found | dict(weights=str(weights))


def prepare_data(job, folder, tokenizer) -> dict:
    from dataset.lm_dataset import load_sft
    from dataset.preferences import load_pairs
    from trainer.batches import Order

    stage, rows_per_step = job["stage"], job["batch_size"]
    path = folder / "data.jsonl"
    encoded = write_rows(job, path, tokenizer)
    load = load_sft if stage == "lora" else load_pairs
    train, _ = load(path, tokenizer, job["max_seq_len"])  # also builds the token cache that ours will open
    order = Order(len(train), job["seed"])
    steps = []
    for step in range(job["steps"]):
        chosen = order.rows(range(step * rows_per_step, (step + 1) * rows_per_step))
        ids = train.collate(chosen, rows_per_step)["input_ids"]
        steps.append([int((ids != train.pad_id).sum()), ids.numel()])
    documents_of = documents_of_row(train) if stage == "lora" else lambda row: [row]
    first = job["steps"] * rows_per_step
    in_steps = sum(len(documents_of(row)) for row in order.rows(range(first)))
    micro, accumulation = split_update(in_steps / job["steps"], job["peer_batch"])
    stream = (number for p in itertools.count() for number in documents_of(order.rows([p])[0]))
    examples = [encoded[n] for n in itertools.islice(stream, job["steps"] * micro * accumulation)]
    (folder / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
    return dict(
        data=str(path),
        examples=str(folder / "examples.json"),
        rows=len(encoded),
        rows_tokens=sum(map(real_tokens, encoded)),
        our_steps=steps,  # [real tokens, tokens with padding] of each
        micro_batch=micro,
        accumulation=accumulation,
    )


def write_rows(job, path, tokenizer) -> list[dict]:
    """Copy rows that fit into --max_seq_len, as many as the steps need (or there are), and return their token
    ids. What does not fit is left out: the two sides would cut it differently."""
    from dataset import rows

    kind, encoded, size = KINDS[job["stage"]], [], 0
    pairs_needed = job["steps"] * job["batch_size"]
    tokens_needed = pairs_needed * job["max_seq_len"]
    with path.open("w", encoding="utf-8") as copy:
        for first_row, block in rows.iter_blocks(job["data_path"]):
            for number, row in rows.iter_json(job["data_path"], first_row, block):
                if len(encoded) >= pairs_needed if kind == "dpo" else size >= tokens_needed:
                    return encoded
                try:
                    example = encode(rows.validate(row, kind), tokenizer)
                except rows.RowError as error:
                    raise rows.DataError(f"{job['data_path']}:{number}: {error}") from None
                if longest(example) <= job["max_seq_len"]:
                    copy.write(json.dumps(row, ensure_ascii=False) + "\n")
                    encoded.append(example)
                    size += real_tokens(example)
    if not encoded:
        raise rows.DataError(
            f"{job['data_path']}: no row fits into --max_seq_len {job['max_seq_len']}: raise it"
        )
    return encoded


def encode(row: dict, tokenizer) -> dict:
    """Token ids of a validated row, under the names that the peers' collators read."""
    from dataset.lm_dataset import IGNORE, TextEncoder, render_conversation

    if "conversations" in row:
        messages, tools = row["conversations"]
        ids, mask = render_conversation(tokenizer, messages, tools)
        return dict(input_ids=ids, labels=[i if answer else IGNORE for i, answer in zip(ids, mask)])
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return dict(zip(names, TextEncoder.of(tokenizer).encode_pair(row["chosen"], row["rejected"])))


def lengths(example: dict) -> list[int]:
    """Tokens of each sequence that an example makes: the prompt of a pair stands before both answers."""
    if "input_ids" in example:
        return [len(example["input_ids"])]
    return [len(example["prompt_ids"]) + len(example[side]) for side in ("chosen_ids", "rejected_ids")]


def longest(example) -> int:
    return max(lengths(example))


def real_tokens(example) -> int:
    return sum(lengths(example))


def documents_of_row(train):
    """A function: row of a PackedDataset -> numbers of the rows of the file that were packed into it."""
    offsets = train.caches[0].offsets

    def documents(row):
        pieces = slice(train.row_offsets[row], train.row_offsets[row + 1])
        return (offsets.searchsorted(train.starts[pieces], side="right") - 1).tolist()

    return documents


def split_update(examples: float, at_once: int) -> tuple[int, int]:
    """(examples at once, times) whose product is nearest to the examples of one of our updates, with at most
    `at_once` of them in memory."""
    times = max(1, -(-round(examples) // at_once))
    return max(1, round(examples / times)), times


# --------------------------------------------------------------------------------------------------
# Training the peers
# --------------------------------------------------------------------------------------------------


def job_peer(job: dict) -> dict:
    """Train a peer for some steps: [tokens so far, seconds] at the end of each, and what else it cost."""
    os.environ["TQDM_DISABLE"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    trainer, counts = (sft_trainer if job["stage"] == "lora" else dpo_trainer)(job)
    found = dict(isolates=isolates(trainer)) if job["packed"] else {}
    started = time.perf_counter()
    trainer.train()
    if not job["packed"]:  # trl packs and shuffles for itself
        check_tokens(counts.marks, job)
    return found | dict(
        marks=[[tokens, seconds - started] for tokens, seconds, _ in counts.marks],
        cpu_marks=[cpu for _, _, cpu in counts.marks],
        losses=counts.losses,
        padding=1 - counts.tokens / counts.slots,
        reference_seconds=counts.reference_seconds,
        rss_before_training_bytes=counts.rss_before_training,
        learning=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )


class Counts:
    """What is counted while a trainer works. losses: of each step, as it is optimized."""

    def __init__(self):
        self.tokens = self.slots = 0
        self.marks, self.losses = [], []  # (tokens, clock, CPU seconds) at the end of each step
        self.loss = 0.0
        self.reference_seconds = None
        self.rss_before_training = None

    def batch(self, inputs):
        """Padding is what the attention mask hides; packed rows have neither."""
        mask, slots = inputs.get("attention_mask"), inputs["input_ids"].numel()
        self.tokens += slots if mask is None else int(mask.sum())
        self.slots += slots

    def step(self):
        self.marks.append((self.tokens, time.perf_counter(), time.process_time()))
        self.losses.append(self.loss)
        self.loss = 0.0


def counted(trainer_class, counts: Counts):
    """The trainer, with somebody looking on."""

    class Counted(trainer_class):
        def training_step(self, model, inputs, *more, **named):
            counts.batch(inputs)
            loss = super().training_step(model, inputs, *more, **named)
            counts.loss += float(loss)
            return loss

    return Counted


def step_end(counts: Counts):
    """A callback of transformers that tells `counts` where steps end."""
    from transformers import TrainerCallback

    class StepEnd(TrainerCallback):
        def on_train_begin(self, *_, **__):
            counts.rss_before_training = peak_bytes()

        def on_step_end(self, *_, **__):
            counts.step()

    return StepEnd()


def peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settings(job: dict) -> dict:
    """Arguments of both trainers. What is not here is as they ship."""
    common = dict(
        output_dir=job["folder"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["accumulation"],
        max_length=job["max_seq_len"],
        learning_rate=RATES[job["stage"]],
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=job["seed"],
    )
    if not job["packed"]:
        common["train_sampling_strategy"] = "sequential"  # the order in `examples` is ours
    if not job["defaults"]:  # trl's own: bfloat16 and recomputed activations
        common |= dict(bf16=job["dtype"] == "bfloat16", gradient_checkpointing=False)
    return common


def peer_model(job: dict):
    """transformers' model of our shape, with the weights that ours starts from."""
    import torch

    model = bench_contenders.transformers_model(job["shape"], "qwen3" if job["shape"]["qk_norm"] else "llama")
    weights = torch.load(job["weights"], map_location="cpu", weights_only=True)
    bench_contenders.load_weights(model, weights)
    return model


def peer_data(job: dict):
    from datasets import Dataset

    examples = json.loads(Path(job["examples"]).read_text(encoding="utf-8"))
    return Dataset.from_list(examples)


def peer_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "model")


def sft_trainer(job: dict):
    """peft's LoRA in trl's SFTTrainer. With `packed` trl packs the examples into rows itself."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    counts = Counts()
    adapter = LoraConfig(
        r=job["lora_rank"], lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    if job["packed"]:
        data = dict(packing=True)
    else:  # the examples are what its preparation would make of text
        data = dict(dataset_kwargs={"skip_prepare_dataset": True})
    trainer = counted(SFTTrainer, counts)(
        model=peer_model(job),
        args=SFTConfig(**settings(job), **data),
        train_dataset=peer_data(job),
        processing_class=peer_tokenizer(),
        peft_config=adapter,
        callbacks=[step_end(counts)],
    )
    return trainer, counts


def dpo_trainer(job: dict):
    """trl's DPOTrainer, which would tokenize text itself: its preparation is left out, because the examples
    have the columns that it makes."""
    from trl import DPOConfig, DPOTrainer

    counts = Counts()

    class Prepared(counted(DPOTrainer, counts)):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *more):
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*more)
            counts.reference_seconds = time.perf_counter() - started
            return dataset

    args = DPOConfig(**settings(job), precompute_ref_log_probs=job["precomputed"])
    trainer = Prepared(
        model=peer_model(job),
        ref_model=None if job["precomputed"] else peer_model(job),
        args=args,
        train_dataset=peer_data(job),
        processing_class=peer_tokenizer(),
        callbacks=[step_end(counts)],
    )
    return trainer, counts


def check_tokens(marks, job):
    """Every example has been trained on once, and nothing else: the peer may not have cut or left out any."""
    examples = json.loads(Path(job["examples"]).read_text(encoding="utf-8"))
    size = job["micro_batch"] * job["accumulation"]
    given = [sum(map(real_tokens, examples[: size * (k + 1)])) for k in range(job["steps"])]
    seen = [tokens for tokens, _, _ in marks]
    if seen != given:
        raise SystemExit(f"error: the peer was given {given} tokens by step and trained on {seen}")


def isolates(trainer) -> bool:
    """Whether a document that was packed behind another is computed as if it stood alone."""
    import torch

    before, behind = [5, 6, 7, 8, 9, 10, 11], [40, 41, 42, 43, 44]

    def logits(*documents):
        ids = [i for document in documents for i in document]
        example = dict(input_ids=ids, labels=ids, seq_lengths=[len(document) for document in documents])
        batch = {k: v for k, v in trainer.data_collator([example]).items() if k != "labels"}
        with torch.no_grad():
            return trainer.model(**batch, use_cache=False).logits[0, -len(behind) :]

    return torch.allclose(logits(before, behind), logits(behind), atol=1e-4)


# --------------------------------------------------------------------------------------------------

bench_contenders.JOBS.update(prepare=job_prepare, peer=job_peer)

if __name__ == "__main__":
    bench_contenders.main()
