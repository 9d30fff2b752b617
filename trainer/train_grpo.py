"""Group relative policy optimisation: answer every prompt several times, and learn from what was better than
the group's average. No critic, no reward model needed where answers can be checked.

    A_i = (R_i - mean of the group) / (std of the group + 1e-4)          the same for all tokens of answer i
    r_t = pi(y_t) / pi_old(y_t)
    l_t = - min(r_t A, clip(r_t, 1 - eps, 1 + eps_high) A) + beta KL(pi | reference)

    grpo     mean over answers of the mean over their tokens
             (Shao 2024, https://arxiv.org/abs/2402.03300, equation 3)
    dr_grpo  A without std; sum / (longest answer x answers): no answer gains by its length or by its group's
             spread (Liu 2025, https://arxiv.org/abs/2503.20783, section 3.1)
    dapo     mean over all tokens, eps_high .28, groups without a difference are sampled again, answers near
             the length limit are punished (Yu 2025, https://arxiv.org/abs/2503.14476, equation 8)
    gspo     one ratio per answer, the geometric mean of its tokens', eps 3e-4 / 4e-4
             (Zheng 2025, https://arxiv.org/abs/2507.18071, equation 5)
    cispo    l_t = - min(r_t, eps_high).detach() A log pi(y_t): a token beyond the cap keeps its gradient
             (MiniMax-M1 2025, https://arxiv.org/abs/2506.13585, equation 4)

With one update per step pi_old is pi itself and r is 1: clipping acts from the second update on
(--mini_batch_size, --update_iters).

    python trainer/train_grpo.py
    python trainer/train_grpo.py --loss_type cispo --data_path my_prompts.jsonl --reward correct:1,format:0.1
    torchrun --nproc_per_node 2 trainer/train_grpo.py

Reads lines {"conversations": [..., user, placeholder], "answer"?: value} and out/full_sft_512.pth; writes
out/grpo_512.pth. Next: python eval_llm.py --weight grpo.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli, rl_flags  # the rest is imported where it is used: --help comes before torch


def group_advantages(rewards, scale="group", rt=None):
    """rewards (P, G) of this process's prompts -> advantages (P, G): what is above the mean of its group,
    divided by the group's std ("group"), the std of all rewards of the step ("batch"), or by nothing
    ("none"). The std is that of a sample (n - 1). Equal rewards are exactly 0: rounding must not become a
    direction."""
    import torch

    from trainer import runtime

    std_of_all = runtime.spread(rewards, rt)[1] if scale == "batch" else 0.0
    if not len(rewards):
        return rewards
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    if scale == "group":
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (std_of_all + 1e-4)
    return torch.where(spread < 1e-6, 0.0, centred)


def clipped_loss(log_ratio, advantages, epsilon, epsilon_high):
    """PPO's clipped surrogate of every token (n,): grpo, dr_grpo, dapo."""
    import torch

    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)


def answer_mean(log_ratio, answers):
    """log of gspo's ratio: the mean over the tokens of the answer, at each of them (n,). answers (n,):
    which of them a token belongs to; all tokens of an answer must be here."""
    import torch

    zeros = log_ratio.new_zeros(int(answers.max()) + 1 if len(answers) else 0)
    sums = zeros.index_add(0, answers, log_ratio)
    counts = zeros.index_add(0, answers, torch.ones_like(log_ratio))
    return (sums / counts.clamp(min=1))[answers]


def gspo_loss(log_ratio, advantages, epsilon, epsilon_high, answers):
    """The clipped surrogate with one ratio for a whole answer, for each of its tokens (n,)."""
    return clipped_loss(answer_mean(log_ratio, answers), advantages, epsilon, epsilon_high)


def cispo_loss(logps, log_ratio, advantages, cap):
    """REINFORCE with a capped importance weight (n,)."""
    return -log_ratio.exp().clamp(max=cap).detach() * advantages * logps


def reference_kl_loss(logps, reference, log_ratio, kind="k3"):
    """Estimates of the KL to the reference at sampled tokens (n,), with the gradient they are wanted for:
    k2 = d^2/2 has that of KL(policy | reference), k3 = exp(-d) - 1 + d that of KL(reference | policy),
    "corrected" = ratio x k3 that of KL(policy | reference) off-policy too (DeepSeek-V3.2). d = log policy -
    log reference. (k1 = d would have none: its expectation is the score function's, zero.)
    http://joschu.net/blog/kl-approx.html"""
    d = logps - reference
    if kind == "k2":
        return d**2 / 2
    k3 = (-d).exp() - 1 + d
    return log_ratio.exp() * k3 if kind == "corrected" else k3


def token_weights(loss_type, length, totals, max_gen_len):
    """By how much the loss of a token counts (n,). length (n,): sampled tokens of its answer; totals: answers
    and tokens ("loss") of the whole step."""
    if loss_type in ("grpo", "gspo"):
        return 1 / (length * totals["answers"])
    constant = totals["loss"] if loss_type in ("dapo", "cispo") else max_gen_len * totals["answers"]
    return (length > 0) / constant


def grpo_loss(model, batch, totals, head, step, args):
    """What one micro-batch adds to the loss, and its sums for the log.

    step: trajectories (trainer/rollout.py) with `advantages` and `length_of` (N,), and where they exist `old`
    and `reference` (N,) log-probabilities; head: the output matrix.
    """
    from trainer import rl_metrics
    from trainer.rollout import policy_logprobs

    logps, at, entropy, aux_loss = policy_logprobs(model, batch, head, args.temperature)
    old = logps.detach() if step.old is None else step.old[at]
    advantages, log_ratio = step.advantages[at], logps - old
    epsilon, epsilon_high = args.epsilon, args.epsilon_high
    if args.loss_type == "cispo":
        losses = cispo_loss(logps, log_ratio, advantages, epsilon_high)
    elif args.loss_type == "gspo":
        losses = gspo_loss(log_ratio, advantages, epsilon, epsilon_high, step.sequence[at])
    else:
        losses = clipped_loss(log_ratio, advantages, epsilon, epsilon_high)
    # What was sampled came from the sampler's rounding of pi_old; weighted by the ratio of the two it is as
    # if pi_old had been sampled (truncated importance sampling, https://fengyao.notion.site/off-policy-rl).
    mismatch = old - step.sampler[at]
    trust = mismatch.exp().clamp(max=args.tis_cap).detach() if args.tis_cap else 1.0
    losses = losses * trust
    if step.reference is not None:
        losses = losses + args.beta * reference_kl_loss(logps, step.reference[at], log_ratio, args.kl_type)
    weights = token_weights(args.loss_type, step.length_of[at], totals, args.max_gen_len)
    loss = (losses * weights).sum()
    clipped_by = answer_mean(log_ratio, step.sequence[at]) if args.loss_type == "gspo" else log_ratio
    sums = rl_metrics.token_figures(
        logps, old, entropy, advantages, mismatch, epsilon, epsilon_high, args, clipped_by.detach()
    )
    if step.reference is not None:
        sums |= rl_metrics.kl_figures(logps.detach(), step.reference[at])
    sums["loss"] = loss.detach() * totals["loss"]  # the log divides by the tokens
    if aux_loss is not None:
        loss, sums["aux_loss"] = loss + aux_loss / totals["aux_loss"], aux_loss
    step.ratio[at] = (log_ratio.detach().exp() * trust).float()
    return loss, sums


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        **rl_flags.DEFAULTS,
        save_weight="grpo",
        from_weight="full_sft",
        wandb_project="MiniMind-GRPO",
        learning_rate=3e-6,
        default_data="dataset/rlaif.jsonl or rlaif-mini.jsonl, else the embedded curriculum",
    )
    parser.set_defaults(exact=True, pack=1)
    rl_flags.add_rollout(parser, num_generations=8, max_gen_len=256)
    rl_flags.add_rewards(parser)
    g = rl_flags.add_update(parser, beta=0.0)
    rl_flags.add_group_flags(g, loss_type="grpo")
    g.add_argument(
        "--dynamic_sampling",
        type=cli.count,
        metavar="N",
        help="sample up to N times more prompts until as many groups as asked for are neither all equal; "
        "without it 3 for dapo, else 0",
    )
    rl_flags.add_watching(parser)
    cli.add_tax_path(parser)
    rl_flags.add_reasoning(parser)
    return rl_flags.checked(parser, rl_flags.with_loss_defaults(parser.parse_args(argv)))


def learn_from_groups(course, groups, step, lr_factor):
    """The updates of one step from groups of answers, each (samples, rewards, components, success); returns
    the line of the log."""
    import torch

    from trainer import runtime
    from trainer.rollout import Trajectories

    args, rt = course.args, course.rt
    samples = [sample for group in groups for sample in group[0]]
    rewards = torch.tensor([group[1] for group in groups], dtype=torch.float64)
    rewards = rewards.view(len(groups), args.num_generations)
    names = groups[0][2] if groups else ()
    parts = {name: [v for group in groups for v in group[2][name]] for name in names}
    right = [r for group in groups for r in group[3]]
    advantages = group_advantages(rewards, args.scale_rewards, rt)

    own = Trajectories(samples, rt.device, without_cut=args.overlong == "mask")
    own.advantages = own.spread(advantages.flatten())
    silent = []  # without an advantage, a KL or a balance loss there is no gradient to compute
    if course.reference is None and not runtime.bare(course.model).config.use_moe:
        silent = (advantages.flatten() == 0).nonzero().flatten().tolist()
    with course.timed("score_s"):
        if args.mini_batch_size or args.update_iters > 1:  # else pi_old is the policy itself
            own.old = course.old_logprobs(own, silent)
        own.reference = course.reference_logprobs(own)
    updates = course.updates(own, step, lr_factor, grpo_loss, silent)
    return course.figures(step, updates, own, rewards.flatten().tolist(), parts, right, advantages)


def main(args):
    from trainer import runtime
    from trainer.rl import Course, groups_that_differ

    rt = runtime.start(args)
    path = cli.find_data(args, ["rlaif.jsonl", "rlaif-mini.jsonl"], mini="rlaif.jsonl")
    course = Course("grpo", args, rt, path)

    def update(step, prompts, lr_factor):
        with course.timed("rollout_s"):
            groups, figures = groups_that_differ(course, prompts.rows, prompts.places, step)
        return learn_from_groups(course, groups, step, lr_factor) | figures

    course.fit(update)
    course.end()


if __name__ == "__main__":
    cli.run(main, parse_args)
