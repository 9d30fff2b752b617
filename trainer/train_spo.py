"""Single-stream policy optimisation: one answer to a prompt, compared with what the prompt's own past says it
is worth. No group, no critic; every sample is of another prompt.

    v = alpha / (alpha + beta)         the prompt's tracker, BEFORE this answer
    A = r - v,   A~ = (A - mean) / (std + 1e-8)            over the whole step, all processes
    l_t = - min(ratio A~, clip(ratio, 1 - .2, 1 + .28) A~), mean over all tokens
    afterwards:  rho = clip(2^(-D / D_half), rho_min, rho_max)
                 alpha <- rho alpha + r,   beta <- rho beta + (1 - r)

The tracker counts successes and failures, r in [0, 1], and forgets as fast as the policy moves: D is the mean
|log pi_now - log pi_then| over the tokens of the prompt's previous answer. Prompts are drawn without
replacement by w = sqrt(v (1 - v)) + .05: those that are neither hopeless nor done. Xu and Ding 2025,
https://arxiv.org/abs/2509.13232. --baseline global keeps one tracker for all prompts, as MiniMind does.

    python trainer/train_spo.py
    torchrun --nproc_per_node 2 trainer/train_spo.py --batch_size 128

Reads lines {"conversations": [..., user, placeholder], "answer"?: value} and out/full_sft_512.pth; writes
out/spo_512.pth. Next: python eval_llm.py --weight spo.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli, rl_flags  # the rest is imported where it is used: --help comes before torch
from trainer.train_grpo import grpo_loss  # its dapo form: clipped, mean over tokens

RANGES = {  # of reward components; others: 0 to 1
    "model": (-3.0, 3.0),
    "repetition": (-0.5, 0.0),
    "overlong": (-1.0, 0.0),
    "tags": (0.0, 1.5),
    "rules": (-1.75, 1.75),
    "tools": (-1.0, 1.0),
}


def first_counts(successes, num_samples, rho_min):
    """alpha and beta of prompts of which `successes` (P,) out of num_samples were seen: N0 = 1 / (1 -
    rho_min) answers' worth of the smoothed share (successes + .5) / (num_samples + 1); without samples .5
    and .5."""
    if not num_samples:
        return successes * 0 + 0.5, successes * 0 + 0.5
    strength, share = 1 / (1 - rho_min), (successes + 0.5) / (num_samples + 1)
    return strength * share, strength * (1 - share)


def forgetting(change, half, rho_min, rho_max):
    """rho (n,): how much of the past still counts after the policy changed by `change` (n,) nats per
    token."""
    return (2 ** (-change / half)).clamp(rho_min, rho_max)


def prompt_weights(value):
    """By how much a prompt wants to be drawn (P,): most at 1/2, but never not at all."""
    return (value * (1 - value)).sqrt() + 0.05


def draw_prompts(weights, count, seed):
    """`count` different prompts by weight, a function of the seed; all of them, several times over, when
    there are not so many."""
    import torch

    generator = torch.Generator().manual_seed(seed % 2**63)
    rows = []
    while len(rows) < count:
        few = min(count - len(rows), len(weights))
        rows += torch.multinomial(weights, few, generator=generator).tolist()
    return rows


def stream_advantages(rewards, values, rt=None):
    """(r - v - mean) / (std + 1e-8), (n,) float64; mean and std of a sample over all processes. Where nothing
    differs they are exactly 0: rounding must not become a direction."""
    from trainer import runtime

    raw = rewards.double() - values.double()
    mean, std = runtime.spread(raw, rt)
    return (raw - mean) / (std + 1e-8) if std > 1e-6 else raw * 0


class Tracker:
    """What is known of every prompt: alpha and beta (P,) float64, visits (P,), and its last answer with the
    log-probabilities it had then. With `one`, a single alpha and beta for all prompts."""

    def __init__(self, num_prompts: int, args):
        import torch

        self.one, self.args = args.baseline == "global", args
        size = 1 if self.one else num_prompts
        self.alpha, self.beta = first_counts(torch.zeros(size, dtype=torch.float64), 0, args.rho_min)
        self.visits = torch.zeros(num_prompts, dtype=torch.int64)
        self.answers: dict = {}  # row -> (ids, log-probabilities, whether the prompt opened a think block)
        self.mean_logp = None  # of the last step's answers (global)

    def value(self, rows=None):
        """v of the prompts `rows` (default: all)."""
        v = self.alpha / (self.alpha + self.beta)
        if self.one:
            return v.expand(len(self.visits) if rows is None else len(rows))
        return v if rows is None else v[rows]

    def strength(self, rows):
        """Effective number of answers behind v."""
        total = self.alpha + self.beta
        return total.expand(len(rows)) if self.one else total[rows]

    def begin(self, successes, num_samples: int):
        """What num_samples answers to every prompt said before the first step: successes (P,) float64."""
        successes = successes.mean()[None] if self.one else successes
        self.alpha, self.beta = first_counts(successes, num_samples, self.args.rho_min)

    def see(self, rows, rewards, changes):
        """After a step: rewards (n,) in [0, 1] of the prompts `rows`, changes (n,) of the policy since their
        last answer. Returns rho (n,)."""
        import torch

        rewards, changes = (torch.as_tensor(x, dtype=torch.float64) for x in (rewards, changes))
        if self.one:
            rows, rewards, changes = [0], rewards.mean()[None], changes.mean()[None]
        rho = forgetting(changes, self.args.kl_half, self.args.rho_min, self.args.rho_max)
        for row, r, keep in zip(rows, rewards, rho):
            self.alpha[row] = keep * self.alpha[row] + r
            self.beta[row] = keep * self.beta[row] + 1 - r
        return rho

    def learn(self, seen):
        """After a step: (row, reward in [0, 1], change, ids, log-probabilities, thinking) of every answer, of
        all processes. Returns rho (n,)."""
        rows, rewards, changes, ids, logps, thinking = zip(*seen)
        if self.one:  # the change of the mean log-probability from step to step, as MiniMind measures it
            mean = sum(map(sum, logps)) / max(sum(map(len, logps)), 1)
            changes = [0.0 if self.mean_logp is None else abs(mean - self.mean_logp)]
            self.mean_logp = mean
        for row, answer, old, thought in zip(rows, ids, logps, thinking):
            self.visits[row] += 1
            if len(answer) == len(old):  # not one that was left out of the loss
                self.answers[row] = (answer, old, thought)
        return self.see(rows, rewards, changes)

    def state_dict(self):
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "visits": self.visits,
            "rows": list(self.answers),
            "ids": [ids for ids, _, _ in self.answers.values()],
            "logps": [logps for _, logps, _ in self.answers.values()],
            "thinking": [thinking for _, _, thinking in self.answers.values()],
            "mean_logp": self.mean_logp,
        }

    def load_state_dict(self, state):
        self.alpha, self.beta, self.visits = state["alpha"], state["beta"], state["visits"]
        answers = zip(state["ids"], state["logps"], state["thinking"])
        self.answers = dict(zip(state["rows"], answers))
        self.mean_logp = state["mean_logp"]


def scaled(rewards, spec: str):
    """Rewards -> [0, 1], clipped: the range of a mix is that of its components."""
    import torch

    low = high = 0.0
    for part in spec.split(","):
        name, _, weight = part.partition(":")
        ends = [float(weight or 1) * end for end in RANGES.get(name.strip(), (0.0, 1.0))]
        low, high = low + min(ends), high + max(ends)
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return ((rewards - low) / max(high - low, 1e-9)).clamp(0, 1)


def successes_before(course, num_samples: int):
    """Summed success (P,) float64 of num_samples answers to every prompt, by all processes."""
    import torch

    from trainer import runtime

    rows = list(range(len(course.train)))[course.rt.rank :: course.rt.world_size]
    samples = course.answer(rows, rows, -3, num_samples)
    found = torch.zeros(len(course.train), dtype=torch.float64)
    r = scaled(course.rewards_of(samples)[0], course.reward_spec)
    found[rows] = r.view(len(rows), num_samples).sum(1)
    return torch.tensor(runtime.total(found, course.rt), dtype=torch.float64)


def policy_changes(course, tracker, rows):
    """D of the prompts `rows` (n,) float64: mean |log pi_now - log pi_then| over the tokens of their previous
    answers; 0 where there is none."""
    import torch

    from trainer import rollout

    known = [row for row in rows if row in tracker.answers]
    earlier = [
        rollout.Sample(row, 0, course.train.ids(row, thinking), ids, [True] * len(ids), logps, "eos")
        for row, (ids, logps, thinking) in ((row, tracker.answers[row]) for row in known)
    ]
    own = rollout.Trajectories(earlier, course.rt.device)
    moved = (course.old_logprobs(own) - own.sampler).abs().double()
    sums = torch.zeros(len(own), dtype=torch.float64).index_add(0, own.sequence.cpu(), moved.cpu())
    found = dict(zip(known, (sums / own.length.cpu().clamp(min=1)).tolist()))
    return torch.tensor([found.get(row, 0.0) for row in rows], dtype=torch.float64)


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        **rl_flags.DEFAULTS | {"batch_size": 128},
        save_weight="spo",
        from_weight="full_sft",
        wandb_project="MiniMind-SPO",
        learning_rate=3e-6,
        default_data="dataset/rlaif.jsonl or rlaif-mini.jsonl, else the embedded curriculum",
    )
    parser.set_defaults(exact=True, pack=1, loss_type="dapo")
    rl_flags.add_rollout(parser, num_generations=None, max_gen_len=256)
    rl_flags.add_rewards(parser)
    g = rl_flags.add_update(parser, beta=0.0)
    positive = {"type": cli.non_negative_float, "metavar": "X"}
    g.add_argument("--epsilon", **positive, default=0.2, help="lower clip of the ratio")
    g.add_argument("--epsilon_high", **positive, default=0.28, help="upper clip of the ratio")
    g.add_argument(
        "--update_iters", type=cli.positive_int, default=1, metavar="N", help="passes over a step's answers"
    )
    g = parser.add_argument_group("tracker")
    g.add_argument(
        "--baseline",
        choices=("prompt", "global"),
        default="prompt",
        help="a tracker for every prompt, or one for all",
    )
    g.add_argument(
        "--init_samples",
        type=cli.count,
        default=2,
        metavar="N",
        help="answers to every prompt before the first step, from which trackers start; the paper takes 8",
    )
    g.add_argument(
        "--kl_half", type=cli.positive_float, default=0.06, metavar="D", help="change that halves the past"
    )
    g.add_argument("--rho_min", type=cli.fraction, default=0.875, metavar="X", help="forget at most so fast")
    g.add_argument("--rho_max", type=cli.fraction, default=0.96, metavar="X", help="and at least so fast")
    rl_flags.add_watching(parser)
    cli.add_tax_path(parser)
    rl_flags.add_reasoning(parser)
    args = rl_flags.checked(parser, parser.parse_args(argv))
    if not args.rho_min <= args.rho_max < 1 or args.rho_min == 1:
        parser.error("--rho_min must not be above --rho_max, and --rho_max must be below 1")
    return args


def main(args):
    from trainer import batches, rollout, runtime
    from trainer.rl import Course

    rt = runtime.start(args)
    path = cli.find_data(args, ["rlaif.jsonl", "rlaif-mini.jsonl"], mini="rlaif.jsonl")
    course = Course("spo", args, rt, path)
    tracker = Tracker(len(course.train), args)
    if "tracker" in course.extra:
        tracker.load_state_dict(course.extra["tracker"])

    if args.init_samples and "tracker" not in course.extra:
        rt.print(f"tracker: {args.init_samples} answers to each of {len(course.train):,} prompts")
        tracker.begin(successes_before(course, args.init_samples), args.init_samples)

    def update(step, _, lr_factor):
        count = batches.rows_per_step(args)
        chosen = draw_prompts(prompt_weights(tracker.value()), count, runtime.mix_seed(args.seed, 17, step))
        places = batches.split_step(list(range(count)), rt.world_size, count)[rt.rank][0]
        rows = [chosen[place] for place in places]
        with course.timed("rollout_s"):
            samples = course.answer(rows, places, step)
            rewards, parts, right = course.rewards_of(samples)
        r, v = scaled(rewards, course.reward_spec), tracker.value(rows)
        own = rollout.Trajectories(samples, rt.device, without_cut=args.overlong == "mask")
        with course.timed("score_s"):
            changes = policy_changes(course, tracker, rows)
            own.old, own.reference = course.old_logprobs(own), course.reference_logprobs(own)
        advantages = stream_advantages(r, v, rt)
        own.advantages = own.spread(advantages)

        updates = course.updates(own, step, lr_factor, grpo_loss)

        first_visits = sum(int(tracker.visits[row]) == 0 for row in rows)
        logps = [part.tolist() for part in own.old.split(own.length.tolist())]
        answered = [(sample.ids, part, sample.thinking) for sample, part in zip(samples, logps)]
        mine = [(*known, *answer) for *known, answer in zip(rows, r.tolist(), changes.tolist(), answered)]
        rho = tracker.learn([answer for part in runtime.gather(mine, rt) for answer in part])

        found = course.figures(step, updates, own, rewards, parts, right, advantages)
        n, drawn = len(rows), prompt_weights(tracker.value())
        drawn = drawn / drawn.sum()
        return found | {
            "tracked": (float(v.sum()), n),
            "brier": (float(((r - v) ** 2).sum()), n),
            "tracker_n": (float(tracker.strength(rows).sum()), n),
            "change": (float(changes.sum()), n),
            "rho": (float(rho.mean()), 1),
            "rho_floor": (float((rho <= args.rho_min).double().mean()), 1),
            "first_visits": (first_visits, n),
            "visits": (float(tracker.visits.double().mean()), 1),
            "prompt_entropy": (float(-(drawn * drawn.log()).sum()), 1),
        }

    course.fit(update, tracker=tracker.state_dict)
    course.end()


if __name__ == "__main__":
    cli.run(main, parse_args)
