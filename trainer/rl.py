"""What the stages of reinforcement learning share around their algorithms: data, rewards, reference, held-out
success, and the order of things in a step. The algorithm itself stands in the stage.

    course = Course("grpo", args, rt, path)         # data, tokenizer, model, engine, rewards
    def update(step, prompts, lr_factor):           # one rollout, and what is learned from it
        samples = course.answer(prompts.rows, prompts.places, step)
        rewards, parts, right = course.rewards_of(samples)
        ...
        updates = course.updates(trajectories, step, lr_factor, loss)
        return course.figures(step, updates, trajectories, rewards, parts, right, advantages)
    course.fit(update)
"""

from __future__ import annotations

import contextlib
import functools
import random
import time

import torch

from trainer import batches, checkpoint, loop, progress, rl_metrics, rollout, runtime
from trainer.rewards import HackingGauge, RewardError, Rewards, verified
from trainer.served import RolloutError


class Course:
    """One run of a stage: what it reads, who answers, what an answer is worth, and who watches.

    play(engine, prompts, rows, places, step, args, tokenizer, num_answers, greedy) -> samples: `play_once`,
    or `converse` with tools.
    """

    def __init__(self, stage, args, rt, path, kind="rlaif", play=rollout.play_once):
        self.args, self.rt = args, rt
        self.play = lambda *inputs, **more: self.together(lambda: play(*inputs, **more))
        self.tokenizer = checkpoint.load_tokenizer()
        self.train, self.val = load(path, self.tokenizer, args, kind)
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
        if self.reference is not None and str(args.use_compile) == "1":
            # as the policy is: compiled bfloat16 code rounds in other places
            self.reference.train().requires_grad_(True).compile_blocks(True)
        self.engine = rollout.make_engine(args, self.model, rt, self.tokenizer)
        self.gauge = HackingGauge()
        self.extra = dict(self.run.saved["extra"]) if self.run.saved else {}
        if "gauge" in self.extra:
            self.gauge.load_state_dict(self.extra["gauge"])
        self.files = rl_metrics.SampleFile(args, rt, self.run.saved["step"] if self.run.saved else 0)
        self.seconds, self.made = {}, 0  # steps, also those that are only timed

    # -- in a step

    @contextlib.contextmanager
    def timed(self, name: str):
        """Seconds of a part of the step, for the log."""
        begin = time.perf_counter()
        yield
        runtime.synchronize(self.rt)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def updates(self, trajectories, step, lr_factor, loss, silent=()) -> list[dict]:
        """The optimizer's steps of one rollout, and what each returns for the log. loss(model, batch, totals,
        step=trajectories) -> as loop.optimizer_step wants it; silent: samples that have no gradient."""
        args, rt, made = self.args, self.rt, []
        micro_loss = functools.partial(loss, head=self.head, step=trajectories, args=args)
        with self.timed("update_s"):
            for which in mini_batches(trajectories.samples, args, step, rt):
                batch = trajectories.micro_batches(which, args, self.tokenizer.pad_token_id, rt, silent)
                counts = rl_metrics.counts_of(batch)
                if not rl_metrics.anything(trajectories, which, args, rt):
                    counts["loss"] = 0  # nothing differs: momentum alone must not move the weights
                made.append(
                    loop.optimizer_step(
                        self.model, batch, self.optimizers, lr_factor, args, rt, micro_loss, counts
                    )
                )
        return made

    def answer(self, rows, places, step, num_answers=None) -> list[rollout.Sample]:
        """Answers of the policy as it is now."""
        self.send_weights(step)
        num_answers = num_answers or getattr(self.args, "num_generations", 1)
        return self.play(self.engine, self.train, rows, places, step, self.args, self.tokenizer, num_answers)

    def send_weights(self, version: int):
        """The engine samples from the weights as they are now."""
        self.together(lambda: rollout.send_weights(self.engine, self.model, self.tokenizer, version, self.rt))

    def rewards_of(self, samples, prompts=None):
        """(rewards, components, verified success or None) of samples."""
        prompts = prompts or self.train
        answers = [rollout.describe(s, prompts, self.args) for s in samples]
        rewards, parts = self.together(lambda: self.rate(answers))
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
        found |= rl_metrics.advantage_figures(torch.as_tensor(advantages), rt)
        found["length_p95"] = (rl_metrics.length_quantile(samples, rt), 1)
        weights = trajectories.ratio.double()
        found["ess"] = (rl_metrics.effective_share(weights, rt), 1)
        found["ratio_max"] = (rl_metrics.largest(weights, rt), 1)
        if trajectories.old is not None:
            gap = (trajectories.old - trajectories.sampler).abs()
            gap = gap[trajectories.old != 0]  # the others were not scored: they teach nothing
            found["mismatch_max"] = (rl_metrics.largest(gap, rt), 1)
        found |= {name: (seconds, 1) for name, seconds in self.seconds.items()}
        self.seconds = {}
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
        done = self.run.log.done if self.run.log else self.made
        self.send_weights(done)
        figures, greedy, sampled = rollout.held_out_success(
            self.engine, val, args, rt, self.tokenizer, self.play
        )
        rewards, _, _ = self.rewards_of(greedy, val)
        total, count = runtime.total([sum(rewards), len(rewards)], rt)
        figures["val_reward"] = total / max(count, 1)
        kl = self.held_out_kl(model, sampled)
        if kl is not None:
            figures["val_kl"] = kl
        success, length = figures.get("val_pass1"), figures["val_length"]
        warning = self.gauge.see(done, figures["val_reward"], success, kl or 0.0, length)
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

    def together(self, act):
        """The result of act(), which may ask a server, on every process; when it fails on one, all end."""
        failed = result = None
        try:
            result = act()
        except (RewardError, RolloutError) as error:
            failed = error
        if runtime.total(int(failed is not None), self.rt):
            raise failed or RolloutError("another process lost its server; its message says which")
        return result

    def saved_first(self, act):
        """When a server is gone, of rollouts or of rewards, no weight has moved since the last finished
        step: the state is saved as it is, then the error ends the run."""

        def guarded(*inputs):
            try:
                return act(*inputs)
            except (RewardError, RolloutError):
                if self.run.save is not None:
                    self.run.save()
                raise

        return guarded

    def fit(self, update, **extra):
        """All steps. extra: functions that give what else the resume file must hold."""

        def counted(*inputs):
            self.made += 1
            return update(*inputs)

        def cannot_undo():  # a critic, records of prompts and samples on disk would have to follow
            raise runtime.TrainingError(
                f"--max_minutes timed its first {self.made} steps and would have to take them back, because "
                "the prompts were used up: give more --epochs, or --max_steps"
            )

        extra["gauge"] = self.gauge.state_dict
        self.run.fit(
            self.model,
            self.optimizers,
            self.saved_first(counted),
            self.saved_first(self.check),
            before=True,
            undo=cannot_undo,
            **extra,
        )

    def end(self, next_command=None):
        flags = progress.same_model_flags(self.args, known=["preset", "hidden_size", "use_moe"])
        self.run.end(
            self.model, next_command or f"python eval_llm.py --weight {self.args.save_weight}{flags}"
        )


def load(path, tokenizer, args, kind):
    """(train, val) prompts: val is --val_path, or what the curriculum holds out beside `path`, or a share of
    the file by content hash, or None. They need no token cache."""
    from pathlib import Path

    from dataset.prompts import load_prompts

    first = Path(str(path).split(",")[0])
    known = {"rlaif.jsonl": "rlaif_heldout.jsonl", "agent_rl.jsonl": "agent_heldout.jsonl"}
    beside = first.with_name(known.get(first.name, "none"))
    val_path = args.val_path or (beside if beside.exists() and not args.val_fraction_given else None)
    fraction = 0.0 if val_path else args.val_fraction
    train, val = load_prompts(path, tokenizer, args.max_seq_len, kind=kind, val_fraction=fraction)
    if val_path:
        val, _ = load_prompts(val_path, tokenizer, args.max_seq_len, kind=kind)
    return train, val if val else None


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


def mini_batches(samples, args, step: int, rt) -> list[list[int]]:
    """This process's answers in each update of a step: --update_iters passes over the answers of all
    processes, each shuffled and cut into parts of --mini_batch_size. The parts are the same for any number
    of processes; a process may have nothing in one."""
    if not args.mini_batch_size:
        return [list(range(len(samples)))] * args.update_iters
    places = runtime.gather([sample.place for sample in samples], rt)
    order = sorted((place, rank, i) for rank, part in enumerate(places) for i, place in enumerate(part))
    found, size = [], args.mini_batch_size
    for number in range(args.update_iters):
        random.Random(runtime.mix_seed(args.seed, 13, step, number)).shuffle(order)
        parts = [order[start : start + size] for start in range(0, max(len(order), 1), size)]
        found += [[i for _, rank, i in part if rank == rt.rank] for part in parts]
    return found


def groups_that_differ(course, rows, places, step):
    """Groups of answers to the prompts `rows`, as a list of (samples, rewards, components, success), and the
    figures of all groups that were sampled for them.

    With --dynamic_sampling N (DAPO, section 3.2): only groups whose rewards differ, and up to N times as many
    other prompts until there are as many as asked for. Groups stay whole and where they were sampled.
    """
    args, rt, tries = course.args, course.rt, getattr(course.args, "dynamic_sampling", 0)
    wanted, size, sampled = runtime.total(len(rows), rt), args.num_generations, {}
    for attempt in range(1 + tries):
        if attempt:  # other prompts, the same for any number of processes
            draw = random.Random(runtime.mix_seed(args.seed, 11, step, attempt))
            others = [draw.randrange(len(course.train)) for _ in range(wanted)]
            mine = range(rt.rank, wanted, rt.world_size)
            rows, places = [others[i] for i in mine], [attempt * wanted + i for i in mine]
        samples = course.answer(rows, places, step)
        rewards, parts, right = course.rewards_of(samples)
        for i, place in enumerate(places):
            own = slice(i * size, (i + 1) * size)
            sampled[place] = (samples[own], rewards[own], {n: v[own] for n, v in parts.items()}, right[own])
        differing = [p for p, (_, r, _, _) in sampled.items() if max(r) - min(r) > 1e-6]
        good = sorted(place for part in runtime.gather(differing, rt) for place in part)[:wanted]
        if len(good) == wanted:
            break
    chosen = [sampled[p] for p in sampled if not tries or p in set(good)]
    figures = rl_metrics.group_figures(list(sampled.values()), course.train.verifiable)
    return chosen, figures | {"groups_kept": (len(chosen), len(sampled))}
