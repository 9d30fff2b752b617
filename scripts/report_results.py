"""What the stages of a lineage can do, for scripts/report.py: benchmarks, exams, answers to equal prompts."""

import json
from pathlib import Path
from types import SimpleNamespace

from scripts.report_lineage import ROOT, Stage, as_dict, folder_of, is_number, real
from scripts.report_page import figure

HELD_OUT = {
    "val_loss": "held-out loss (lower is better)",
    "val_bpb": "held-out bits per byte (lower is better)",
    "val_pass1": "unseen prompts solved by the likeliest answer",
    "val_pass4": "unseen prompts solved by one of the samples",
    "val_reward": "reward on unseen prompts",
    "val_accuracy": "unseen pairs: the better answer is preferred",
    "val_agreement": "unseen answers: the likeliest token is the teacher's",
    "tax_loss": "loss on an earlier stage's held-out conversations (what rises is the price)",
    "val_ended": "answers to unseen prompts that end by themselves",
}


def headline(stages: list[Stage], args) -> list[list[str]]:
    """Rows for the summary: benchmarks of the weights themselves, then what their own log held out."""
    from scripts.quickstart import NAMES

    own, rows = stages[-1], []
    for task in benchmark(own, args.save_dir)[0]:
        for metric, value in list(task["metrics"].items())[:1]:
            where = f"benchmark, n = {task.get('n', '?')}"
            rows.append([f"{task['name']}, {metric}", figure(metric, value), bounds(task, metric), where])
    exams, taught = exams_of(own), [entry.get("metric") for entry in ledger_of([own])]
    for name, value in exams.get("metrics", {}).items():
        if is_number(value) and (not taught or name in taught):
            around, items = margin_of(exams, name)
            where = "exam of the curriculum" + items
            rows.append([NAMES.get(name, name), figure(name, value), around, where])
    for name, meaning in HELD_OUT.items():
        value = own.number(name)
        if value is not None and name.startswith("val_"):
            rows.append([meaning, figure(name, value), "", f"log of {own.name}, {name}"])
    return rows[:8]


# ------------------------------------------------------------------------------------------------------------
# Benchmarks
# ------------------------------------------------------------------------------------------------------------


def read_json(path: Path):
    """The content of a JSON file; None when there is none, or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def results_file(stage: Stage, save_dir: Path) -> Path:
    """Where eval_benchmark.py writes: eval/full_sft_512.json, of an adapter eval/full_sft_512+lora_x.json."""
    base = stage.before
    name = f"{base.path.stem}+{stage.name}" if stage.is_adapter and base else stage.path.stem
    return Path(save_dir) / "eval" / f"{name}.json"


def benchmark(stage: Stage, save_dir: Path) -> tuple[list[dict], str]:
    """(tasks, sentence about them) of the results file of a stage: tasks have at least a name and metrics."""
    from trainer.checkpoint import shown

    if stage.path is None:
        return [], ""
    path = results_file(stage, save_dir)
    found = read_json(path)
    if not isinstance(found, dict):
        return [], f"{shown(path)} cannot be read." if path.exists() else ""
    tasks = []
    for task in found.get("tasks") if isinstance(found.get("tasks"), list) else []:
        if isinstance(task, dict) and isinstance(task.get("metrics"), dict):
            metrics = {str(k): v for k, v in task["metrics"].items() if is_number(v)}
            tasks.append({**task, "name": str(task.get("name", "unnamed")), "metrics": metrics})
    recorded = as_dict(found.get("weights")).get("sha256")
    measured = stage.before if stage.is_adapter and stage.before else stage  # adapters have no hash there
    if tasks and recorded != measured.sha256:
        which = "other weights" if recorded else "weights that the file does not name by a hash"
        return tasks, f"{shown(path)} was measured on {which}, not on {measured.path.name} as it is now."
    return tasks, ""


def bounds(task: dict, metric: str) -> str:
    pair = as_dict(task.get("intervals")).get(metric)
    if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))):
        return ""
    return f"{figure(metric, pair[0])} – {figure(metric, pair[1])}"


def benchmark_blocks(stages: list[Stage], args) -> list[tuple]:
    """One row per task and metric, one column per stage."""
    there = [(stage, *benchmark(stage, args.save_dir)) for stage in real(stages)]
    shown_stages = [(stage, tasks, note) for stage, tasks, note in there if tasks]
    keys: dict = {}
    for _, tasks, _ in shown_stages:
        for task in tasks:
            for metric in task["metrics"]:
                keys.setdefault((task["name"], metric), task)
    rows = []
    for (name, metric), first in keys.items():
        chance = first.get("random")
        row = [
            f"{name}, {metric}",
            str(first.get("n", "")),
            figure(metric, chance) if is_number(chance) else "",
        ]
        for _, tasks, note in shown_stages:
            task = next((t for t in tasks if t["name"] == name and metric in t["metrics"]), None)
            if task is None:
                row.append("–")
                continue
            interval = bounds(task, metric)
            text = figure(metric, task["metrics"][metric]) + (f" [{interval}]" if interval else "")
            text += "" if task.get("n") == first.get("n") else f", n = {task.get('n')}"
            row.append(text + (" (other weights)" if note else ""))
        rows.append(row)
    blocks = []
    if rows:
        heads = ["task, metric", "n", "by chance", *(stage.name for stage, *_ in shown_stages)]
        blocks = [("text", "In brackets the 95 % interval."), ("table", heads, rows)]
        commands = [read_json(results_file(stage, args.save_dir)) for stage, *_ in shown_stages]
        for command in dict.fromkeys(str(c["command"]) for c in commands if c.get("command")):
            blocks.append(("code", command))
    blocks += [("warn", note) for _, _, note in there if note]
    return [*blocks, *exam_blocks(stages), *ledger_blocks(stages)]


# ------------------------------------------------------------------------------------------------------------
# What the quickstart left
# ------------------------------------------------------------------------------------------------------------


def exams_of(stage: Stage) -> dict:
    """What scripts/eval_mini.py found, where quickstart.py left it: NAME_eval.json; {} when there is none."""
    found = read_json(folder_of(stage.path) / f"{stage.name}_eval.json")
    return found if isinstance(found, dict) and isinstance(found.get("metrics"), dict) else {}


def margin_of(exams: dict, name: str) -> tuple[str, str]:
    """("± 1.3", ", n = 600") of an exam; empty where it was not written down."""
    margin, items = (as_dict(exams.get(key)).get(name) for key in ("intervals", "items"))
    words = f"± {100 * margin:.1f}" if is_number(margin) else ""
    return words, f", n = {items}" if is_number(items) else ""


def exam_blocks(stages: list[Stage]) -> list[tuple]:
    """One row per exam of the quickstart, one column per stage."""
    from scripts.quickstart import NAMES

    columns = [(stage.name, found) for stage in real(stages) if (found := exams_of(stage))]
    if not columns:
        return []
    rows = []
    for name in dict.fromkeys(name for _, found in columns for name in found["metrics"]):
        row = [NAMES.get(name, name)]
        for _, found in columns:
            value = found["metrics"].get(name)
            around, items = margin_of(found, name)
            row.append(f"{figure(name, value)} {around}{items}" if is_number(value) else "–")
        rows.append(row)
    words = (
        "Held-out exams of the embedded curriculum (scripts/eval_mini.py), ± half of the 95 % interval. "
        "These results name the weights by their name alone, not by a hash."
    )
    return [("head", "Exams"), ("text", words), ("table", ["exam", *(name for name, _ in columns)], rows)]


def ledger_of(stages: list[Stage]) -> list[dict]:
    """The rows of these stages in quickstart.py's ledger.json; [] when there is none."""
    rows = as_dict(read_json(folder_of(stages[-1].path) / "ledger.json")).get("rows")
    names = [stage.name for stage in stages]
    return (
        [r for r in rows if isinstance(r, dict) and r.get("stage") in names] if isinstance(rows, list) else []
    )


def ledger_blocks(stages: list[Stage]) -> list[tuple]:
    """What every stage of the lineage gained, and what it cost the earlier ones."""
    from scripts.quickstart import NAMES

    rows = []
    for entry in ledger_of(real(stages)):
        metric = str(entry.get("metric"))
        price = "price: " if entry.get("cost") else ""
        values = [figure(metric, entry.get(key)) for key in ("before", "after")]
        rows.append(
            [entry["stage"], price + NAMES.get(metric, metric), *values, str(entry.get("items") or "")]
        )
    if not rows:
        return []
    heads = ["stage", "held-out metric", "before", "after", "items"]
    return [("head", "Gain ledger of the quickstart"), ("table", heads, rows)]


# ------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------


def load_stage(stage: Stage, args):
    """The model of a stage as eval_llm.py loads it; an adapter is added to the stage before it."""
    import eval_llm

    base = stage.before.path if stage.is_adapter else stage.path
    flags = SimpleNamespace(weight=str(base), load_from=ROOT / "model", num_hidden_layers=None, use_compile=0)
    flags.lora_weight = stage.name if stage.is_adapter else "None"
    flags.inference_rope_scaling, flags.yarn_factor = 0, None
    flags.device, flags.dtype = args.device, "float32"
    return eval_llm.Native(flags)


def answers_of(stage: Stage, prompts: list[str], args) -> list[str]:
    """The likeliest answer to every prompt, or the same sentence for all when there can be none."""
    from dataset.lm_dataset import DataError
    from trainer.checkpoint import CheckpointError

    if stage.kind == "reward":
        return ["(a reward model: it gives a number, not a text)"] * len(prompts)
    try:
        model = load_stage(stage, args)
        ids = [model.encode([{"role": "user", "content": p}], bool(args.open_thinking)) for p in prompts]
        settings = {"max_new_tokens": args.max_new_tokens, "temperature": 0, "seed": 0}
        found = model.engine.generate(ids, tokenizer=model.tokenizer, **settings)
    except (CheckpointError, DataError, ValueError) as error:
        return [f"(no answer: {' '.join(str(error).split())})"] * len(prompts)
    return [
        (one.text.strip() or "(nothing)") + ("" if one.finish_reason == "eos" else " […]") for one in found
    ]


def answer_blocks(stages: list[Stage], args) -> list[tuple]:
    import eval_llm

    there = real(stages)
    prompts = args.prompt or list(eval_llm.CHAT_PROMPTS)[: args.samples]
    columns = []
    for stage in there:
        print(f"answers of {stage.name} to {len(prompts)} prompts", flush=True)
        if stage.is_adapter and stage.before is None:
            columns.append(["(an adapter whose base is not there)"] * len(prompts))
        else:
            columns.append(answers_of(stage, prompts, args))
    rows = [[prompt, *(column[i] for column in columns)] for i, prompt in enumerate(prompts)]
    words = (
        f"The likeliest answer of every stage (greedy: no seed matters; at most {args.max_new_tokens} "
        "tokens, […] = cut). Pretrained weights go on with the text, all others answer in the chat format."
    )
    blocks = [("text", words), ("answers", ["prompt", *(stage.name for stage in there)], rows)]
    base = next((s for s in there if s.kind == "pretrain" or s.name.startswith("pretrain")), None)
    if base is not None and not args.prompt:
        texts = list(eval_llm.TEXT_PROMPTS)[: args.samples]
        continued = answers_of(base, texts, args)
        rows = [[text, answer] for text, answer in zip(texts, continued)]
        blocks += [
            ("head", "Texts that the pretrained weights continue"),
            ("answers", ["text", base.name], rows),
        ]
    return blocks
