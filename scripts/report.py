"""The report card of a run: one page that says where weights come from and what they can do.

    python scripts/report.py                                # the newest weights in out/
    python scripts/report.py --weight agent --to agent.html # one file that can be mailed; or agent.md
    python scripts/report.py --save_dir out/quickstart --weight full_sft --watts 45 --price_per_hour 0.3

From the weight file it walks back to pretraining (each parent is checked by its checksum) and shows for every
stage: data, command, seed, hashes, versions, machine, time, tokens, memory, energy, curves; the results of
scripts/eval_benchmark.py (out/eval) and of scripts/quickstart.py, and answers of every stage to the same
prompts. What nobody wrote down is called not recorded. docs/report.md explains the page.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.report_lineage import (
    Stage,
    arguments,
    command_to_repeat,
    data_files,
    figures,
    first_sitting,
    folder_of,
    is_number,
    lineage,
)
from trainer import cli

UNKNOWN = "not recorded"


# ------------------------------------------------------------------------------------------------------------
# Numbers as words
# ------------------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:,.0f}"


def millions(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e5 else f"{number:,}"


def figure(name: str, value) -> str:
    """A metric as it is usually written: shares in percent, all else with four digits."""
    if not is_number(value):
        return str(value)
    plain = ("bits", "bpb", "loss", "ppl", "perplexity", "nats", "margin", "logp", "kl", "reward", "length")
    if 0 <= value <= 1 and not any(word in name for word in plain):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}"


def energy_of(stage: Stage, watts: float | None) -> tuple[float | None, str]:
    """(watt-hours, where the number comes from): counted by the hardware; or --watts x time, an estimate; or
    None."""
    joules, seconds = stage.number("energy_j"), stage.number("time_s")
    if joules is not None:
        return joules / 3600, "counted"
    if watts is not None and seconds is not None:
        return watts * seconds / 3600, "estimate"
    return None, "not available"


def watt_hours(energy: float) -> str:
    return f"{energy:.3g} Wh" if energy < 1000 else f"{energy / 1000:.3g} kWh"


def energy_cell(stage: Stage, watts: float | None) -> str:
    energy, source = energy_of(stage, watts)
    if energy is None:
        return source
    return watt_hours(energy) + (" (estimate)" if source == "estimate" else "")


def energy_of_all(stages: list[Stage], watts: float | None) -> tuple[str, str]:
    """(sum in words, "" when nothing is known; where the numbers come from)."""
    found = [energy_of(stage, watts) for stage in stages]
    energy, least = total([amount for amount, _ in found])
    sources = sorted({source for amount, source in found if amount is not None})
    return ("", "not available") if energy is None else (least + watt_hours(energy), " and ".join(sources))


def total(values: list) -> tuple[float | None, str]:
    """(sum of what is known, "at least " when something is not)."""
    known = [value for value in values if value is not None]
    return (sum(known) if known else None), ("at least " if len(known) < len(values) and known else "")


# ------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------

COLOURS = {"verified": "good", "chosen": "good", "not verified": "plain", "origin": "plain"}
HELD_OUT = {
    "val_loss": "held-out loss, nats per token (lower is better)",
    "val_bpb": "held-out bits per byte (lower is better)",
    "val_pass1": "unseen prompts solved by the likeliest answer",
    "val_pass4": "unseen prompts solved by one of the samples",
    "val_reward": "reward on unseen prompts",
    "val_accuracy": "unseen pairs: the better answer is preferred",
    "val_agreement": "unseen answers: the likeliest token is the teacher's",
    "tax_loss": "loss on an earlier stage's held-out conversations (what rises is the price)",
    "val_ended": "answers to unseen prompts that end by themselves",
}


def real(stages: list[Stage]) -> list[Stage]:
    """The stages whose weights are there."""
    return [stage for stage in stages if stage.path is not None]


def title_of(stage: Stage) -> str:
    """Its name, and what kind of stage it is where the name does not say it."""
    return stage.name if stage.kind in (stage.name, "None") else f"{stage.name} ({stage.kind})"


def summary(stages: list[Stage], args, attention: list[str]) -> list[tuple]:
    own, there = stages[-1], real(stages)
    seconds, least = total([stage.number("time_s") for stage in there])
    tokens, least_tokens = total([stage.number("tokens") for stage in there])
    energy, source = energy_of_all(there, args.watts)
    hint = source if energy else "no counter was read; --watts gives an estimate"
    broken = [s for s in stages if s.ends and s.status != "origin"]
    checked = "verified by checksum" if not broken else "incomplete: see below"
    what = f"{'adapter' if own.is_adapter else shape(own)}"
    cards = [
        ("Parameters", millions(own.parameters), what),
        ("Stages", str(len(there)), checked),
        ("Training time", least + duration(seconds), "wall clock, all stages"),
        ("Tokens", least_tokens + (millions(tokens) if tokens is not None else UNKNOWN), "read in training"),
        ("Energy", energy or source, hint),
    ]
    if args.price_per_hour is not None:
        money = UNKNOWN if seconds is None else f"{least}{seconds / 3600 * args.price_per_hour:.2f}"
        cards.append(("Cost", money, f"time x {args.price_per_hour:g} per hour"))
    chain = " → ".join(title_of(stage) for stage in stages)
    blocks = [("cards", cards), ("text", f"Lineage: {chain}.")]
    blocks += [("warn", sentence) for sentence in attention]
    best = best_numbers(stages, args)
    if best:
        blocks += [("head", "Best numbers"), ("table", ["what", "value", "95 % interval", "source"], best)]
    return blocks


def shape(stage: Stage) -> str:
    config = stage.metadata.get("config") or {}
    if not config:
        return "architecture not recorded"
    kind = f"mixture of {config.get('num_experts')} experts" if config.get("use_moe") else "dense"
    size = f"{config.get('hidden_size')} wide, {config.get('num_hidden_layers')} layers"
    return f"{kind}, {size}, vocabulary {count(config.get('vocab_size'))}"


def best_numbers(stages: list[Stage], args) -> list[list[str]]:
    """Rows for the summary: benchmarks of the weights themselves, then what their own log held out."""
    from scripts.quickstart import NAMES

    own, rows = stages[-1], []
    for task in benchmark(own, args.save_dir)[0]:
        for metric, value in list(task["metrics"].items())[:1]:
            where = f"benchmark, n = {task.get('n', '?')}"
            rows.append([f"{task['name']}, {metric}", figure(metric, value), bounds(task, metric), where])
    exams = exams_of(own)
    for name, value in exams.get("metrics", {}).items():
        if is_number(value):
            margin = (exams.get("intervals") or {}).get(name)
            around = f"± {100 * margin:.1f}" if is_number(margin) else ""
            rows.append([NAMES.get(name, name), figure(name, value), around, "exam of the curriculum"])
    for name, meaning in HELD_OUT.items():
        value = own.number(name)
        if value is not None and name.startswith("val_"):
            rows.append([meaning, figure(name, value), "", f"log of {own.name}, {name}"])
    return rows[:8]


def attention(stages: list[Stage], benchmarks: list[str]) -> list[str]:
    """What a reader should know before believing the page."""
    found = [f"The lineage ends at {s.name}: {s.ends}." for s in stages if s.ends]
    for stage in real(stages):
        if stage.note:
            found.append(f"{stage.name}: {stage.note}.")
        if str(first_sitting(stage).get("commit")).endswith("+"):
            found.append(f"{stage.name} was trained with local changes that its commit does not hold.")
        if not stage.metadata.get("merged"):
            continue
        found.append(
            f"{stage.name}: adapters were merged in ({stage.metadata['merged']}); its figures are older."
        )
    return found + benchmarks


def chain_block(stages: list[Stage]) -> tuple:
    boxes = []
    for stage, child in zip(stages, [*stages[1:], None]):
        if stage.path is None:
            about = [stage.status]
        else:
            about = [f"{millions(stage.parameters)} parameters", f"{count(stage.number('tokens'))} tokens"]
            about += [duration(stage.number("time_s"))]
        link = (stage.status, COLOURS.get(stage.status, "bad")) if child else None
        boxes.append((title_of(stage), about, link))
    return ("chain", boxes)


def lineage_blocks(stages: list[Stage]) -> list[tuple]:
    rows = [
        [
            title_of(s),
            s.path.name if s.path else UNKNOWN,
            (s.status, COLOURS.get(s.status, "bad")),
            s.sha256[:16],
        ]
        + [str(s.metadata.get("crc32", "")), str(s.metadata.get("step", ""))]
        for s in stages
    ]
    words = (
        "Each stage wrote down name and checksum of the weights it began with. Verified: the content of the "
        "file fits its own checksum, and that is the one which the next stage recorded."
    )
    heads = ["stage", "file", "checked", "SHA-256 (begin)", "CRC-32", "step"]
    return [chain_block(stages), ("text", words), ("table", heads, rows)]


def stage_blocks(stage: Stage, args) -> list[tuple]:
    from trainer.checkpoint import shown

    blocks = [("head", f"{title_of(stage)}: {stage.path.name}" if stage.path else title_of(stage))]
    if stage.path is None:
        return [*blocks, ("warn", f"{stage.ends}.")]
    sitting, metadata = first_sitting(stage), stage.metadata
    versions = sitting.get("versions") if isinstance(sitting.get("versions"), dict) else {}
    size = f"{stage.path.stat().st_size:,} bytes"
    steps = f"{metadata.get('step', UNKNOWN)} of {metadata.get('total_steps', UNKNOWN)}"
    facts = [
        ("file", f"{shown(stage.path)}, {size}"),
        ("SHA-256", stage.sha256),
        ("hashes", hashes(metadata)),
        ("data", data_words(sitting, metadata)),
    ]
    for path, digest, state in data_files(stage):
        facts.append((f"  {path}", f"{state}{f', SHA-256 {digest}' if digest else ''}"))
    facts += [
        ("seed", metadata.get("seed", UNKNOWN)),
        ("steps", steps),
        ("settings", settings(arguments(stage)) or UNKNOWN),
        ("began", moments(stage)),
        ("commit", sitting.get("commit") or UNKNOWN),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) or UNKNOWN),
        (
            "machine",
            "; ".join(str(sitting[k]) for k in ("machine", "processor", "platform") if sitting.get(k)),
        )
        if sitting.get("machine")
        else ("machine", str(sitting.get("platform") or UNKNOWN)),
        ("log", f"{shown(stage.log)}{stage.log_note}" if stage.log else stage.log_note),
    ]
    blocks.append(("facts", facts))
    command = command_to_repeat(stage)
    if command is None:
        blocks.append(("text", f"Command: {UNKNOWN}."))
    else:
        folder = sitting.get("folder")
        where = f" (in the folder {folder})" if folder else " (from the folder it was typed in)"
        blocks += [("text", f"To repeat it{where}:"), ("code", command)]
    return blocks


def hashes(metadata: dict) -> str:
    names = {
        "crc32": "CRC-32",
        "tokenizer": "tokenizer",
        "template": "chat template",
        "data": "training rows",
    }
    return ", ".join(f"{word} {metadata[key]}" for key, word in names.items() if metadata.get(key)) or UNKNOWN


def data_words(sitting: dict, metadata: dict) -> str:
    data = sitting.get("data") if isinstance(sitting.get("data"), dict) else {}
    if not is_number(data.get("rows")):
        return f"rows and tokens of the files: {UNKNOWN}"
    return f"{data['rows']:,} {data.get('unit', 'rows')}, {count(data.get('tokens'))} tokens"


def settings(found: dict) -> str:
    """The flags that decide most; all of them stand in the log."""
    names = (
        "batch_size accumulation_steps max_seq_len epochs max_steps optimizer learning_rate muon_lr schedule"
    )
    names += " loss_type beta num_generations reward reward_model_path from_teacher_weight lora_rank"
    return ", ".join(f"{n} {found[n]}" for n in names.split() if found.get(n) not in (None, ""))


def moments(stage: Stage) -> str:
    times = [str(s["when"]) for s in stage.sittings if s.get("when")]
    if not times:
        return UNKNOWN
    resumed = [f"resumed at step {s.get('step')}, {s.get('when')}" for s in stage.sittings[1:]]
    return "; ".join([times[0], *resumed])


def curve_blocks(stages: list[Stage]) -> list[tuple]:
    """Curves of every stage, and what it did to the figures that were measured on held-out data."""
    blocks = []
    for stage in real(stages):
        blocks.append(("head", title_of(stage)))
        panels, changes = panels_of(stage), held_out_rows(stage)
        blocks += [("curves", stage.name, panels)] if panels else []
        if changes:
            blocks.append(("table", ["held out", "before", "after", "in the log"], changes))
        if not panels:
            blocks.append(("text", f"No curves: {stage.log_note or 'the log has no figure twice'}."))
    return blocks


def held_out_rows(stage: Stage) -> list[list[str]]:
    """First and last value of what was measured on held-out data."""
    rows = []
    for name, meaning in HELD_OUT.items():
        steps, values = figures(stage, name)
        if values:
            before = figure(name, values[0]) if len(values) > 1 and steps[0] < steps[-1] else ""
            rows.append([meaning, before, figure(name, values[-1]), name])
    return rows


PANELS = [  # title, label of the y axis, figures of the log
    ("Loss", "nats per token", ["loss", "val_loss", "tax_loss"]),
    ("Bits per byte, held out", "bits per byte", ["val_bpb"]),
    ("Reward", "reward", ["reward", "val_reward"]),
    ("Success", "share of answers", ["success", "val_pass1", "val_pass4"]),
    ("Pairs", "share preferred rightly", ["accuracy", "val_accuracy"]),
    ("Margin", "reward", ["margin", "val_margin"]),
    ("Distance from the start", "KL, nats per token", ["kl", "val_kl"]),
    ("Length of answers", "tokens", ["length", "val_length"]),
    ("Earlier stage, held out", "nats per token", ["tax_loss"]),
    ("Entropy", "nats per token", ["entropy"]),
    ("Learning rate", "per step", ["lr"]),
]


def panels_of(stage: Stage) -> list[tuple]:
    """What is drawn of a stage: figures that were measured more than once. The loss of reinforcement learning
    says nothing (docs/metrics.md)."""
    rewarded = bool(figures(stage, "length")[0])
    panels = []
    for title, y, names in PANELS:
        if rewarded == (title == "Loss") and title in ("Loss", "Earlier stage, held out"):
            continue
        lines = [(name, *figures(stage, name)) for name in names]
        lines = [line for line in lines if line[1]]
        if any(len(line[1]) > 1 for line in lines):
            panels.append((title, "step (rollout)" if rewarded else "optimizer step", y, lines))
    return panels[:6]


def cost_blocks(stages: list[Stage], args) -> list[tuple]:
    heads = ["stage", "steps", "tokens", "time", "tokens/s", "peak memory", "energy"]
    heads += ["cost"] if args.price_per_hour is not None else []
    rows, there = [], real(stages)
    for stage in there:
        seconds, tokens, memory = (stage.number(name) for name in ("time_s", "tokens", "memory_gb"))
        rate = f"{tokens / seconds:,.0f}" if tokens is not None and seconds else UNKNOWN
        row = [stage.name, str(stage.metadata.get("step", UNKNOWN)), count(tokens), duration(seconds), rate]
        row += [UNKNOWN if memory is None else f"{memory:.2f} GB", energy_cell(stage, args.watts)]
        if args.price_per_hour is not None:
            row.append(UNKNOWN if seconds is None else f"{seconds / 3600 * args.price_per_hour:.2f}")
        rows.append(row)
    seconds, least = total([stage.number("time_s") for stage in there])
    tokens, least_tokens = total([stage.number("tokens") for stage in there])
    energy, source = energy_of_all(there, args.watts)
    sum_row = ["all", "", least_tokens + count(tokens), least + duration(seconds), "", ""]
    sum_row += [f"{energy} ({source})" if "estimate" in source else energy or source]
    if args.price_per_hour is not None:
        sum_row.append(UNKNOWN if seconds is None else f"{least}{seconds / 3600 * args.price_per_hour:.2f}")
    words = (
        "Time is the wall clock of training, validation and saving included; tokens are those read, in "
        "reinforcement learning those of prompts and answers in updates; tokens/s is their ratio."
    )
    if any(energy_of(stage, args.watts)[1] == "counted" for stage in there):
        words += " Counted energy is that of CPU packages and GPU boards, whoever else used them."
    if any(energy_of(stage, args.watts)[1] == "estimate" for stage in there):
        words += f" An estimate is {args.watts:g} W (given by --watts) x time; nothing was measured."
    return [("table", heads, [*rows, sum_row]), ("text", words)]


# ------------------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------------------


def read_json(path: Path):
    """The content of a JSON file; None when there is none, or it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def benchmark(stage: Stage, save_dir: Path) -> tuple[list[dict], str]:
    """(tasks, sentence about them) of the results file of a stage: tasks have at least a name and metrics."""
    from trainer.checkpoint import shown

    if stage.path is None:
        return [], ""
    path = Path(save_dir) / "eval" / f"{stage.path.stem}.json"
    found = read_json(path)
    if not isinstance(found, dict):
        return [], f"{shown(path)} cannot be read." if path.exists() else ""
    tasks = []
    for task in found.get("tasks") if isinstance(found.get("tasks"), list) else []:
        if isinstance(task, dict) and isinstance(task.get("metrics"), dict):
            metrics = {str(k): v for k, v in task["metrics"].items() if is_number(v)}
            tasks.append({**task, "name": str(task.get("name", "unnamed")), "metrics": metrics})
    weights = found.get("weights") if isinstance(found.get("weights"), dict) else {}
    recorded = weights.get("sha256")
    if tasks and recorded != stage.sha256:
        which = "other weights" if recorded else "weights that the file does not name by a hash"
        return tasks, f"{shown(path)} was measured on {which}, not on {stage.path.name} as it is now."
    return tasks, ""


def bounds(task: dict, metric: str) -> str:
    intervals = task.get("intervals") if isinstance(task.get("intervals"), dict) else {}
    pair = intervals.get(metric)
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
        commands = [read_json(Path(args.save_dir) / "eval" / f"{s.path.stem}.json") for s, *_ in shown_stages]
        for command in dict.fromkeys(str(c["command"]) for c in commands if c.get("command")):
            blocks.append(("code", command))
    blocks += [("warn", note) for _, _, note in there if note]
    return [*blocks, *exam_blocks(stages), *ledger_blocks(stages)]


def exams_of(stage: Stage) -> dict:
    """What scripts/eval_mini.py found, where quickstart.py left it: NAME_eval.json; {} when there is none."""
    found = read_json(folder_of(stage.path) / f"{stage.name}_eval.json")
    return found if isinstance(found, dict) and isinstance(found.get("metrics"), dict) else {}


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
            margin, items = ((found.get(k) or {}).get(name) for k in ("intervals", "items"))
            text = figure(name, value) if is_number(value) else "–"
            text += f" ± {100 * margin:.1f}" if is_number(margin) and is_number(value) else ""
            row.append(text + (f" (n = {items})" if is_number(items) and is_number(value) else ""))
        rows.append(row)
    words = (
        "Held-out exams of the embedded curriculum (scripts/eval_mini.py), ± half of the 95 % interval. "
        "These results name the weights by their name alone, not by a hash."
    )
    return [("head", "Exams"), ("text", words), ("table", ["exam", *(name for name, _ in columns)], rows)]


def ledger_blocks(stages: list[Stage]) -> list[tuple]:
    """What every stage of the lineage gained, of quickstart.py's ledger.json."""
    from scripts.quickstart import NAMES

    there = real(stages)
    ledger = read_json(folder_of(there[-1].path) / "ledger.json")
    entries = ledger.get("rows") if isinstance(ledger, dict) else None
    names, rows = [stage.name for stage in there], []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("stage") in names:
            metric = str(entry.get("metric"))
            price = "price: " if entry.get("cost") else ""
            values = [figure(metric, entry.get(key)) for key in ("before", "after")]
            items = entry.get("items")
            rows.append([entry["stage"], price + NAMES.get(metric, metric), *values, str(items or "")])
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

    base = stage.path
    if stage.is_adapter:
        base = stage.base
    flags = SimpleNamespace(weight=str(base), load_from=ROOT / "model", num_hidden_layers=None, use_compile=0)
    flags.lora_weight = stage.name if stage.is_adapter else "None"
    flags.inference_rope_scaling, flags.device, flags.dtype = 0, args.device, "float32"
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
    return [one.text.strip() + ("" if one.finish_reason == "eos" else " […]") for one in found]


def answer_blocks(stages: list[Stage], args) -> list[tuple]:
    import eval_llm

    there = real(stages)
    prompts = args.prompt or list(eval_llm.CHAT_PROMPTS)[: args.samples]
    for stage, before in zip(there, [None, *there]):
        stage.base = before.path if before else None
    columns = []
    for stage in there:
        print(f"answers of {stage.name} to {len(prompts)} prompts", flush=True)
        if stage.is_adapter and stage.base is None:
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


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------


def sections_of(stages: list[Stage], args) -> list[tuple]:
    results = benchmark_blocks(stages, args)
    notes = [words for kind, words, *_ in results if kind == "warn"]
    has_benchmark = any(benchmark(stage, args.save_dir)[0] for stage in stages)
    none = (
        "No benchmark results: scripts/eval_benchmark.py writes them to the folder eval beside the weights."
    )
    sections = [
        ("Summary", summary(stages, args, attention(stages, notes))),
        ("Lineage", lineage_blocks(stages)),
        ("Results", results if has_benchmark else [("text", none), *results]),
        ("Curves", curve_blocks(stages)),
    ]
    if args.samples or args.prompt:
        sections.append(("Answers before and after each stage", answer_blocks(stages, args)))
    sections.append(("Cost", cost_blocks(stages, args)))
    sections.append(("Stages", [block for stage in stages for block in stage_blocks(stage, args)]))
    return sections


def find(args) -> Path:
    """The weight file of the flags; without --weight the newest one. Raises CheckpointError."""
    import eval_llm
    from trainer.checkpoint import CheckpointError, shown

    if args.weight is None:
        files = sorted(args.save_dir.glob("*_*.pth"), key=lambda p: p.stat().st_mtime)
        if not files:
            raise CheckpointError(
                f"there are no weights in {shown(args.save_dir)}: train some, or give --save_dir"
            )
        return files[-1]
    adapters = args.save_dir / "lora"
    if args.weight.startswith("lora") and not list(args.save_dir.glob(f"{args.weight}_*.pth")):
        if list(adapters.glob(f"{args.weight}_*.pth")):
            args = argparse.Namespace(**{**vars(args), "save_dir": adapters})
    return eval_llm.find_weights(args)


def write_whole(path: Path, content: bytes):
    """Beside its place, then renamed: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_pages(stages: list[Stage], sections: list[tuple], places: list[Path]):
    from scripts import report_page
    from trainer.checkpoint import shown

    own = stages[-1]
    title = f"Report card: {own.name}"
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    subtitle = f"{own.path.name} · {shape(own)} · {when}"
    footer = "Written by scripts/report.py from the weights, logs and results themselves; see docs/report.md."
    for place in places:
        if place.suffix == ".html":
            text = report_page.html(title, subtitle, sections, footer)
        else:
            folder = f"{place.stem}_pictures"
            text, pictures = report_page.markdown(title, subtitle, sections, footer, folder)
            for name, picture in pictures.items():
                write_whole(place.with_name(folder) / name, picture)
        write_whole(place, text.encode("utf-8", errors="replace"))  # a log may hold half a character
        print(f"wrote {shown(place)}")


def page(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".html", ".md"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither with .html nor with .md")
    return path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--weight", metavar="NAME", help="name of the weights or adapter, or a .pth file; default: the newest"
    )
    add(
        "--save_dir",
        "--out_dir",
        type=Path,
        default=ROOT / "out",
        metavar="DIR",
        help="folder of the weights",
    )
    add("--hidden_size", type=cli.positive_int, metavar="N", help="width, where there are several")
    add("--use_moe", type=cli.switch, metavar="0|1", help="1 = the _moe file, 0 = the dense one")
    add("--to", type=page, metavar="FILE", help="report.html or report.md; default: both in DIR/report")
    add(
        "--samples",
        type=cli.count,
        default=8,
        metavar="N",
        help="fixed prompts to answer, 0 = none (default: 8)",
    )
    add("--prompt", action="append", metavar="TEXT", help="answer this instead; may be given several times")
    add("--max_new_tokens", type=cli.positive_int, default=96, metavar="N", help="of an answer (default: 96)")
    add("--open_thinking", type=cli.switch, default=0, metavar="0|1", help="1 = answers begin with thoughts")
    add(
        "--watts",
        type=cli.positive_float,
        metavar="W",
        help="power of the machine, for an estimate of energy",
    )
    add(
        "--price_per_hour",
        type=cli.non_negative_float,
        metavar="X",
        help="price of the machine, in any currency",
    )
    add("--device", default="auto", help="of the answers: auto, cuda, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    args.preset = None  # eval_llm.py's find_weights asks for it
    return args


def main(args):
    path = find(args)
    print(f"reading {path.name} and the stages before it", flush=True)
    stages = lineage(path)
    for stage in stages:
        print(f"  {stage.name}: {stage.ends or stage.status}", flush=True)
    args.save_dir = folder = folder_of(path)  # of a .pth file, too
    places = [args.to] if args.to else [folder / "report" / f"{path.stem}{end}" for end in (".html", ".md")]
    write_pages(stages, sections_of(stages, args), places)


if __name__ == "__main__":
    cli.run(main, parse_args)
