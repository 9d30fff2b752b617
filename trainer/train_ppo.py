"""Proximal policy optimisation: an actor that answers, and a critic that says at every token what it expects.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1}        (GAE), R_t = A_t + V_t
    L_pi = mean over tokens of max(-A r, -A clip(r, 1 - eps, 1 + eps)),   r = pi(y_t) / pi_old(y_t)
    L_V  = 1/2 mean of max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2)

The state is what was written so far, the action the next token; V_t is read at the position that predicts
token t. The score of an answer is the reward of its last token. A are whitened over all tokens of the step,
R are not. Several updates are made from one rollout: minibatches in --ppo_update_iters passes. Once
the policy has drifted further than --early_stop_kl from the one that sampled, the actor stops.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equations 7 and 9; GAE: https://arxiv.org/abs/1506.02438,
equation 16; for language models: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5.

    python trainer/train_ppo.py
    python trainer/train_ppo.py --reward model:1,repetition:0.5 --kl_coef 0.05 --kl_in reward
    torchrun --nproc_per_node 2 trainer/train_ppo.py

Reads lines {"conversations": [..., user, placeholder], "answer"?: value} and out/full_sft_512.pth (actor and
critic begin with it); writes out/ppo_actor_512.pth. Next: python eval_llm.py --weight ppo_actor.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli, rl_flags  # the rest is imported where it is used: --help comes before torch


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Advantages and returns (S, T) of answers, from rewards and values (S, T) at the tokens that mask (S, T)
    marks. Behind the last one nothing is expected. Other positions (what a tool said, padding) are skipped:
    the step before them continues with the next token of the policy."""
    import torch

    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))  # also of answers without any token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values, rt=None):
    """(N,) -> mean 0 and variance 1 over the tokens of all processes (variance of a sample, n - 1)."""
    from trainer import runtime

    mean, std = runtime.spread(values, rt)
    return ((values.double() - mean) / (std**2 + 1e-8) ** 0.5).to(values.dtype)


def token_rewards(scores, last, old, reference=None, kl_coef=0.0):
    """The reward of every token (N,): that of its answer at the last one (scores and last, (S,)), and with a
    reference everywhere - kl_coef (log pi_old - log reference), without a gradient."""
    rewards = -kl_coef * (old - reference) if reference is not None else old * 0
    return rewards.index_add(0, last, scores)


def policy_loss(logps, old, advantages, epsilon, dual_clip=0.0):
    """The clipped loss of every token (n,). dual_clip c > 1: where A < 0 it is at most -c A, so that one
    token which has become likely cannot pull without bound (Ye et al. 2020,
    https://arxiv.org/abs/1912.09729)."""
    import torch

    ratio = (logps - old).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - epsilon, 1 + epsilon))
    if dual_clip:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return losses


def value_loss(values, old_values, returns, epsilon):
    """Of every token (n,): half the larger of two squared errors, with the value and with the value moved at
    most epsilon; and where the second was larger (n,) bool. epsilon 0: no clipping."""
    import torch

    plain = (values - returns) ** 2
    if not epsilon:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    moved = old_values + (values - old_values).clamp(-epsilon, epsilon)
    clipped = (moved - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def actor_loss(model, batch, totals, head, step, args):
    """What one micro-batch adds to L_pi, and its sums for the log. step: trajectories (trainer/rollout.py)
    with `old`, `advantages` and perhaps `reference`, (N,) each; totals: tokens of the update ("loss")."""
    from trainer import rl_metrics
    from trainer.rollout import policy_logprobs
    from trainer.train_grpo import reference_kl_loss

    logps, at, entropy, aux_loss = policy_logprobs(model, batch, head, args.temperature)
    old, advantages = step.old[at], step.advantages[at]
    mismatch = old - step.sampler[at]
    trust = mismatch.exp().clamp(max=args.tis_cap).detach() if args.tis_cap else 1.0
    losses = policy_loss(logps, old, advantages, args.clip_epsilon, args.dual_clip) * trust
    kl = {}
    if step.reference is not None:
        kl = rl_metrics.kl_figures(logps.detach(), step.reference[at])
        if args.kl_in == "loss":
            losses = losses + args.beta * reference_kl_loss(
                logps, step.reference[at], logps - old, args.kl_type
            )
    loss = losses.sum() / totals["loss"]
    epsilon = args.clip_epsilon
    sums = rl_metrics.token_figures(logps, old, entropy, advantages, mismatch, epsilon, epsilon, args) | kl
    sums["loss"] = losses.detach().sum()
    if aux_loss is not None:
        loss, sums["aux_loss"] = loss + aux_loss / totals["aux_loss"], aux_loss
    step.ratio[at] = ((logps - old).detach().exp() * trust).float()
    return loss, sums


def critic_loss(critic, batch, totals, step, args):
    """What one micro-batch adds to L_V, times --vf_coef, and its sums for the log."""
    values, at, aux_loss = token_values(critic, batch)
    losses, clipped = value_loss(values, step.values[at], step.returns[at], args.cliprange_value)
    loss = args.vf_coef * losses.sum() / totals["loss"]
    if aux_loss is not None:
        loss = loss + aux_loss / totals["aux_loss"]
    return loss, {"loss": losses.detach().sum(), "value_clip": clipped.sum()}


def token_values(critic, batch):
    """V at the position that predicts each sampled token (n,), which tokens these are (n,), and the balance
    loss (None when dense)."""
    from trainer.logprobs import answer_positions, next_of

    keep, _ = answer_positions(batch["labels"])
    values, aux_loss = critic(batch["input_ids"], batch["position_ids"], keep)
    return values, next_of(batch["tokens"], -1)[keep], aux_loss


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        **rl_flags.DEFAULTS | {"batch_size": 64},
        save_weight="ppo_actor",
        from_weight="full_sft",
        wandb_project="MiniMind-PPO",
        learning_rate=3e-6,
        default_data="dataset/rlaif.jsonl or rlaif-mini.jsonl, else the embedded curriculum",
    )
    parser.set_defaults(exact=True, pack=1)
    rl_flags.add_rollout(parser, num_generations=None, max_gen_len=256)
    rl_flags.add_rewards(parser)
    g = rl_flags.add_update(parser, beta=0.02, beta_names=("--kl_coef", "--beta"))
    g.set_defaults(mini_batch_size=16)
    g.add_argument(
        "--kl_in",
        choices=("loss", "reward"),
        default="loss",
        help="where the KL stands: in the loss, with a gradient; or as a part of every token's reward",
    )
    g = parser.add_argument_group("actor and critic")
    positive = {"type": cli.non_negative_float, "metavar": "X"}
    g.add_argument("--clip_epsilon", **positive, default=0.2, help="the ratio's clip, both ways")
    g.add_argument("--dual_clip", **positive, default=0.0, help="bound for A < 0, 3 to 10; 0 = none")
    g.add_argument("--gamma", type=cli.fraction, default=1.0, metavar="X", help="discount of later rewards")
    g.add_argument("--lam", type=cli.fraction, default=0.95, metavar="X", help="lambda of GAE")
    g.add_argument(
        "--critic_learning_rate",
        type=cli.positive_float,
        default=2e-5,
        metavar="LR",
        help="the critic's rate",
    )
    g.add_argument(
        "--critic_warmup",
        type=cli.count,
        default=0,
        metavar="STEPS",
        help="first steps in which only the critic learns",
    )
    g.add_argument(
        "--vf_coef",
        **positive,
        default=0.5,
        help="weight of the value loss; actor and critic share nothing, so it matters where --grad_clip does",
    )
    g.add_argument(
        "--cliprange_value",
        **positive,
        default=0.2,
        help="how far a value may move in one step, in units of the reward; 0 = as far as it likes",
    )
    g.add_argument(
        "--ppo_update_iters",
        "--update_iters",
        dest="update_iters",
        type=cli.positive_int,
        default=2,
        metavar="N",
        help="passes over the answers of a step",
    )
    g.add_argument(
        "--early_stop_kl",
        **positive,
        default=0.05,
        help="drift (k3 to the policy that sampled) at which the actor makes no more updates in a step (the "
        "critic does); 0 = never",
    )
    g.add_argument(
        "--debug_log_ratio",
        action="store_true",
        default=False,
        help="print how far the ratio is from 1 in the first update of every step",
    )
    rl_flags.add_watching(parser)
    cli.add_tax_path(parser)
    rl_flags.add_reasoning(parser)
    return rl_flags.checked(parser, parser.parse_args(argv))


def new_critic(course, args, rt):
    """(critic, its optimizers): the blocks the actor begins with, and a head of zeros; or as they were at the
    last save."""
    import argparse

    from model.model_reward import RewardModel
    from trainer import checkpoint, runtime

    actor = runtime.bare(course.model)
    critic = RewardModel(actor.config)
    begin = checkpoint.load_parent(args, course.run.parent, course.tokenizer, rt)
    critic.model.load_state_dict((begin or actor).model.state_dict())
    if str(args.use_compile) == "1":
        critic.compile_blocks(True)
    critic = runtime.wrap(critic, rt)
    bytes_each = 16  # float32: weight, gradient, AdamW's two averages
    course.run.other_bytes += bytes_each * sum(p.numel() for p in critic.parameters())
    settings = argparse.Namespace(**vars(args) | {"learning_rate": args.critic_learning_rate})
    optimizers = cli.build_optimizers(critic, settings, rt)
    if "critic" in course.extra:
        runtime.bare(critic).load_state_dict(course.extra["critic"])
        for optimizer, state in zip(optimizers, course.extra["critic_optimizers"], strict=True):
            optimizer.load_state_dict(state)
    return critic, optimizers


def main(args):
    import torch

    from trainer import loop, rl_metrics, rollout, runtime
    from trainer.rl import Course, mini_batches

    rt = runtime.start(args)
    path = cli.find_data(args, ["rlaif.jsonl", "rlaif-mini.jsonl"], mini="rlaif.jsonl")
    course = Course("ppo", args, rt, path)
    critic, critic_optimizers = new_critic(course, args, rt)
    pad_id = course.tokenizer.pad_token_id
    move_actor = functools.partial(loop.optimizer_step, course.model)
    move_critic = functools.partial(loop.optimizer_step, critic)

    def values_of(trajectories):
        everything = trajectories.micro_batches(range(len(trajectories)), args, pad_id, rt)
        return rollout.score(
            runtime.bare(critic), everything, len(trajectories.sampler), args, rt, token_values
        )

    def too_far(means):
        return bool(args.early_stop_kl) and means["drift"] > args.early_stop_kl

    def update(step, prompts, lr_factor):
        with course.timed("rollout_s"):
            samples = course.answer(prompts.rows, prompts.places, step)
            scores, parts, right = course.rewards_of(samples)
        own = rollout.Trajectories(samples, rt.device, without_cut=args.overlong == "mask")
        with course.timed("score_s"):
            own.old, own.reference = course.old_logprobs(own), course.reference_logprobs(own)
            own.values = values_of(own)

        in_reward = own.reference if args.kl_in == "reward" else None
        taught = (own.length > 0).nonzero().squeeze(1)
        ends = torch.tensor(scores, dtype=torch.float32, device=rt.device)[taught]
        rewards, mask = own.padded(token_rewards(ends, own.last[taught], own.old, in_reward, args.beta))
        advantages, returns = gae(rewards, own.padded(own.values)[0], mask, args.gamma, args.lam)
        own.returns = returns[mask]
        own.advantages = whiten(advantages[mask], rt)

        actor_step = functools.partial(actor_loss, head=course.head, step=own, args=args)
        critic_step = functools.partial(critic_loss, step=own, args=args)
        updates, critic_updates, stopped = [], [], False
        with course.timed("update_s"):
            for number, which in enumerate(mini_batches(samples, args, step, rt)):
                batch = own.micro_batches(which, args, pad_id, rt)
                counts = rl_metrics.counts_of(batch)
                if not stopped and step >= args.critic_warmup:
                    made = move_actor(
                        batch, course.optimizers, lr_factor, args, rt, actor_step, counts, too_far
                    )
                    updates.append(made)
                    stopped = "refused" in made
                    if args.debug_log_ratio and number == 0:
                        rt.print(f"step {step + 1}: |ratio - 1| up to {(own.ratio - 1).abs().max():.2e}")
                made = move_critic(batch, critic_optimizers, lr_factor, args, rt, critic_step, counts)
                critic_updates.append(made)
        found = course.figures(step, updates or [{"lr": 0.0}], own, scores, parts, right, advantages.sum(1))
        of_critic = rl_metrics.merged(critic_updates)
        nothing = (0.0, 0)  # where no answer of the step is learned from
        found["value_loss"] = of_critic.get("loss", nothing)
        found["value_clip"] = of_critic.get("value_clip", nothing)
        found["explained_variance"] = (rl_metrics.explained_variance(own.values, own.returns, rt), 1)
        found["early_stop"] = (float(stopped), 1)
        return found

    course.fit(
        update,
        critic=lambda: {n: t.detach().cpu() for n, t in runtime.bare(critic).state_dict().items()},
        critic_optimizers=lambda: [optimizer.state_dict() for optimizer in critic_optimizers],
    )
    course.end()


if __name__ == "__main__":
    cli.run(main, parse_args)
