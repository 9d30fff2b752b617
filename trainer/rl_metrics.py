"""What to look at while a policy learns: figures for the log (docs/metrics.md has formula, sign and unit of
each), and the samples themselves.

Every figure is a sum and a count, so that micro-batches and processes add up to the figure of the whole step.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch

from trainer import runtime
from trainer.progress import read_log

# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


TOKEN_FIGURES = ("entropy", "clip_low", "clip_high", "drift", "drift_k1", "mismatch", "kl", "kl_k1")


def token_figures(
    logps, old, entropy, advantages, mismatch, epsilon, epsilon_high, args, clipped_by=None
) -> dict:
    """Sums over the sampled tokens of a micro-batch.

    clip_low, clip_high: tokens at which clipping takes the gradient away (A < 0 and r < 1 - eps; A > 0 and
    r > 1 + eps_high): |r - 1| > eps alone would count tokens that still learn. For cispo, whose tokens all
    keep a gradient, those whose weight is capped. clipped_by: the log of the ratio that is
    clipped where it is not the token's (gspo). drift, drift_k1: k3 and k1 of pi_old to pi. mismatch:
    |log pi_old - log of the sampler|.
    """
    log_ratio = (logps - old).detach()
    ratio = log_ratio.exp()
    capped = getattr(args, "loss_type", "") == "cispo"
    clipped = ratio if clipped_by is None else clipped_by.exp()
    high = clipped > epsilon_high if capped else (advantages > 0) & (clipped > 1 + epsilon_high)
    low = torch.zeros_like(high) if capped else (advantages < 0) & (clipped < 1 - epsilon)
    return {
        "entropy": entropy.sum(),
        "clip_low": low.sum(),
        "clip_high": high.sum(),
        "drift": (ratio - 1 - log_ratio).sum(),
        "drift_k1": -log_ratio.sum(),
        "mismatch": mismatch.abs().sum(),
    }


def counts_of(micro_batches) -> dict:
    """What the sums of an update are divided by: its sampled tokens ("loss"), its answers; figures of
    tokens by those tokens that were computed."""
    counts = {"loss": micro_batches.num_targets, "answers": micro_batches.num_rows}
    counts["aux_loss"] = len(micro_batches)
    return counts | dict.fromkeys(TOKEN_FIGURES, micro_batches.num_shown)


def kl_figures(logps, reference) -> dict:
    """Estimates of KL(policy | reference) summed over sampled tokens: k1 can be negative, k3 cannot."""
    d = logps - reference
    return {"kl": ((-d).exp() - 1 + d).sum(), "kl_k1": d.sum()}


def effective_share(weights, rt=None) -> float:
    """(sum w)^2 / (n sum w^2), between 1/n and 1: of n weighted samples, how many say something. Kish
    1965."""
    sums = [float(weights.double().sum()), float((weights.double() ** 2).sum()), len(weights)]
    total, squares, n = sums if rt is None else runtime.total(sums, rt)
    return total**2 / (n * squares) if squares else 1.0


def explained_variance(values, returns, rt=None) -> float:
    """1 - Var(returns - values) / Var(returns), over all processes: 1 = the critic knows, 0 = it knows no
    more than the mean, below 0 = it misleads."""
    _, left = runtime.spread(returns - values, rt)
    _, spread = runtime.spread(returns, rt)
    return 1 - left**2 / spread**2 if spread > 0 else 0.0


def answer_figures(samples, rewards, parts, right, rt) -> dict:
    """Of the samples of this process: (sum, count) by name. rewards: their totals; parts: each component;
    right: verified success of each, or None."""
    n = len(samples)
    lengths = [s.num_sampled for s in samples]
    ended = [s.finish_reason == "eos" for s in samples]
    mean = runtime.total([sum(rewards), n], rt)
    mean = mean[0] / max(mean[1], 1)
    found = {
        "reward": (sum(rewards), n),
        "reward_var": (sum((r - mean) ** 2 for r in rewards), n),
        "length": (sum(lengths), n),
        "length_ended": (sum(x for x, e in zip(lengths, ended) if e), sum(ended)),
        "truncated": (n - sum(ended), n),
        "sampled_tokens": (sum(lengths), 1 / rt.world_size),
    }
    for name in sorted(set().union(*runtime.gather(list(parts), rt))):  # a process may have no sample
        found[f"reward_{name}"] = (sum(parts.get(name, [])), n)
    known = [r for r in right if r is not None]
    if runtime.total(len(known), rt):
        found["success"] = (sum(known), len(known))
    return found


def length_quantile(samples, rt, share=0.95) -> float:
    """The length that `share` of the samples stay below, over all processes."""
    lengths = sorted(n for part in runtime.gather([s.num_sampled for s in samples], rt) for n in part)
    return float(lengths[min(len(lengths) - 1, int(share * len(lengths)))]) if lengths else 0.0


def group_figures(groups, verifiable: bool) -> dict:
    """Of the groups of this process, each (samples, rewards, components, success): how many have no
    difference and teach nothing; where answers can be checked, how many are stuck on which side."""
    n = len(groups)
    found = {"degenerate": (sum(max(rewards) - min(rewards) <= 1e-6 for _, rewards, *_ in groups), n)}
    if verifiable:
        found["all_right"] = (sum(all(r == 1 for r in right) for *_, right in groups), n)
        found["all_wrong"] = (sum(all(r == 0 for r in right) for *_, right in groups), n)
    return found


def advantage_figures(advantages, rt) -> dict:
    """advantages: one per sample. Their size, since their mean is near zero by construction."""
    flat = advantages.flatten().double()
    return {
        "advantage": (float(flat.sum()), len(flat)),
        "advantage_abs": (float(flat.abs().sum()), len(flat)),
        "advantage_std": (runtime.spread(flat, rt)[1], 1),
        "advantage_max": (largest(flat.abs(), rt), 1),
    }


def largest(values, rt) -> float:
    """The maximum over all processes; 0 of nothing."""
    return max(runtime.gather(float(values.max()) if len(values) else 0.0, rt))


def anything(trajectories, which, args, rt) -> bool:
    """Whether some sampled token of the samples `which`, on any process, has an advantage, or a KL to pull at
    it."""
    chosen = torch.zeros(len(trajectories) + 1, dtype=torch.bool, device=trajectories.device)
    chosen[which] = True
    moved = (trajectories.advantages != 0) & chosen[trajectories.sequence]
    return runtime.total(int(bool(moved.any()) or bool(args.beta)), rt) > 0


def merged(updates: list[dict]) -> dict:
    """The figures of the updates of one step as those of one: sums and counts add up, the gradient norm is
    the largest."""
    found: dict = {}
    for figures in updates:
        for name, value in figures.items():
            if isinstance(value, tuple):
                total, count = found.get(name, (0.0, 0))
                found[name] = (total + value[0], count + value[1])
            elif name == "grad_norm":
                norms = (found.get(name, 0.0), value)
                found[name] = max(norms) if all(map(math.isfinite, norms)) else math.nan
            elif name == "num_tokens":
                found[name] = found.get(name, 0) + value
            else:
                found[name] = value
    return found


# --------------------------------------------------------------------------------------------------
# Samples
# --------------------------------------------------------------------------------------------------


class SampleFile:
    """out/NAME_samples.jsonl: what the policy wrote, and what it was told about it. One line per sample."""

    def __init__(self, args, rt, start_step: int):
        self.args, self.rt = args, rt
        self.path = Path(args.save_dir) / f"{args.save_weight}_samples.jsonl"
        self.writes = rt.is_main and not args.plan
        if self.writes:  # a resumed run writes the lines after its last save again
            kept = read_log(self.path, up_to=start_step) if start_step else []
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path)

    def see(self, step: int, samples, prompts, rewards, parts, advantages, tokenizer, count=8):
        """At every --debug_interval-th step: the first `count` samples of the first process."""
        if not self.writes or step % self.args.debug_interval:
            return
        lines = []
        for i, sample in enumerate(samples[:count]):
            lines.append(
                {
                    "step": step + 1,
                    "row": sample.row,
                    "question": prompts[sample.row].question,
                    "expected": prompts[sample.row].expected,
                    "turns": sample.turns,
                    "observations": sample.observations,
                    "reward": rewards[i],
                    "parts": {name: values[i] for name, values in parts.items()},
                    "advantage": float(advantages[i]),
                    "finish_reason": sample.finish_reason,
                    "version": sample.version,
                    "prompt_tokens": len(sample.prompt),
                    "ids": sample.ids,
                    "mask": [int(own) for own in sample.sampled],
                    "logprobs": [round(p, 4) for p in sample.logprobs],
                }
            )
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if self.args.debug_mode:
            for line, sample in zip(lines, samples):
                print(picture(line, sample, tokenizer), flush=True)


def picture(line: dict, sample, tokenizer) -> str:
    """A sample for the eye: what the policy wrote between >> and <<, what it was given as it stands."""
    parts, start = [], 0
    for i in range(1, len(sample.ids) + 1):
        if i == len(sample.ids) or sample.sampled[i] != sample.sampled[start]:
            text = tokenizer.decode(sample.ids[start:i], skip_special_tokens=False)
            parts.append(f">>{text}<<" if sample.sampled[start] else text)
            start = i
    scores = ", ".join(f"{name} {value:.2f}" for name, value in line["parts"].items())
    expected = "" if line["expected"] is None else f" (expected: {', '.join(line['expected'])})"
    return (
        f"--- step {line['step']}, row {line['row']}: {line['question']}{expected}\n{''.join(parts)}\n"
        f"    reward {line['reward']:.3f} ({scores}), advantage {line['advantage']:+.3f}, "
        f"{sum(line['mask'])} of {len(line['mask'])} tokens are the policy's, {line['finish_reason']}"
    )
