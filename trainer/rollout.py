"""Samples for reinforcement learning: who answers, what exactly was sampled, and how it becomes a batch.

The contract, which keeps the policy gradient honest: token ids in, token ids out. A sample carries the ids
that were drawn, the log-probability of the distribution each was drawn from, which ids the policy drew at
all (what a tool said between them is not its doing), why it ended, and the version of the weights. Nothing
is decoded and encoded again; what a sample is, it is by index, never by comparing ids with a pad or end
token.

    engine = make_engine(args, model, rt, tokenizer)
    samples = answer(engine, prompts, rows, places, step, args, tokenizer)     # G answers to each prompt
    samples = converse(engine, prompts, rows, places, step, args, tokenizer)   # with tools, in turns
    trajectories = Trajectories(samples)
    for batch in trajectories.micro_batches(range(len(samples)), args, pad_id, rt): ...

Draws are a function of (weights, seed, step, place of the prompt in the step, number of the sample): any
number of processes, and a resumed run, sample alike (but where rounding decides between two tokens).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from trainer import batches, runtime
from trainer.logprobs import answer_positions, hidden_states, next_of, token_logprobs_and_entropy


@dataclass
class Sample:
    """One answer to one prompt, or one whole conversation with tools."""

    row: int  # of the data set
    place: int  # of the prompt in the step; samples of a prompt are neighbours
    prompt: list[int]
    ids: list[int] = field(default_factory=list)  # all that follows the prompt
    sampled: list[bool] = field(default_factory=list)  # which of them the policy drew; its end tokens are
    logprobs: list[float] = field(default_factory=list)  # of those; 0 for the others
    finish_reason: str = ""  # "eos", "length", or "turns": it wanted another turn and had none
    version: int = 0  # of the weights that drew it
    thinking: bool = False
    turns: list[str] = field(default_factory=list)  # text of every turn that the policy wrote
    observations: list[str] = field(default_factory=list)  # what tools answered
    calls: int = 0
    valid_calls: int = 0
    failed_calls: int = 0

    @property
    def text(self) -> str:
        return self.turns[-1] if self.turns else ""

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    def extend(self, completion):
        """Append what the policy drew."""
        self.ids += completion.ids
        self.sampled += [True] * len(completion.ids)
        self.logprobs += completion.logprobs.tolist()


# --------------------------------------------------------------------------------------------------
# Engines
# --------------------------------------------------------------------------------------------------


class LocalEngine:
    """This process samples, with the weights that are being trained (model/generation.py)."""

    def __init__(self, model, dtype: str):
        from model.generation import Generator

        self.generator = Generator(model, dtype, max_rows=512)
        self.version = 0

    @classmethod
    def of(cls, generator):
        """Around a generator that exists."""
        engine = cls.__new__(cls)
        engine.generator, engine.version = generator, 0
        return engine

    def generate(self, prompts, seeds, num_return_sequences, max_new_tokens, temperature):
        """Completions a, a, b, b of prompts (lists of ids), one seed for each prompt."""
        return self.generator.generate(
            prompts,
            seed=seeds,
            num_return_sequences=num_return_sequences,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )

    def update(self, model, tokenizer, version: int):
        """Take the weights as they are now. (The generator looks for changes itself, but torch's fused
        optimizers change parameters without a trace.)"""
        self.generator.refresh()
        self.version = version


def make_engine(args, model, rt, tokenizer):
    """The engine that --rollout_engine asks for."""
    bare = runtime.bare(model)
    if args.rollout_engine != "torch":
        from pathlib import Path

        from trainer.served import ServedEngine

        folder = Path(args.rollout_shared_path or Path(args.save_dir) / "rollout_weights" / args.save_weight)
        engine = ServedEngine(args.rollout_engine, args.rollout_url, folder)
        if rt.is_main:
            engine.check()
        return engine
    dtype = args.rollout_dtype
    if dtype == "auto":
        dtype = str(rt.dtype).removeprefix("torch.")
    return LocalEngine(bare, dtype)


def send_weights(engine, model, tokenizer, version: int, rt):
    """Before a step: the engine samples from the weights as they are now."""
    if isinstance(engine, LocalEngine):
        engine.update(model, tokenizer, version)
        return
    if engine.version == version:
        return  # it has them
    if rt.is_main:
        engine.update(runtime.bare(model), tokenizer, version)
    engine.version = version


# --------------------------------------------------------------------------------------------------
# Answering
# --------------------------------------------------------------------------------------------------


def thinks(args, step: int, row: int) -> bool:
    """Whether a prompt opens a think block in this step: drawn for the prompt, so that its whole group shares
    it and an advantage never measures the coin."""
    return random.Random(runtime.mix_seed(args.seed, 7, step, row)).random() < args.thinking_ratio


def answer(engine, prompts, rows, places, step, args, tokenizer, num_answers=None) -> list[Sample]:
    """`num_answers` (default --num_generations) answers to each of the prompts `rows`: a, a, b, b. places: of
    these prompts in the step, over all processes."""
    if not rows:
        return []
    N = num_answers or args.num_generations
    thinking = [thinks(args, step, row) for row in rows]
    ids = [prompts.ids(row, think) for row, think in zip(rows, thinking)]
    seeds = [runtime.mix_seed(args.seed, step, place) for place in places]
    completions = engine.generate(ids, seeds, N, args.max_gen_len, args.temperature)
    samples = []
    for number, completion in enumerate(completions):
        i = number // N
        sample = Sample(rows[i], places[i], ids[i], thinking=thinking[i], version=engine.version)
        sample.extend(completion)
        sample.finish_reason = completion.finish_reason
        samples.append(sample)
    texts = tokenizer.batch_decode([s.ids for s in samples], skip_special_tokens=True)
    for sample, text in zip(samples, texts):
        sample.turns.append(text)
    return samples


def converse(engine, prompts, rows, places, step, args, tokenizer, num_answers=None, greedy=False):
    """Conversations with tools: the policy writes a turn, tools answer its calls, and so on until a turn
    calls nothing, for at most --max_turns turns and --max_total_len tokens. All conversations move on
    together.

    The ids of earlier turns stay exactly as they were sampled; behind them only the tools' answers are
    encoded. What the last `generate` was given is therefore what training sees.
    """
    from dataset.prompts import tool_reply
    from trainer.tools import execute, offered, parse_calls

    if not rows:
        return []
    N = num_answers or args.num_generations
    thinking = [thinks(args, step, row) for row in rows]
    samples = [
        Sample(row, place, prompts.ids(row, think), thinking=think, version=engine.version)
        for row, place, think in zip(rows, places, thinking)
        for _ in range(N)
    ]
    active = list(range(len(samples)))
    for turn in range(args.max_turns):
        fits = [i for i in active if room(samples[i], args) > 0]
        for i in set(active) - set(fits):
            samples[i].finish_reason = "length"
        active = fits
        if not active:
            break
        if turn == 0:  # one reading of a prompt serves its whole group
            first = [samples[i] for i in active if i % N == 0]
            seeds = [runtime.mix_seed(args.seed, step, s.place) for s in first]
            contexts, numbers = [s.prompt for s in first], N
        else:
            seeds = [runtime.mix_seed(args.seed, step, samples[i].place, i % N, turn) for i in active]
            contexts, numbers = [samples[i].prompt + samples[i].ids for i in active], 1
        temperature = 0.0 if greedy else args.temperature
        completions = engine.generate(contexts, seeds, numbers, args.max_gen_len, temperature)
        texts = tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        going_on = []
        for i, completion, text in zip(active, completions, texts):
            sample = samples[i]
            sample.extend(completion)
            sample.turns.append(text)
            sample.finish_reason = completion.finish_reason
            thought = not sample.thinking or "</think>" in text  # thoughts are not acted upon
            calls = parse_calls(text) if thought else []
            sample.calls += len(calls)
            allowed = offered(prompts[sample.row].tools)
            sample.valid_calls += sum(not call.error and call.name in allowed for call in calls)
            if completion.finish_reason != "eos" or not calls:
                continue
            if turn + 1 == args.max_turns:
                sample.finish_reason = "turns"
                continue
            found = [execute(call, allowed) for call in calls]
            sample.failed_calls += sum(not ok for _, ok in found)
            sample.observations += [observation for observation, _ in found]
            reply = tool_reply(tokenizer, [observation for observation, _ in found], sample.thinking)
            sample.ids += reply
            sample.sampled += [False] * len(reply)
            sample.logprobs += [0.0] * len(reply)
            going_on.append(i)
        active = going_on
    for sample in samples:
        cut_unanswered_end(sample)
    return samples


def room(sample: Sample, args) -> int:
    """Tokens that a next turn may take: a whole one must fit into --max_total_len."""
    taken = len(sample.prompt) + len(sample.ids) + args.max_gen_len
    return args.max_gen_len if taken <= args.max_total_len else 0


def cut_unanswered_end(sample: Sample):
    """Without room for another turn the tools' last answer is read by nobody: it need not be computed."""
    while sample.sampled and not sample.sampled[-1]:
        for values in (sample.ids, sample.sampled, sample.logprobs):
            values.pop()


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


class Trajectories:
    """The samples of this process in one step, their sampled tokens side by side.

    S samples with N sampled tokens in all, in order: sequence (N,) int64, the sample a token belongs to;
    length (S,) its sampled tokens; first (S,) and last (S,) their numbers; sampler (N,) float32,
    log-probabilities while sampling. Whatever else belongs to a token (an advantage, a value, a reference)
    is another (N,) vector.
    """

    def __init__(self, samples: list[Sample], device="cpu", without_cut=False):
        self.samples, self.device = samples, device
        # An answer that was cut off teaches nothing if it is left out (DAPO, section 3.4): it stays among the
        # samples, but none of its tokens counts.
        taught = [not without_cut or s.finish_reason == "eos" for s in samples]
        self.taught = [[own and use for own in s.sampled] for s, use in zip(samples, taught)]
        lengths = [sum(own) for own in self.taught]
        self.length = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.sequence = torch.repeat_interleave(torch.arange(len(samples), device=device), self.length)
        ends = self.length.cumsum(0)
        self.first, self.last = ends - self.length, ends - 1
        drawn = [p for s, use in zip(samples, self.taught) for p, own in zip(s.logprobs, use) if own]
        self.sampler = torch.tensor(drawn, dtype=torch.float32, device=device)
        self.length_of = self.length[self.sequence]  # (N,)
        self.ratio = torch.ones_like(self.sampler)  # last seen, for the log
        self.old = self.reference = None

    def __len__(self):
        return len(self.samples)

    def spread(self, values) -> torch.Tensor:
        """One number per sample (S,) -> one per sampled token (N,)."""
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)[self.sequence]

    def padded(self, values) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of sampled tokens (N,) -> (S, T), one row per sample, and which of them exist (S, T)."""
        places = torch.arange(int(self.length.max()) if len(self) else 0, device=self.device)
        exists = places < self.length[:, None]
        table = torch.zeros(exists.shape, dtype=values.dtype, device=self.device)
        table[exists] = values
        return table, exists

    def micro_batches(self, which, args, pad_id, rt, silent=()) -> batches.StepBatches:
        """The samples `which`, packed into rows, in micro-batches of at most --tokens_at_once tokens. Each
        has input_ids, labels, position_ids and tokens (R, T): the number of a sampled token, -1 for every
        other. At least one micro-batch, so that every process takes part in the exchange of gradients.
        silent: samples that need not be computed because they have no gradient; they are counted all the
        same."""
        import numpy as np

        limit = args.tokens_at_once or (1024 if rt.device.type == "cpu" else 32768)
        step = batches.StepBatches()
        firsts = self.first.tolist()
        sizes = {i: len(self.samples[i].prompt) + len(self.samples[i].ids) for i in which}
        parts, tokens, longest = [[]], 0, 0
        silent = set(silent)
        shown = [i for i in which if any(self.taught[i]) and i not in silent]
        for i in sorted(shown, key=lambda i: (-sizes[i], i)):  # neighbours of like length pack best
            longest = max(longest, sizes[i])
            if parts[-1] and tokens + sizes[i] > limit:
                parts.append([])
                tokens = 0
            parts[-1].append(i)
            tokens += sizes[i]
        for part in parts:
            sequences, numbers = [], []
            for i in part:
                sample = self.samples[i]
                own = np.array([False] * len(sample.prompt) + self.taught[i])
                sequences.append((sample.prompt + sample.ids, len(sample.prompt)))
                numbers.append(np.where(own, firsts[i] + own.cumsum() - 1, -1))
            batch = batches.rows_of(sequences, -(-max(longest, 2) // 32) * 32, pad_id, numbers)
            step.append({name: tensor.to(rt.device) for name, tensor in batch.items()})
        step.num_targets = sum(sum(self.taught[i]) for i in which)
        step.num_shown = sum(sum(self.taught[i]) for i in shown)
        step.num_tokens = sum(sizes[i] for i in shown)
        step.num_rows = len(which)
        return step


def policy_logprobs(model, batch, head, temperature=1.0):
    """What the model thinks of the sampled tokens of a micro-batch: their log-probabilities (n,), which
    tokens these are (n,), the entropy at each (n,), and the balance loss (None when dense)."""
    hidden, aux_loss = hidden_states(model, batch)
    keep, targets = answer_positions(batch["labels"])
    tokens = next_of(batch["tokens"], -1)[keep]
    logps, entropy = token_logprobs_and_entropy(hidden[keep], head, targets, temperature)
    return logps, tokens, entropy, aux_loss


def score(model, micro_batches, num_tokens, args, rt, values=policy_logprobs, **settings) -> torch.Tensor:
    """`values(model, batch, **settings)` -> (numbers, tokens, ...) of every sampled token, (N,) float32
    without a gradient. Computed by the very code that trains, compiled if it is, so that a policy which has
    not moved finds a ratio of one."""
    compiled = str(args.use_compile) == "1" and model.training
    found = torch.zeros(num_tokens, dtype=torch.float32, device=rt.device)
    with torch.set_grad_enabled(compiled):
        for batch in micro_batches:
            with rt.autocast():
                numbers, tokens, *_ = values(model, batch, **settings)
            found[tokens] = numbers.detach().float()
    return found


# --------------------------------------------------------------------------------------------------
# Held-out success
# --------------------------------------------------------------------------------------------------


def held_out_success(engine, val, args, rt, tokenizer, play) -> tuple[dict, list, list]:
    """Figures of held-out prompts, the likeliest answers, and --pass_k samples of each prompt.

    val_pass1: share of prompts whose likeliest answer is right; val_pass{k}: that have a right one among k
    samples (both only where answers can be checked); val_length: tokens of the likeliest answers; val_ended:
    of them, those that end by themselves.
    """
    from trainer.rewards import verified

    mine, k = list(range(rt.rank, len(val), rt.world_size)), args.pass_k
    greedy = play(engine, val, mine, mine, -1, args, tokenizer, num_answers=1, greedy=True)
    sampled = play(engine, val, mine, mine, -2, args, tokenizer, num_answers=k) if k else []
    right, hits = (
        [verified(describe(s, val, args)) or 0.0 for s in samples] for samples in (greedy, sampled)
    )
    counts = [
        sum(s.num_sampled for s in greedy),
        sum(s.finish_reason == "eos" for s in greedy),
        sum(val[row].expected is not None for row in mine),
        sum(right),
        sum(max(hits[i : i + k]) for i in range(0, len(hits), k or 1)),
    ]
    length, ended, known, passed, any_right = runtime.total(list(map(float, counts)), rt)
    found = {"val_length": length / len(val), "val_ended": ended / len(val)}
    if known:
        found["val_pass1"] = passed / known
        found |= {f"val_pass{k}": any_right / known} if k else {}
    return found, greedy, sampled


def play_once(engine, prompts, rows, places, step, args, tokenizer, num_answers, greedy=False):
    """`answer`, greedy when asked to."""
    if not greedy:
        return answer(engine, prompts, rows, places, step, args, tokenizer, num_answers)
    import argparse

    cold = argparse.Namespace(**vars(args) | {"temperature": 0.0})
    return answer(engine, prompts, rows, places, step, cold, tokenizer, num_answers)


def describe(sample: Sample, prompts, args):
    """A sample as the rewards see it (trainer/rewards.py)."""
    from trainer.rewards import Answer

    prompt = prompts[sample.row]
    return Answer(
        messages=prompt.messages,
        text=sample.text,
        expected=prompt.expected,
        finished=sample.finish_reason == "eos",
        num_tokens=sample.num_sampled,
        max_tokens=args.max_gen_len * getattr(args, "max_turns", 1),
        thinking=sample.thinking,
        turns=sample.turns,
        calls=sample.calls,
        valid_calls=sample.valid_calls,
        failed_calls=sample.failed_calls,
        observations=sample.observations,
        unfinished=sample.finish_reason == "turns",
    )
