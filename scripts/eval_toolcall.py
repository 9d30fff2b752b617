"""How well does a model use tools? Questions with known answers, played to the end.

    python scripts/eval_toolcall.py --weight agent                    # the fixed questions, weights in out/
    python scripts/eval_toolcall.py --base_url http://127.0.0.1:8998/v1 --model agent
    python scripts/eval_toolcall.py --weight agent --data_path agent_heldout.jsonl --json result.json
    python scripts/eval_toolcall.py --weight agent --interactive

Right is an answer that states every expected value, by the same rule that reinforcement learning pays for
(`all_stated` in trainer/rewards.py); greedy, with a 95 % interval. Data: lines {"conversations": [system with
"tools", user, ...], "gt": [value, ...]}, as trainer/train_agent.py reads. Tools are simulated
(trainer/tools.py): nothing that a model writes is evaluated.
"""

import json
import math
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

import eval_llm
from dataset.mini_tools import run_tool
from dataset.rows import DataError
from scripts.conversation import connect, converse, explain, first_model, local, recent, remote
from trainer import cli
from trainer.checkpoint import CheckpointError
from trainer.rewards import Answer, correct
from trainer.tools import TOOLS

HISTORY = 20  # past messages that a question of your own is asked with

# (question, tools offered beside those it needs, the calls that answer it): values are those of the tools.
FIXED = [
    ("What is 48 * 17?", ["text_length"], [("calculate_math", {"expression": "48*17"})]),
    ("计算 935 减 478。", ["get_current_time"], [("calculate_math", {"expression": "935-478"})]),
    (
        "How many kilometers are 12 miles?",
        ["calculate_math"],
        [("unit_converter", {"value": 12, "from_unit": "mile", "to_unit": "km"})],
    ),
    (
        "5 千克等于多少克？",
        ["random_number"],
        [("unit_converter", {"value": 5, "from_unit": "kg", "to_unit": "g"})],
    ),
    ("What is the weather in Oslo?", ["get_current_time"], [("get_current_weather", {"location": "Oslo"})]),
    ("北京现在几点？", ["translate_text"], [("get_current_time", {"city": "北京"})]),
    ("What time is it in Tokyo?", ["get_current_weather"], [("get_current_time", {"city": "Tokyo"})]),
    (
        "What is the exchange rate from USD to CNY?",
        ["calculate_math"],
        [("get_exchange_rate", {"from_currency": "USD", "to_currency": "CNY"})],
    ),
    (
        "How many characters does the text 'lighthouse' have?",
        ["reverse_text"],
        [("text_length", {"text": "lighthouse"})],
    ),
    ("把 'window' 倒过来写。", ["text_length"], [("reverse_text", {"text": "window"})]),
    (
        "Which day of the week is it 10 days after Monday?",
        ["calculate_math"],
        [("day_of_week", {"start": "Monday", "days": 10})],
    ),
    (
        "Translate 'water' into Chinese.",
        ["text_length"],
        [("translate_text", {"text": "water", "target_language": "Chinese"})],
    ),
    (
        "What is 23 + 58, and how many characters does 'garden' have?",
        [],
        [("calculate_math", {"expression": "23+58"}), ("text_length", {"text": "garden"})],
    ),
    (
        "计算 64 乘 9，再告诉我东京的时间。",
        [],
        [("calculate_math", {"expression": "64*9"}), ("get_current_time", {"city": "东京"})],
    ),
]


def parse_args(argv=None):
    parser = eval_llm.Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    eval_llm.add_model_flags(parser)
    g = parser.add_argument_group("or a server")
    g.add_argument(
        "--base_url", metavar="URL", help="an OpenAI-compatible server, .../v1, instead of --weight"
    )
    g.add_argument("--api_key", metavar="KEY", help="for it; else environment variable MINIMIND_API_KEY")
    g.add_argument("--model", metavar="NAME", help="its model; without it the first one that it lists")
    g = parser.add_argument_group("questions")
    g.add_argument("--data_path", type=Path, metavar="FILE", help="without it fourteen fixed questions")
    g.add_argument("--num_items", type=cli.count, default=0, metavar="N", help="only the first N, 0 = all")
    g.add_argument("--interactive", action="store_true", help="type questions of your own instead")
    g.add_argument("--max_new_tokens", type=cli.positive_int, default=256, metavar="N", help="of one answer")
    g.add_argument(
        "--rounds", type=cli.positive_int, default=6, metavar="N", help="answers in a row, calls included"
    )
    g.add_argument("--open_thinking", type=cli.switch, default=0, metavar="0|1", help="1 = think first")
    g.add_argument("--json", type=Path, metavar="FILE", help="write the result, every conversation included")
    g.add_argument("--verbose", action="store_true", help="print every conversation")
    return parser.parse_args(argv)


def fixed_items() -> list[dict]:
    items = []
    for question, others, calls in FIXED:
        names = [name for name, _ in calls] + others
        values = [str(value) for call in calls for value in answer_values(run_tool(*call))]
        items.append(
            {
                "messages": [{"role": "user", "content": question}],
                "tools": [TOOLS[n] for n in names],
                "expected": values,
            }
        )
    return items


def answer_values(result: dict) -> list:
    """What of a tool's result an answer has to state: its first value."""
    if "error" in result:
        raise ValueError(f"a fixed question cannot be answered: {result}")
    return [next(iter(result.values()))]


def read_items(path: Path, count: int) -> list[dict]:
    from dataset.rows import iter_rows

    items = []
    for _, row in iter_rows(path, "agent"):
        messages, tools = row["conversations"]
        items.append({"messages": messages, "tools": tools, "expected": [str(v) for v in row["gt"]]})
        if len(items) == count:
            break
    return items


def play(speak, item: dict, rounds: int) -> dict:
    """One conversation -> what happened in it."""
    messages = [m for m in item["messages"] if m["role"] != "system" or m["content"]]
    begin, calls, failed, end = len(messages), 0, 0, ""
    for kind, value in converse(speak, messages, item["tools"], rounds):
        calls += kind == "call"
        failed += kind == "result" and not value["ok"]
        end = value if kind == "end" else end
    said = messages[begin:]
    last = said[-1] if said and said[-1]["role"] == "assistant" else {"content": ""}
    answer = Answer(
        messages=item["messages"],
        text=last.get("content") or "",
        expected=item["expected"],
        finished=end == "stop",
        observations=[m["content"] for m in said if m["role"] == "tool"],
        unfinished=end == "rounds",
    )
    return {
        "question": item["messages"][-1]["content"],
        "expected": item["expected"],
        "right": bool(correct(answer)),
        "calls": calls,
        "failed_calls": failed,
        "ended": end == "stop",
        "said": said,
    }


def speaker(args):
    if args.base_url:
        client = connect(args.base_url, args.api_key, timeout=300)
        name = args.model or first_model(client, args.base_url)
        settings = {"temperature": 0.0, "max_tokens": args.max_new_tokens}
        return remote(client, name, settings, bool(args.open_thinking) or None), name
    names = {
        "temperature": 0.0,
        "max_new_tokens": args.max_new_tokens,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
    }
    model = eval_llm.load(args)
    settings = names | {"repetition_penalty": 1.0, "seed": 0}
    return local(model, settings, bool(args.open_thinking)), args.weight


def ask_yourself(speak, args):
    from scripts.chat_api import Printer

    history: list[dict] = []
    while True:
        try:
            question = input("💬: ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if question in ("", "/exit"):
            return None
        messages = [*recent(history, HISTORY), {"role": "user", "content": question}]
        pieces = converse(speak, messages, list(TOOLS.values()), args.rounds)
        Printer().play(pieces, lambda error: what_went_wrong(error, args))
        history = messages if len(messages) > 1 and messages[-1]["role"] != "user" else history


def what_went_wrong(error: Exception, args) -> str:
    """One sentence. An error that is a mistake of this program is raised."""
    if args.base_url:
        return explain(error, args.base_url)
    if isinstance(error, (ValueError, DataError)):  # longer than the model's context, say
        return " ".join(str(error).split())
    raise error


def main(args):
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # now, not when the work is done
    speak, name = speaker(args)
    if args.interactive:
        return ask_yourself(speak, args)
    items = read_items(args.data_path, args.num_items) if args.data_path else fixed_items()
    items = items[: args.num_items or None]
    if not items:
        raise CheckpointError(f"{args.data_path} has no questions")
    results, start = [], time.perf_counter()
    for number, item in enumerate(items, 1):
        try:
            results.append(play(speak, item, args.rounds))
        except Exception as error:
            raise CheckpointError(f"question {number}: {what_went_wrong(error, args)}") from None
        show(results[-1], number, len(items), args.verbose)
    n = len(results)
    metrics = {
        "right": sum(r["right"] for r in results) / n,
        "called": sum(r["calls"] > 0 for r in results) / n,
        "no_failed_call": sum(r["failed_calls"] == 0 for r in results) / n,
        "ended": sum(r["ended"] for r in results) / n,
    }
    seconds = time.perf_counter() - start
    print(f"\n{name}: {n} questions in {seconds:.0f} s")
    for metric, share in metrics.items():
        low, high = wilson(share, n)
        print(f"  {metric:15} {share:6.1%}   (95 %: {low:.0%} to {high:.0%})")
    if args.json:
        content = {"model": name, "metrics": metrics, "seconds": seconds, "items": results}
        temporary = args.json.with_suffix(".part")
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        temporary.replace(args.json)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson 1927): at 0 or 1 it is still one."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def show(result: dict, number: int, count: int, verbose: bool):
    said = result["said"][-1]["content"] if result["said"] else ""
    short = " ".join(said.split())[:60]
    print(
        f"{number}/{count} {'✓' if result['right'] else '✗'} {result['question'][:60]}  ->  {short}",
        flush=True,
    )
    if verbose:
        for message in result["said"]:
            print("   ", json.dumps(message, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main, parse_args)
