"""What the stages of reinforcement learning share around their algorithms: data, rewards, reference, held-out
success, and the order of things in a step. The algorithm itself stands in the stage.

    rl = Course("grpo", args, rt)                   # data, tokenizer, model, engine, rewards
    def update(step, prompts, lr_factor):           # one rollout, and what is learned from it
        with rl.sampling(step): samples = rl.answer(prompts.rows, prompts.places, step)
        ...
    rl.fit(update)
"""

from __future__ import annotations

import contextlib
import random
import time

import torch

from trainer import batches, checkpoint, loop, progress, rl_metrics, rollout, runtime
from trainer.rewards import HackingGauge, Rewards, verified


class Course:
    """One run of a stage: what it reads, who answers, what an answer is worth, and who watches.

    play(engine, prompts, rows, places, step, args, tokenizer, num_answers, greedy) -> samples: `play_once`,
    or `converse` with tools.
    """

    def __init__(self, stage, args, rt, path, kind="rlaif", play=rollout.play_once):
        from dataset.prompts import load_prompts

        self.stage, self.args, self.rt, self.play = stage, args, rt, play
        self.tokenizer = checkpoint.load_tokenizer()
        loader = lambda *inputs, **options: load_prompts(*inputs, kind=kind, **options)  # noqa: E731
        self.train, self.val = load(loader, path, self.tokenizer, args, rt)
        if self.val is not None:
            self.val = self.val.thinned(args.val_prompts)
        self.tax = batches.load_tax(path, self.tokenizer, args, rt)
        self.run = loop.Run(stage, args, rt, self.tokenizer, path, self.train, self.val)
        self.rate, self.reward_spec = make_rewards(args, self.train, self.tokenizer, rt)
        self.model = self.run.load(checkpoint.new_model(args, self.tokenizer, rt))
        self.head = self.model.lm_head.weight
        self.reference = load_reference(self.run, args, self.tokenizer, rt)
        if self.reference is not None:
            self.run.other_bytes += sum(4 * p.numel() for p in self.reference.parameters())
        self.model, self.optimizers = self.run.prepare(self.model, dynamic=True)
        self.engine = rollout.make_engine(args, self.model, rt, self.tokenizer)
        self.gauge = HackingGauge()
        self.extra = dict(self.run.saved["extra"]) if self.run.saved else {}
        if "gauge" in self.extra:
            self.gauge.load_state_dict(self.extra["gauge"])
        self.files = rl_metrics.SampleFile(args, rt, self.run.saved["step"] if self.run.saved else 0)
        self.latest_reward = self.extra.get("latest_reward", 0.0)
        self.seconds = {}

    # -- in a step

    @contextlib.contextmanager
    def timed(self, name: str):
        """Seconds of a part of the step, for the log."""
        begin = time.perf_counter()
        yield
        runtime.synchronize(self.rt)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def answer(self, rows, places, step, num_answers=None) -> list[rollout.Sample]:
        """Answers of the policy as it is now."""
        rollout.send_weights(self.engine, self.model, self.tokenizer, step, self.rt)
        num_answers = num_answers or getattr(self.args, "num_generations", 1)
        return self.play(self.engine, self.train, rows, places, step, self.args, self.tokenizer, num_answers)

    def rewards_of(self, samples, prompts=None):
        """(rewards, components, verified success or None) of samples."""
        prompts = prompts or self.train
        answers = [rollout.describe(s, prompts, self.args) for s in samples]
        rewards, parts = self.rate(answers)
        return rewards, parts, [verified(a) for a in answers]

    def old_logprobs(self, trajectories, silent=()):
        """log pi_old of every sampled token, by the code that trains; not of the samples `silent`."""
        return self.scores(self.model, trajectories, silent)

    def reference_logprobs(self, trajectories):
        """Of the model that the run began with; None when no loss wants them."""
        if self.reference is None:
            return None
        return self.scores(self.reference, trajectories)

    def scores(self, model, trajectories, silent=()):
        args, rt = self.args, self.rt
        head = runtime.bare(model).lm_head.weight
        everything = trajectories.micro_batches(
            range(len(trajectories)), args, self.tokenizer.pad_token_id, rt, silent
        )
        return rollout.score(
            runtime.bare(model), everything, len(trajectories.sampler), args, rt,
            head=head, temperature=args.temperature,
        )  # fmt: skip

    def figures(self, step, updates, trajectories, rewards, parts, right, advantages) -> dict:
        """The line of the log of a step, and now and then its samples on disk. rewards, right: one number per
        sample; advantages: likewise."""
        rt, samples = self.rt, trajectories.samples
        found = rl_metrics.merged(updates)
        found |= rl_metrics.answer_figures(samples, rewards, parts, right, rt)
        found |= rl_metrics.advantage_figures(torch.as_tensor(advantages))
        found["length_p95"] = (rl_metrics.length_quantile(samples, rt), 1)
        weights = torch.cat([torch.tensor(w) for w in runtime.gather(trajectories.ratio.tolist(), rt)])
        found["ess"] = (rl_metrics.effective_share(weights) if len(weights) else 1.0, 1)
        found["ratio_max"] = (float(weights.max()) if len(weights) else 1.0, 1)
        found |= {name: (seconds, 1) for name, seconds in self.seconds.items()}
        self.seconds = {}
        total, count = runtime.total([sum(rewards), len(rewards)], rt)
        self.latest_reward = total / max(count, 1)
        self.files.see(
            step, samples, self.train, rewards, parts, torch.as_tensor(advantages).flatten(), self.tokenizer
        )
        return found

    # -- between steps

    def check(self, model) -> dict:
        """Held-out success, reward and length, KL to the model that the run began with, alignment tax; and a
        warning when reward and success part."""
        args, rt, val = self.args, self.rt, self.val
        from trainer.validation import validate

        earlier = validate(model, self.tax, args, rt)
        found = {"tax_loss": earlier["val_loss"]} if earlier else {}
        if val is None:
            return found
        rollout.send_weights(self.engine, model, self.tokenizer, self.run.log.done if self.run.log else 0, rt)
        figures, greedy, sampled = rollout.held_out_success(
            self.engine, val, args, rt, self.tokenizer, self.play
        )
        rewards, _, _ = self.rewards_of(greedy, val)
        total, count = runtime.total([sum(rewards), len(rewards)], rt)
        figures["val_reward"] = total / max(count, 1)
        kl = self.held_out_kl(model, sampled)
        if kl is not None:
            figures["val_kl"] = kl
        success = figures.get("val_pass1")
        warning = self.gauge.see(
            self.run.log.done if self.run.log else 0,
            figures["val_reward"],
            success,
            kl or 0.0,
            figures["val_length"],
        )
        if warning:
            rt.print(f"warning: {warning}")
        return figures | found

    def held_out_kl(self, model, samples) -> float | None:
        """k3 of the policy to the model that the run began with, mean over the tokens of held-out answers;
        None when that model is gone."""
        args, rt = self.args, self.rt
        if not args.pass_k:
            return None  # a KL is an expectation over samples, and there are none
        parent = self.reference
        if parent is None:
            parent = checkpoint.load_parent(args, self.run.parent, self.tokenizer, rt)
        if runtime.total(int(parent is None), rt):
            return None
        trajectories = rollout.Trajectories(samples, rt.device)
        with runtime.uncompiled(args):
            now, then = (self.scores(m, trajectories) for m in (model, parent))
        d = (now - then).double()
        total, count = runtime.total([float(((-d).exp() - 1 + d).sum()), len(d)], rt)
        return total / max(count, 1)

    def fit(self, update, **extra):
        """All steps. extra: functions that give what else the resume file must hold."""
        state = {"gauge": self.gauge.state_dict, "latest_reward": lambda: self.latest_reward}
        self.run.fit(self.model, self.optimizers, update, self.check, before=True, **state, **extra)

    def end(self, weight=None):
        args = self.args
        flags = progress.same_model_flags(args, known=["preset", "hidden_size", "use_moe"])
        self.run.end(self.model, f"python eval_llm.py --weight {weight or args.save_weight}{flags}")


def load(loader, path, tokenizer, args, rt):
    """`batches.load` for prompts, which need no cache; beside the curriculum's file its held-out one is
    used."""
    from pathlib import Path

    first = Path(str(path).split(",")[0])
    known = {"rlaif.jsonl": "rlaif_heldout.jsonl", "agent_rl.jsonl": "agent_heldout.jsonl"}
    beside = first.with_name(known.get(first.name, "none"))
    val_path = args.val_path or (str(beside) if beside.exists() and not args.val_fraction_given else None)
    fraction = 0.0 if val_path else args.val_fraction
    train, val = loader(path, tokenizer, args.max_seq_len, val_fraction=fraction)
    if val_path:
        val, _ = loader(val_path, tokenizer, args.max_seq_len)
    if val is not None and not len(val):
        val = None
    return train, val


def load_reference(run, args, tokenizer, rt):
    """The frozen model that the KL is measured to, when --beta asks for one. Raises CheckpointError when
    there is none."""
    if not args.beta:
        return None
    reference = checkpoint.load_parent(args, run.parent, tokenizer, rt)
    if reference is None and args.from_weight == "none":
        raise checkpoint.CheckpointError(
            f"a KL (--beta or --kl_coef {args.beta:g}) is measured to the weights that the run began with: "
            "give some with --from_weight, or pass 0"
        )
    if reference is None:
        raise checkpoint.CheckpointError(
            f"the KL (--beta {args.beta:g}) is measured to the weights that the run began with, and "
            f"{args.from_weight} in {checkpoint.shown(args.save_dir)} is gone, or is another file now: "
            "restore it, or pass --beta 0"
        )
    return reference


def make_rewards(args, prompts, tokenizer, rt):
    """(rewards, their names and weights) of --reward, with the models they need."""
    from pathlib import Path

    from trainer import rewards as components
    from trainer.cli import model_config

    spec = args.reward
    if spec == "auto":
        spec = "correct:1,format:0.1" if prompts.verifiable else "model:1,repetition:0.5"
        spec += ",tags:0.5" if getattr(args, "reasoning", 0) else ""
        rt.print(f"reward:  {spec}")
    if args.overlong == "soft" and "overlong" not in spec:
        spec += ",overlong:1"
    names = [part.split(":")[0].strip() for part in spec.split(",")]
    model = judge = None
    if "model" in names:
        path = Path(args.reward_model_path or checkpoint.weight_path(args, model_config(args), "reward"))
        if path.is_dir():
            model = components.hf_reward_model(path, rt.device, bool(args.trust_remote_code))
        elif not path.exists():
            raise checkpoint.CheckpointError(
                f"{checkpoint.shown(path)} does not exist: the reward `model` needs it. Run "
                "trainer/train_reward.py first, give --reward_model_path, or a --reward that needs no model, "
                "such as correct:1"
            )
        else:
            model = components.own_reward_model(path, tokenizer, rt.device)
    if "judge" in names:
        judge = components.judge(args.judge_url, args.judge_model)
    try:
        return Rewards(spec, model=model, judge=judge), spec
    except ValueError as error:
        raise runtime.TrainingError(f"--reward {args.reward}: {error}") from None


# --------------------------------------------------------------------------------------------------
# Parts of a step
# --------------------------------------------------------------------------------------------------


def mini_batches(num_answers: int, args, step: int, rt) -> list[list[int]]:
    """This process's answers in each update of a step: --update_iters passes over them, each shuffled and cut
    into parts of --mini_batch_size answers over all processes. All processes make the same number."""
    share = -(-args.mini_batch_size // rt.world_size) if args.mini_batch_size else num_answers
    most = max(runtime.gather(num_answers, rt))
    size = max(share, 1)
    found = []
    for number in range(args.update_iters):
        order = list(range(num_answers))
        if args.mini_batch_size:
            random.Random(runtime.mix_seed(args.seed, 13, step, number)).shuffle(order)
        found += (
            [order[i : i + size] for i in range(0, max(most, 1), size)] if args.mini_batch_size else [order]
        )
    return found


def groups_that_differ(course, rows, places, step):
    """Groups of answers to the prompts `rows`, as a list of (samples, rewards, components, success), and how
    many groups were sampled for them, over all processes.

    With --dynamic_sampling N (DAPO, section 3.2): only groups whose rewards differ, and up to N times as many
    other prompts until there are as many as asked for. Groups stay whole and where they were sampled.
    """
    args, rt, tries = course.args, course.rt, getattr(course.args, "dynamic_sampling", 0) or 0
    wanted, kept, offered = runtime.total(len(rows), rt), {}, 0
    for attempt in range(1 + tries):
        if attempt:  # other prompts, the same for any number of processes
            draw = random.Random(runtime.mix_seed(args.seed, 11, step, attempt))
            others = [draw.randrange(len(course.train)) for _ in range(wanted)]
            mine = range(rt.rank, wanted, rt.world_size)
            rows, places = [others[i] for i in mine], [attempt * wanted + i for i in mine]
        samples = course.answer(rows, places, step)
        rewards, parts, right = course.rewards_of(samples)
        size = args.num_generations
        for i, place in enumerate(places):
            own = slice(i * size, (i + 1) * size)
            kept[place] = (samples[own], rewards[own], {n: v[own] for n, v in parts.items()}, right[own])
        offered += wanted
        if not tries:
            break
        differing = [p for p, (_, r, _, _) in kept.items() if max(r) - min(r) > 1e-6]
        good = sorted(place for part in runtime.gather(differing, rt) for place in part)
        if len(good) >= wanted or attempt == tries:
            chosen = set(good[:wanted])
            kept = {place: group for place, group in kept.items() if place in chosen}
            break
    return list(kept.values()), offered
