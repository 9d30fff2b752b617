"""What does a model know? Benchmarks, each with its 95 % interval and the score of a guesser beside it.

    python scripts/eval_benchmark.py --weight full_sft --tasks data/eval/cmmlu.jsonl,data/eval/arc_easy.jsonl
    python scripts/eval_benchmark.py --weight pretrain,full_sft,dpo --tasks data/eval --plot
    python scripts/eval_benchmark.py --tasks mmlu/test --rule letter --fewshot 5 --fewshot_path mmlu/dev
    python scripts/eval_benchmark.py --tasks gsm8k.jsonl --tools 1 --text book.txt
    python scripts/eval_benchmark.py --tasks allenai/ai2_arc:ARC-Easy:test          # from Hugging Face

Multiple choice is scored by log-likelihood: the right choice must be the likeliest continuation, counted as
it is (acc) or per character (acc_norm). Questions without choices (GSM8K) are answered by greedy decoding.
Which files: see scripts/benchmark_tasks.py. Results: a table, eval/WEIGHT_WIDTH.json in --save_dir, and a
line in eval/results.jsonl there. docs/evaluation.md says what the numbers mean.
"""

import argparse
import copy
import functools
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that this file runs from any directory

import eval_llm
from scripts import benchmark_report as report
from scripts import benchmark_tasks as tasks_of
from scripts.benchmark_tasks import DataError, Task
from trainer import cli

RULES = ("option", "letter")
STOP = ("Question:", "问题：")  # of answers to prompts without a chat template
FIGURES = {
    "choice": ("acc", "acc_norm"),
    "generation": ("acc", "ended"),
    "tools": ("right", "called", "ended"),
}


def rules(text: str) -> list[str]:
    found = list(dict.fromkeys(text.split(",")))
    if not set(found) <= set(RULES):
        raise argparse.ArgumentTypeError(f"must be option, letter or option,letter, not {text!r}")
    return found


def parse_args(argv=None):
    parser = eval_llm.Parser(
        description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    g = parser.add_argument_group("what to measure")
    g.add_argument(
        "--tasks", metavar="A,B", help="files, folders or Hugging Face data sets (NAME:SUBSET:SPLIT)"
    )
    g.add_argument("--text", metavar="A,B", help="text files: bits per byte, in windows of 512 tokens")
    g.add_argument(
        "--tools", type=cli.switch, default=0, metavar="0|1", help="1 = the questions of eval_toolcall.py too"
    )
    g.add_argument(
        "--rule",
        type=rules,
        default="option",
        metavar="RULE",
        help="option = compare the texts of the choices; letter = print the choices and compare A, B, ...; "
        "option,letter = both",
    )
    g.add_argument(
        "--fewshot", type=cli.count, default=0, metavar="N", help="solved examples before a question"
    )
    g.add_argument(
        "--fewshot_path",
        metavar="PATH",
        help="where they come from, as --tasks; without it other questions of the same subject and file",
    )
    g.add_argument(
        "--chat",
        choices=("auto", "0", "1"),
        default="auto",
        help="1 = ask in the chat format; auto = where answers are generated, unless by weights of pretrain",
    )
    g.add_argument(
        "--add_bos_token",
        type=cli.switch,
        default=0,
        metavar="0|1",
        help="1 = begin texts with the bos token, as pretraining did (lm_eval: add_bos_token=True)",
    )
    g.add_argument(
        "--num_items", type=cli.count, default=0, metavar="N", help="a fixed random choice per task, 0 = all"
    )
    g.add_argument("--max_length", type=cli.positive_int, metavar="N", help="cut longer contexts on the left")
    g.add_argument("--max_new_tokens", type=cli.positive_int, default=256, metavar="N", help="of an answer")
    g.add_argument(
        "--seed", type=cli.count, default=0, metavar="N", help="of the examples and of --num_items"
    )
    g.add_argument(
        "--skip_bad_rows", type=cli.switch, default=0, metavar="0|1", help="1 = leave malformed rows out"
    )
    g = parser.add_argument_group("what to write")
    g.add_argument("--by_subject", action="store_true", help="also print and write every subject")
    g.add_argument("--samples", type=Path, metavar="FILE", help="every item with its scores, as JSON lines")
    g.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="a picture; without FILE beside the results",
    )
    eval_llm.add_model_flags(parser)
    parser.set_defaults(dtype="float32")  # the same scores on every machine
    args = parser.parse_args(argv)
    if not (args.tasks or args.text or args.tools):
        parser.error("nothing to measure: give --tasks, --text or --tools 1")
    return args


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------


def prompts_of(native, task: Task, rule: str, chat: bool, args) -> list[str]:
    """The text before each item's answer."""
    pool = None
    if args.fewshot and args.fewshot_path:
        pool = [
            item
            for other in tasks_of.read_tasks(args.fewshot_path, bool(args.skip_bad_rows))
            for item in other.items
            if bool(item.choices) == (task.kind == "choice")
        ]
    examples = tasks_of.few_shot(task, args.fewshot, args.seed, pool)
    texts = [tasks_of.context(i, rule, task.language, e) for i, e in zip(task.items, examples)]
    if not chat:
        return texts
    return [
        native.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in texts
    ]


def chosen(task: Task, args) -> list[int]:
    """Numbers of the items that are asked."""
    every = range(len(task.items))
    if not args.num_items or args.num_items >= len(task.items):
        return list(every)
    return sorted(random.Random(args.seed).sample(every, args.num_items))


def ask_choices(native, task: Task, rule: str, args) -> tuple[list[dict], int]:
    """(one record per item, requests whose context was cut)."""
    from scripts import scoring

    chat = args.chat == "1"
    prompts, numbers = prompts_of(native, task, rule, chat, args), chosen(task, args)
    items = [task.items[i] for i in numbers]
    pairs = [
        (prompts[i], ("" if chat else " ") + text)
        for i, item in zip(numbers, items)
        for text in tasks_of.answers(item, rule)
    ]
    requests = scoring.encode_pairs(native.tokenizer, pairs, bool(args.add_bos_token))
    limit = min(args.max_length or 1 << 40, native.engine.config.max_position_embeddings)
    cut = sum(len(context) + len(continuation) - 1 > limit for context, continuation in requests)
    try:
        scores = scoring.log_likelihoods(native.engine, requests, limit, progress(f"{task.name}, {rule}"))
    except ValueError as error:
        raise DataError(f"{task.name}: {error}; give a larger --max_length, or shorter choices") from None
    scores = iter(scores)
    records = []
    for item in items:
        texts = tasks_of.answers(item, rule)
        logs = [next(scores)[0] for _ in texts]
        picks = [logs.index(max(logs)), likeliest([s / len(text) for s, text in zip(logs, texts)])]
        records.append(
            {
                "id": item.id,
                "subject": item.subject,
                "answer": item.answer,
                "log_likelihoods": logs,
                "acc": picks[0] == item.answer,
                "acc_norm": picks[1] == item.answer,
            }
        )
    return records, cut


def likeliest(values: list[float]) -> int:
    return values.index(max(values))


def ask_numbers(native, task: Task, args) -> tuple[list[dict], int]:
    """Greedy answers to questions that ask for a number."""
    chat = args.chat == "1" or (args.chat == "auto" and not native.is_base)
    prompts, numbers = prompts_of(native, task, "generate", chat, args), chosen(task, args)
    bos = [native.tokenizer.bos_token_id] if args.add_bos_token and not chat else []
    ids = [bos + native.tokenizer(prompts[i]).input_ids for i in numbers]
    limit = native.engine.config.max_position_embeddings
    room = max(min(args.max_length or limit, limit) - args.max_new_tokens, 1)
    cut = sum(len(prompt) > room for prompt in ids)
    replies, tell = [], progress(task.name)
    for start in range(0, len(ids), 128):
        replies += native.engine.generate(
            [prompt[-room:] for prompt in ids[start : start + 128]],
            native.tokenizer,
            max_new_tokens=args.max_new_tokens,
            temperature=0,
            stop=() if chat else STOP,
        )
        tell(len(replies), len(ids))
    records = []
    for item, reply in zip((task.items[i] for i in numbers), replies):
        found = tasks_of.answered_number(reply.text)
        records.append(
            {
                "id": item.id,
                "subject": item.subject,
                "answer": item.answer,
                "found": found,
                "text": reply.text,
                "acc": found == item.answer,
                "ended": reply.finish_reason != "length",
            }
        )
    return records, cut


def ask_tools(native, args) -> list[dict]:
    """The questions of scripts/eval_toolcall.py, played to the end."""
    from scripts import eval_toolcall
    from scripts.conversation import local

    settings = {"temperature": 0.0, "max_new_tokens": args.max_new_tokens, "seed": 0}
    speak, records, tell = local(native, settings), [], progress("tools")
    items = eval_toolcall.fixed_items()
    for item in items:
        said = eval_toolcall.play(speak, item, rounds=6)
        called = said["calls"] > 0
        records.append({"id": item["messages"][-1]["content"], **said, "called": called})
        tell(len(records), len(items))
    return records


def progress(name: str):
    """What prints how far a task is, on a terminal all the time, else every ten seconds."""
    start, said = time.perf_counter(), [time.perf_counter()]

    def tell(done: int, total: int):
        now, live = time.perf_counter(), sys.stderr.isatty()
        if now - said[0] < (0.2 if live else 10) and done < total:
            return
        said[0] = now
        left = (now - start) * (total - done) / done
        if live or done < total:
            end = ("\r" if done < total else "\r\x1b[K") if live else "\n"
            print(f"{name}: {done}/{total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return tell


# ------------------------------------------------------------------------------------------------------------
# The story
# ------------------------------------------------------------------------------------------------------------


def load(args, weight: str):
    """The weights as eval_llm.py loads them. Raises CheckpointError for models of other projects."""
    from trainer.checkpoint import CheckpointError

    if eval_llm.is_folder(args.load_from) and eval_llm.architecture(args.load_from) != "minimind":
        raise CheckpointError(
            f"{args.load_from} is a model of another architecture: use lm_eval --model hf, see "
            "docs/evaluation.md"
        )
    args = copy.copy(args)
    args.weight = weight
    return eval_llm.Native(args)


def describe(native, args) -> dict:
    """What a results file says before the first task."""
    from trainer import checkpoint, progress

    run = progress.describe_run(args)
    weights = {"file": checkpoint.shown(native.path), "sha256": progress.sha256_of(native.path)}
    adapters = f"+{args.lora_weight.replace(',', '+')}" if eval_llm.has_adapters(args) else ""
    return {
        "format": 1,
        "name": native.path.resolve().name.removesuffix(".pth") + adapters,
        "weights": weights | {key: native.metadata.get(key) for key in ("crc32", "stage", "parent")},
        "command": run["command"],
        "date": run["when"],
        "settings": run["args"] | {"computed_in": str(native.engine.dtype).removeprefix("torch.")},
        "commit": run["commit"],
        "versions": run["versions"],
        "tasks": [],
        "means": {},
    }


def measurements(native, tasks: list[Task], texts: dict[str, str], args):
    """Yield (entry, records) of one task after another."""
    from scripts import scoring
    from trainer.progress import sha256_of

    for task in tasks:
        for rule in args.rule if task.kind == "choice" else [None]:
            ask = ask_numbers if rule is None else functools.partial(ask_choices, rule=rule)
            records, cut = ask(native, task, args=args)
            entry = {"name": task.name + " letter" * (rule == "letter"), "file": ", ".join(task.files)}
            hashes = [sha256_of(Path(file)) for file in task.files]
            entry |= {"sha256": hashes[0] if len(hashes) == 1 else hashes, "kind": task.kind}
            entry |= report.shares(records, FIGURES[task.kind]) | {"bad_rows": task.bad_rows, "cut": cut}
            if rule:
                asked = [task.items[i] for i in chosen(task, args)]
                answers = [item.answer for item in asked]
                chance = sum(1 / len(item.choices) for item in asked) / len(asked)
                most = max(map(answers.count, set(answers))) / len(asked)
                entry |= {"rule": rule, "random": chance, "most_frequent_letter": most}
                entry["verdict"] = report.verdict(entry["intervals"]["acc_norm"], chance)
            if args.by_subject:
                entry["subjects"] = report.by_subject(records, FIGURES[task.kind])
            yield entry, records
    if args.tools:
        records = ask_tools(native, args)
        entry = {"name": "tools", "file": "scripts/eval_toolcall.py", "kind": "tools"}
        yield entry | report.shares(records, FIGURES["tools"]), records
    for file, text in texts.items():
        found = scoring.bits_per_byte(native.engine, native.tokenizer, text, progress=progress(file))
        entry = {"name": Path(file).stem, "file": file, "sha256": sha256_of(Path(file))}
        yield entry | {"kind": "bits_per_byte", "n": 1, "metrics": found, "intervals": {}}, []


def examine(native, tasks, texts, args, folder: Path) -> tuple[dict, dict]:
    """(content of the results file, records by name of the entry). What is known is printed, and written."""
    result, samples, start = describe(native, args), {}, time.perf_counter()
    for entry, records in measurements(native, tasks, texts, args):
        before = result.get("seconds", 0.0)
        result["seconds"] = round(time.perf_counter() - start, 1)
        entry["seconds"] = round(result["seconds"] - before, 1)
        result["tasks"].append(entry)
        result["means"] = report.means(result["tasks"])
        samples[entry["name"]] = records
        report.write_results(result, folder)
        print("\n".join([report.row_of(result["name"], entry), *report.subject_lines(entry)]), flush=True)
        if entry.get("cut"):
            eval_llm.say(f"{entry['name']}: {entry['cut']} contexts were cut on the left to fit the model")
    return result, samples


def read_texts(files: str | None) -> dict[str, str]:
    texts = {}
    for file in files.split(",") if files else ():
        try:
            texts[file] = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"{file} is not UTF-8: convert it, e.g. `iconv -f GB18030 -t UTF-8 IN > OUT`"
            ) from None
        if not texts[file]:
            raise DataError(f"{file} is empty")
    return texts


def read_all(args) -> list[Task]:
    tasks = []
    for source in filter(None, (args.tasks or "").split(",")):
        tasks += tasks_of.read_tasks(source, bool(args.skip_bad_rows), eval_llm.say)
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError(f'two tasks are called {twice}: rename a file, or its rows\' "benchmark"')
    return tasks


def main(args):
    from trainer.checkpoint import shown

    texts, tasks, folder = read_texts(args.text), read_all(args), args.save_dir / "eval"
    results, samples = [], []
    for weight in filter(None, args.weight.split(",")):
        native = load(args, weight)
        if not results:
            print(report.HEAD, flush=True)
        for found, everything in zip(examine(native, tasks, texts, args, folder), (results, samples)):
            everything.append(found)
    report.compare_all(results, samples)
    print("\n" + report.results_row(results) + "\n")
    for result in results:
        report.write_results(result, folder)
        report.append_row(result, folder)
        print("\n".join(report.sentences(result)))
    if args.samples:
        rows = [
            {"weights": result["name"], "task": name, **record}
            for result, found in zip(results, samples)
            for name, records in found.items()
            for record in records
        ]
        report.write(args.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if args.plot is not None:
        picture = args.plot if args.plot.name else folder / f"{'_'.join(r['name'] for r in results)}.png"
        if report.draw(results, picture):
            print(f"picture: {shown(picture)}")
    print("results: " + ", ".join(f"{shown(folder / r['name'])}.json" for r in results))


if __name__ == "__main__":
    cli.run(main, parse_args)
