"""How fast are benchmarks scored? scripts/scoring.py against one forward pass of the model for every choice.

    python scripts/bench_scoring.py --tasks data/eval/cmmlu.jsonl --weight full_sft --num_items 200

Both score the same questions in float32, one after the other, in this process; log-likelihoods have to agree.
docs/benchmarks.md has rows of it.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

from trainer import cli


def parse_args(argv=None):
    import eval_llm

    parser = eval_llm.Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    parser.add_argument("--tasks", required=True, metavar="FILE", help="as of scripts/eval_benchmark.py")
    parser.add_argument(
        "--rule", choices=("option", "letter"), default="option", help="how choices are asked"
    )
    parser.add_argument(
        "--num_items", type=cli.positive_int, default=200, metavar="N", help="the first N items"
    )
    eval_llm.add_weight_flags(parser)
    return parser.parse_args(argv)


def one_by_one(model, requests) -> list[float]:
    """The sum of log-probs of each continuation, by one forward pass over context and continuation."""
    import torch

    found = []
    with torch.inference_mode():
        for context, continuation in requests:
            ids = torch.tensor([context + continuation])
            logps = model(ids[:, :-1]).logits[0].log_softmax(-1)
            targets = ids[0, len(context) :, None]
            found.append(float(logps[-len(continuation) :].gather(1, targets).sum()))
    return found


def main(args):
    import eval_llm
    from model.generation import Generator
    from scripts import benchmark_tasks, scoring
    from trainer import checkpoint

    tokenizer = eval_llm.load_tokenizer(ROOT / "model")
    model, _ = checkpoint.load_model(eval_llm.find_weights(args), tokenizer)
    tasks = [task for task in benchmark_tasks.read_tasks(args.tasks) if task.kind == "choice"]
    items = [(item, task.language) for task in tasks for item in task.items][: args.num_items]
    pairs = [
        (benchmark_tasks.context(item, args.rule, language, []), f" {text}")
        for item, language in items
        for text in benchmark_tasks.answers(item, args.rule)
    ]
    requests, engine = scoring.encode_pairs(tokenizer, pairs), Generator(model, "float32")
    seconds, scores = [], []
    for score in (
        lambda: one_by_one(model, requests),
        lambda: [value for value, _ in scoring.log_likelihoods(engine, requests)],
    ):
        begin = time.perf_counter()
        scores.append(score())
        seconds.append(time.perf_counter() - begin)
    difference = max(abs(a - b) for a, b in zip(*scores, strict=True))
    print(f"{len(requests)} choices, {sum(map(len, sum(requests, ()))):,} tokens")
    alone, together = seconds
    print(f"one by one {alone:.1f} s, scripts/scoring.py {together:.1f} s: {alone / together:.1f}x")
    print(f"log-likelihoods differ by at most {difference:.1e}")
    if difference > 1e-3:
        raise checkpoint.CheckpointError("the two do not agree: one of them is wrong")


if __name__ == "__main__":
    cli.run(main, parse_args)
