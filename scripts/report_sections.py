"""Where weights come from, for scripts/report.py: its sections summary, lineage, curves, cost and stages."""

from scripts.report_lineage import (
    Stage,
    arguments,
    as_dict,
    command_to_repeat,
    data_files,
    energy_of,
    figures,
    first_sitting,
    is_number,
    real,
    total,
)
from scripts.report_page import UNKNOWN, count, duration, figure, millions, watt_hours
from scripts.report_results import HELD_OUT, headline

# ------------------------------------------------------------------------------------------------------------
# Energy and money as words
# ------------------------------------------------------------------------------------------------------------


def energy_cell(stage: Stage, watts: float | None) -> str:
    energy, source = energy_of(stage, watts)
    if energy is None:
        return source
    return watt_hours(energy) + (" (estimate)" if source == "estimate" else "")


def money(seconds: float | None, price_per_hour: float) -> str:
    if seconds is None:
        return UNKNOWN
    price = seconds / 3600 * price_per_hour
    return f"{price:,.2f}" if price >= 0.1 or not price else f"{price:.2g}"


def energy_of_all(stages: list[Stage], watts: float | None) -> tuple[str, str]:
    """(sum in words, "" when nothing is known; where the numbers come from)."""
    found = [energy_of(stage, watts) for stage in stages]
    energy, least = total([amount for amount, _ in found])
    sources = sorted({source for amount, source in found if amount is not None})
    return ("", "not available") if energy is None else (least + watt_hours(energy), " and ".join(sources))


# ------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------

COLOURS = {"verified": "good", "chosen": "good", "not verified": "plain", "origin": "plain"}


def title_of(stage: Stage) -> str:
    """Its name, and what kind of stage it is where the name does not say it."""
    return stage.name if stage.kind in (stage.name, "None") else f"{stage.name} ({stage.kind})"


def summary(stages: list[Stage], args, attention: list[str]) -> list[tuple]:
    own = stages[-1]
    seconds, least = total([stage.number("time_s") for stage in stages])
    tokens, least_tokens = total([stage.number("tokens") for stage in stages])
    energy, source = energy_of_all(stages, args.watts)
    hint = source if energy else "no counter was read; --watts gives an estimate"
    whole = all(stage.status in ("verified", "chosen") and not stage.ends for stage in stages)
    checked = "each verified by its checksum" if whole and len(stages) > 1 else began_with(stages[0])
    what = f"{'adapter' if own.is_adapter else shape(own)}"
    cards = [
        ("Parameters", millions(own.parameters), what),
        ("Stages", str(len(real(stages))), checked),
        ("Training time", least + duration(seconds), "wall clock, all stages"),
        ("Tokens", least_tokens + (millions(tokens) if tokens is not None else UNKNOWN), "read in training"),
        ("Energy", energy or source, hint),
    ]
    if args.price_per_hour is not None:
        price = least + money(seconds, args.price_per_hour)
        cards.append(("Cost", price, f"time x {args.price_per_hour:g} per hour"))
    chain = " → ".join(title_of(stage) for stage in stages)
    blocks = [("cards", cards), ("text", f"Lineage: {chain}.")]
    blocks += [("warn", sentence) for sentence in attention]
    rows = headline(stages, args)
    if rows:
        blocks += [
            ("head", "Results in short"),
            ("table", ["what", "value", "95 % interval", "source"], rows),
        ]
    return blocks


def began_with(stage: Stage) -> str:
    """The weights that a stage began with."""
    if stage.ends:
        return "incomplete: see below"
    if "parent" not in stage.metadata:
        return UNKNOWN
    parent = as_dict(stage.metadata["parent"])
    if not parent:
        return "from random weights"
    return f"from {parent.get('weight')}, step {parent.get('step')}, CRC-32 {parent.get('crc32')}"


def shape(stage: Stage) -> str:
    config = as_dict(stage.metadata.get("config"))
    if not config:
        return "architecture not recorded"
    kind = f"mixture of {config.get('num_experts')} experts" if config.get("use_moe") else "dense"
    size = f"{config.get('hidden_size')} wide, {config.get('num_hidden_layers')} layers"
    return f"{kind}, {size}, vocabulary {count(config.get('vocab_size'))}"


def attention(stages: list[Stage], benchmarks: list[str]) -> list[str]:
    """What a reader should know before believing the page."""
    found = [f"The lineage ends at {s.name}: {s.ends}." for s in stages if s.ends]
    for stage in real(stages):
        if stage.note:
            found.append(f"{stage.name}: {stage.note}.")
        if not stage.metadata.get("merged"):
            continue
        merged = f"adapters were merged in ({stage.metadata['merged']}); its figures are of before that"
        found.append(f"{stage.name}: {merged}.")
    changed = [s.name for s in real(stages) if str(first_sitting(s).get("commit")).endswith("+")]
    if changed:
        found.append(f"Trained with local changes that no commit holds: {', '.join(changed)}.")
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
    versions = as_dict(sitting.get("versions"))
    machine = [str(sitting.get(key) or "") for key in ("machine", "processor", "platform")]
    size = f"{stage.path.stat().st_size:,} bytes"
    steps = f"{metadata.get('step', UNKNOWN)} of {metadata.get('total_steps', UNKNOWN)}"
    facts = [
        ("file", f"{shown(stage.path)}, {size}"),
        ("SHA-256", stage.sha256),
        ("hashes", hashes(metadata)),
        ("weights before", "not known" if stage.ends else began_with(stage)),
        ("data", data_words(sitting)),
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
        ("machine", "; ".join(filter(None, machine)) or UNKNOWN),
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


def data_words(sitting: dict) -> str:
    data = as_dict(sitting.get("data"))
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
            blocks.append(("table", ["held out", "first", "last", "in the log"], changes))
        if not panels:
            blocks.append(("text", f"No curves: {stage.log_note or 'the log has no figure twice'}."))
    return blocks


def held_out_rows(stage: Stage) -> list[list[str]]:
    """First and last value of what was measured on held-out data."""
    rows = []
    for name, meaning in HELD_OUT.items():
        steps, values = figures(stage, name)
        if values:
            when = f" (step {steps[0]})" if steps[0] else " (before step 1)"
            first = figure(name, values[0]) + when if len(values) > 1 else ""
            rows.append([meaning, first, figure(name, values[-1]), name])
    return rows


PANELS = [  # title, label of the y axis, figures of the log
    ("Loss", "nats per token", ["loss", "val_loss", "tax_loss"]),
    ("Loss of pairs", "nats per pair", ["loss", "val_loss"]),
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
    """What is drawn of a stage: figures that were measured more than once. Preferences have a loss per pair;
    that of reinforcement learning says nothing (docs/metrics.md)."""
    rewarded, pairs = bool(figures(stage, "length")[0]), bool(figures(stage, "accuracy")[0])
    skipped = {"Loss", "Loss of pairs"} if rewarded else {"Loss"} if pairs else {"Loss of pairs"}
    if not (rewarded or pairs):
        skipped.add("Earlier stage, held out")  # it stands in the same panel as the loss
    panels = []
    for title, y, names in PANELS:
        lines = [(name, *figures(stage, name)) for name in names if title not in skipped]
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
            row.append(money(seconds, args.price_per_hour))
        rows.append(row)
    seconds, least = total([stage.number("time_s") for stage in stages])
    tokens, least_tokens = total([stage.number("tokens") for stage in stages])
    energy, source = energy_of_all(stages, args.watts)
    sum_row = ["all", "", least_tokens + count(tokens), least + duration(seconds), "", ""]
    sum_row += [f"{energy} ({source})" if "estimate" in source else energy or source]
    if args.price_per_hour is not None:
        sum_row.append(least + money(seconds, args.price_per_hour))
    words = (
        "Time is the wall clock of training, validation and saving included; tokens are those read, in "
        "reinforcement learning those of prompts and answers in updates; tokens/s is their ratio."
    )
    if any(energy_of(stage, args.watts)[1] == "counted" for stage in there):
        words += " Counted energy is that of CPU packages and GPU boards, whoever else used them."
    if any(energy_of(stage, args.watts)[1] == "estimate" for stage in there):
        words += f" An estimate is {args.watts:g} W (given by --watts) x time; nothing was measured."
    return [("table", heads, [*rows, sum_row]), ("text", words)]
