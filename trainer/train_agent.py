"""Agentic reinforcement learning: the model calls tools, reads what they answer, and is rewarded for the
result.

    trajectory = prompt, (turn of the policy, results of its calls) ... last turn
    one reward for the whole of it, delayed to its end; advantages and losses are those of train_grpo.py, over
    the tokens that the policy sampled: its turns with the end token of each, never what a tool said

Every prompt is answered --num_generations times, each in up to --max_turns turns; all conversations of a step
move on together. Ids that were sampled stay as they are: what the model saw is what it is trained on. A call
that is malformed, or that fails, is answered by an error, which is a chance to do better.
Success is that the last turn states all expected values ("gt").

Loss only on own tokens: Jin et al. 2025, https://arxiv.org/abs/2503.09516, section 3.1.

    python trainer/train_agent.py
    python trainer/train_agent.py --data_path my_tasks.jsonl --loss_type cispo --max_turns 4
    torchrun --nproc_per_node 2 trainer/train_agent.py

Reads lines {"conversations": [system with tools, user, placeholder], "gt": [values]} and
out/full_sft_512.pth; writes out/agent_512.pth. Tools: trainer/tools.py. Next: python scripts/eval_mini.py
--weight out/agent_512.pth --exams tools.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file runs from any directory

from trainer import cli, rl_flags  # the rest is imported where it is used: --help comes before torch
from trainer.train_grpo import learn_from_groups  # a conversation is an answer that took several turns


def parse_args(argv=None):
    parser = cli.stage_parser(
        __doc__,
        **rl_flags.DEFAULTS | {"batch_size": 8, "max_seq_len": 1024},
        save_weight="agent",
        from_weight="full_sft",
        wandb_project="MiniMind-Agent-RL",
        learning_rate=3e-6,
        default_data="dataset/agent_rl.jsonl or agent_rl_math.jsonl, else the embedded curriculum",
    )
    parser.set_defaults(exact=True, pack=1)
    rl_flags.add_rollout(parser, num_generations=8, max_gen_len=256)
    parser.add_argument(
        "--max_turns", type=cli.positive_int, default=4, metavar="N", help="turns of the policy at most"
    )
    parser.add_argument(
        "--max_total_len",
        type=cli.positive_int,
        default=2500,
        metavar="N",
        help="tokens of a conversation at most: a turn that might go beyond is not begun",
    )
    rl_flags.add_rewards(parser, default="correct:1")
    g = rl_flags.add_update(parser, beta=0.0)
    rl_flags.add_group_flags(g, loss_type="cispo")
    rl_flags.add_watching(parser)
    cli.add_tax_path(parser)
    args = rl_flags.checked(parser, rl_flags.with_loss_defaults(parser.parse_args(argv)))
    if args.max_total_len < args.max_seq_len + args.max_gen_len:
        parser.error(
            f"--max_total_len {args.max_total_len} cannot hold a prompt of --max_seq_len {args.max_seq_len} "
            f"and one turn of --max_gen_len {args.max_gen_len} tokens"
        )
    return args


def conversation_figures(samples) -> dict:
    """Of the samples of this process, (sum, count) by name: how tools were used."""
    n = len(samples)
    calls = sum(s.calls for s in samples)
    own, all_tokens = sum(s.num_sampled for s in samples), sum(len(s.ids) for s in samples)
    return {
        "turns": (sum(len(s.turns) for s in samples), n),
        "calls": (calls, n),
        "valid_calls": (sum(s.valid_calls for s in samples), calls),
        "failed_calls": (sum(s.failed_calls for s in samples), calls),
        "unfinished": (sum(s.finish_reason == "turns" for s in samples), n),
        "tool_tokens": (all_tokens - own, all_tokens),
    }


def main(args):
    from trainer import checkpoint, runtime
    from trainer.rl import Course, groups_that_differ
    from trainer.rollout import converse

    rt = runtime.start(args)
    path = cli.find_data(args, ["agent_rl.jsonl", "agent_rl_math.jsonl"], mini="agent_rl.jsonl")
    course = Course("agent", args, rt, path, kind="agent", play=converse)

    def update(step, prompts, lr_factor):
        with course.timed("rollout_s"):
            groups, figures = groups_that_differ(course, prompts.rows, prompts.places, step)
        figures |= learn_from_groups(course, groups, step, lr_factor)
        return figures | conversation_figures([sample for group in groups for sample in group[0]])

    course.fit(update)
    written = checkpoint.shown(checkpoint.weight_path(args, runtime.bare(course.model).config))
    course.end(f"python scripts/eval_mini.py --weight {written} --exams tools")


if __name__ == "__main__":
    cli.run(main, parse_args)
