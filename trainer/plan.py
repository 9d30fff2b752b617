"""`--plan`: what a run needs, found by beginning it and throwing the beginning away.

The process does everything that the run would do, by the same code: it reads data and weights, makes steps on
the run's own batches until their time is steady, and the one with the most tokens; then it validates, saves
and draws the curve, into a folder that is removed again. So the peak of memory is a measurement, and time is
how long each part took, times how often the run does it. What cannot be seen in a few steps is not in it:
answers that grow longer or shorter while a policy learns, and other programs on the machine.

Nothing is written to --save_dir or --checkpoint_dir. The token cache and the embedded curriculum are, where
they were missing: the run needs them, and their time is not counted.

`show` is all that others call (loop.Run.fit does); it knows no stage.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from trainer import batches, checkpoint, progress, runtime

STEADY_SECONDS = 10  # of steps behind the first one
SLOW_SECONDS = 30  # of so slow steps two are enough
SCAN_SECONDS = 3  # to look for the largest batch of the run


@dataclass
class Rehearsal:
    """What was measured; seconds, bytes, and GB where it says so."""

    start_up: float  # from the start of the process to the first validation or step
    first: float  # validation before the first step, where the stage has one
    steps: list  # (seconds, tokens of a micro-batch times their number, tokens that are no padding) of each
    slots: float | None  # mean of the second of these over the whole run; None: all alike, or unknown
    validation: float
    save: float
    end: float
    peak_gb: float | None
    weights_bytes: int
    resume_bytes: int
    compiled: float  # compiling that the run will find done; in none of the above


def show(run, model, optimizers, make, validate, before, undo, extra):
    """Rehearse the run (loop.Run.fit has the same arguments) and print what it needs. All processes call it;
    what is printed is of the first one."""
    args, rt = run.args, run.rt
    tokens = batches.micro_rows(args, rt.world_size) * run.train.tokens_per_row
    parts = progress.memory_parts(model, args, rt, tokens) | {"others": run.other_bytes}
    room = room_gb(rt)
    fits = room is None or sum(parts.values()) / 1e9 <= room
    found, ran_out = None, False
    if not runtime.total(int(not fits), rt):
        try:
            found = rehearse(run, model, optimizers, make, validate, before and not run.saved, undo, extra)
        except Exception as error:
            if not runtime.is_out_of_memory(error) or rt.world_size > 1:
                raise
            ran_out = True
    if rt.is_main:
        print("\n".join(report(run, model, parts, room, found, ran_out)), flush=True)


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def rehearse(run, model, optimizers, make, validate, before, undo, extra) -> Rehearsal:
    """Begin the run, and measure."""
    from dataset.token_cache import BUILDING

    args, rt = run.args, run.rt
    start_up = time.monotonic() - args.started - sum(BUILDING) - compile_seconds() + rt.left_out
    compiled = compile_again(run, make) if str(args.use_compile) == "1" else 0.0
    first, _ = timed(rt, lambda: validate(model)) if before else (0.0, {})
    if args.max_minutes and not args.max_steps and undo is None:
        undo = runtime.snapshot(model, optimizers, rt)  # the run has this copy too
    total = batches.num_steps(len(run.train), args)
    about = checkpoint.describe(run.stage, args, run.tokenizer, run.data, total, run.parent)
    with scratch_folder(args) as folder, contextlib.redirect_stdout(io.StringIO()):
        there = Namespace(**vars(args) | {"save_dir": folder, "checkpoint_dir": folder, "use_wandb": False})
        log = progress.Progress(there, rt, model, about)
        log.start(checkpoint.restore(run.saved, model, optimizers, rt, log))
        steps = probe_steps(run, make, log)
        slots = probe_largest(run, make, log.done)
        validation, _ = timed(rt, lambda: validate(model))
        written = folder / run.weight_path(args, runtime.bare(model).config).name
        resume = checkpoint.resume_path(there, runtime.bare(model).config)

        def save():
            now = {name: value() if callable(value) else value for name, value in extra.items()}
            checkpoint.save(
                model, optimizers, there, rt, about, log, written, run.save_weights, run.frozen_base, **now
            )

        saving, _ = timed(rt, save)
        sizes = [path.stat().st_size if path.exists() else 0 for path in (written, resume)]
        end, _ = timed(rt, log.finish)
    return Rehearsal(
        start_up,
        first,
        steps,
        slots,
        validation,
        saving,
        end,
        runtime.peak_memory_gb(rt),
        *sizes,
        compiled,
    )


def probe_steps(run, make, log) -> list[tuple]:
    """(seconds, slots, tokens) of the first steps of the run, made as the run makes them."""
    args, rt, made = run.args, run.rt, []
    total = batches.num_steps(len(run.train), args)
    begin = time.perf_counter()
    with contextlib.closing(batches.training_steps(run.train, args, rt, log.done, total)) as steps:
        for step, micro_batches in steps if log.done < total else ():
            stats = make(step, micro_batches)
            log.step(step, **stats)
            runtime.synchronize(rt)
            now = time.perf_counter()
            made.append((now - begin, slots_of(micro_batches), stats.get("num_tokens", 0) * rt.world_size))
            begin, spent = now, sum(seconds for seconds, *_ in made[1:])
            enough = len(made) > 4 and spent > STEADY_SECONDS or len(made) > 2 and spent > SLOW_SECONDS
            if runtime.total(int(enough), rt):
                break
    runtime.release_signals(rt)
    if rt.stopping:
        raise KeyboardInterrupt
    return made


def probe_largest(run, make, done: int) -> float | None:
    """Make the step whose micro-batch is the largest of the run, and return the mean slots of a step. Only
    where shapes differ and are known before; None elsewhere."""
    args, rt = run.args, run.rt
    total = batches.num_steps(len(run.train), args)
    if run.train.unit != "pairs" or done >= total:
        return None
    order = batches.Order(len(run.train), args.seed)

    def load(step):
        rows = order.rows(batches.step_positions(step, len(run.train), args))
        return batches.load_step(run.train, rows, args, rt)

    sizes, largest, begin = [], (0, done), time.perf_counter()
    for step in sorted(range(done, total), key=lambda step: step * 0.6180339887 % 1):  # spread evenly
        micro_batches = load(step)
        sizes.append(slots_of(micro_batches))
        largest = max(largest, (max(batch["input_ids"].numel() for batch in micro_batches), step))
        if time.perf_counter() - begin > SCAN_SECONDS:
            break
    step = runtime.broadcast(largest[1], rt)
    make(step, on_device(load(step), rt))
    return statistics.fmean(sizes)


def slots_of(micro_batches) -> int:
    """Tokens that are computed, padding included."""
    return sum(batch["input_ids"].numel() for batch in micro_batches)


def timed(rt, act) -> tuple[float, object]:
    """(seconds, result) of act(), with the time of what it left out."""
    begin, left_out = time.perf_counter(), rt.left_out
    result = act()
    runtime.synchronize(rt)
    return time.perf_counter() - begin + rt.left_out - left_out, result


def compile_again(run, make) -> float:
    """Let torch.compile do its work in a step that is not counted, and forget it. What it then finds in its
    cache, as the run will, takes less time, and other memory, than what it has just made.
    Returns the seconds that this will save."""
    import torch

    args, rt = run.args, run.rt
    rows = batches.Order(len(run.train), args.seed).rows(batches.step_positions(0, len(run.train), args))
    make(0, on_device(batches.load_step(run.train, rows, args, rt), rt))
    seconds = compile_seconds()
    torch.compiler.reset()
    return seconds


def on_device(micro_batches, rt):
    """Micro-batches as `batches.training_steps` hands them to a stage."""
    micro_batches[:] = [{name: t.to(rt.device) for name, t in batch.items()} for batch in micro_batches]
    return micro_batches


def compile_seconds() -> float:
    """Seconds that torch.compile has spent so far on code that its cache will hold when the run wants it."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes memory that the run might not need
    return getattr(dynamo, "cumulative_time_spent_ns", {}).get("inductor_compile", 0) / 1e9


def room_gb(rt) -> float | None:
    """Memory that this process can have in all: what it holds, and its share of what is free."""
    free = runtime.available_memory_gb(rt)
    if free is None:
        return None
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if rt.device.type == "cpu" else 1
    return runtime.held_memory_gb(rt) + free / sharing


@contextlib.contextmanager
def scratch_folder(args):
    """A folder that is removed again, on the disk that the run writes to, if that is possible."""
    place = Path(args.checkpoint_dir).resolve().parent
    while not place.exists():
        place = place.parent
    here = Path(tempfile.gettempdir())
    if here.stat().st_dev == place.stat().st_dev or not os.access(place, os.W_OK):
        place = here
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=place) as folder:
        yield Path(folder)


# --------------------------------------------------------------------------------------------------
# Predicting
# --------------------------------------------------------------------------------------------------


def seconds_of_a_step(run, found: Rehearsal) -> float:
    """Mean over the run: by the tokens of a step where these are known, else by those that were made. The
    first steps warm up."""
    steady = found.steps[max(1, len(found.steps) // 3) :] or found.steps
    if run.train.unit == "prompts":
        return statistics.fmean(seconds for seconds, *_ in steady)
    per_slot = statistics.median(seconds / slots for seconds, slots, _ in steady)
    return per_slot * (found.slots or statistics.fmean(slots for _, slots, _ in steady))


def times(run, found: Rehearsal, args=None) -> tuple[int, dict[str, tuple[float, str]]]:
    """The total of steps, and the seconds of every part of the run, with how they come about."""
    args = args or run.args
    done = run.saved["step"] if run.saved else 0
    made = [seconds for seconds, *_ in found.steps]
    per_step = seconds_of_a_step(run, found) if made else 0.0
    start_up = max(found.start_up, 0.0)
    if args.max_minutes and not args.max_steps:
        spent = start_up + found.first + sum(made)
        total = len(made) + batches.steps_left(args, spent, per_step, found.validation)
    else:
        total = batches.num_steps(len(run.train), args)
    more = max(0, total - done - len(made))

    def times_within(interval):  # see Progress.due; the last one stands behind the loop
        return 1 + ((total - 1) // interval - done // interval if interval and total > done else 0)

    validations, saves = times_within(args.val_interval), times_within(args.save_interval)
    return total, {
        "start-up": (start_up, "imports, data, weights"),
        "steps": (sum(made) + more * per_step, f"{total - done:,} of {per_step:.3g} s"),
        "validation": (
            found.first + validations * found.validation,
            f"{validations + bool(found.first)} of {found.validation:.3g} s",
        ),
        "saving": (saves * found.save + found.end, f"{saves} of {found.save:.3g} s, and the curve"),
    }


def memory(found: Rehearsal | None, run, parts: dict) -> dict[str, float]:
    """GB by part of the peak: what is known exactly, and the rest of what was measured; without a rehearsal
    by the formula alone."""
    known = {
        "weights": parts["weights"] / 1e9,
        "gradients": parts["gradients"] / 1e9,
        "optimizer state": parts["optimizer"] / 1e9,
        "other models": parts["others"] / 1e9,
    }
    if found is None or found.peak_gb is None:
        return (
            {"process": parts["process"] / 1e9}
            | known
            | {"rest": (parts["activations"] + parts["loss"]) / 1e9}
        )
    process = {"process": run.before_models}
    return process | known | {"rest": max(1e-3, found.peak_gb - sum(known.values()) - run.before_models)}


# --------------------------------------------------------------------------------------------------
# Flags that would help
# --------------------------------------------------------------------------------------------------


def flags_that_fit(run, amounts: dict, parts: dict, limit: float) -> list[str]:
    """What to type instead, each with the memory it would need: the mildest change below `limit` GB first."""
    args = run.args
    fixed, rest = sum(amounts.values()) - amounts["rest"], amounts["rest"]
    if hasattr(args, "tokens_at_once"):
        return flags_that_fit_a_rollout(run, fixed, rest, limit) + smaller_model(run, limit)
    share = parts["activations"] / (parts["activations"] + parts["loss"])  # what follows the tokens at once

    def needs(part):
        return fixed + rest * (1 - share + share * part)

    for divisor in range(2, args.batch_size + 1):
        if args.batch_size % divisor == 0 and needs(1 / divisor) <= limit:
            flags = f"--batch_size {args.batch_size // divisor} "
            flags += f"--accumulation_steps {args.accumulation_steps * divisor}"
            return [f"{flags}: the same update in {needs(1 / divisor):.2f} GB", *smaller_model(run, limit)]
    length = args.max_seq_len // 2
    while length >= 32 and needs(length / args.max_seq_len / args.batch_size) > limit:
        length //= 2
    if length < 32:
        return smaller_model(run, limit)
    amount = needs(length / args.max_seq_len / args.batch_size)
    flags = f"--batch_size 1 --accumulation_steps {batches.rows_per_step(args)} --max_seq_len {length}"
    return [f"{flags}: {amount:.2f} GB", *smaller_model(run, limit)]


def flags_that_fit_a_rollout(run, fixed: float, rest: float, limit: float) -> list[str]:
    """Of reinforcement learning: answers half as long and half as many tokens at once, as often as needed."""
    args = run.args
    at_once = args.tokens_at_once or (1024 if run.rt.device.type == "cpu" else 32768)
    halvings = next((n for n in range(1, 8) if fixed + rest / 2**n <= limit), None)
    if halvings is None:
        return []
    length, at_once, prompts = (
        max(least, value >> halvings)
        for value, least in ((args.max_gen_len, 1), (at_once, 64), (args.val_prompts, 1))
    )
    flags = f"--max_gen_len {length} --tokens_at_once {at_once} --val_prompts {prompts}"
    return [f"{flags}: {fixed + rest / 2**halvings:.2f} GB"]


def smaller_model(run, limit: float) -> list[str]:
    """The largest preset that is smaller than this model and fits as it is, by the formula."""
    import torch

    from model.model_minimind import MiniMindLM
    from trainer.cli import ARCHITECTURE, PRESETS, model_config

    def measured(**flags):
        args = Namespace(**vars(run.args) | flags)
        with torch.device("meta"):
            model = MiniMindLM(model_config(args))
        tokens = batches.micro_rows(args, run.rt.world_size) * run.train.tokens_per_row
        parts = progress.memory_parts(model, args, run.rt, tokens)
        return sum(p.numel() for p in model.parameters()), sum(parts.values()) / 1e9

    plain = dict.fromkeys(ARCHITECTURE)
    mine = measured()[0]
    sizes = {name: measured(**plain | {"preset": name}) for name in PRESETS}
    fitting = [
        (size, amount, name) for name, (size, amount) in sizes.items() if size < mine and amount <= limit
    ]
    if not fitting:
        return []
    size, amount, name = max(fitting)
    return [f"--preset {name}: {size / 1e6:.1f}M parameters instead of {mine / 1e6:.1f}M, {amount:.2f} GB"]


def flags_that_hasten(run, model, found: Rehearsal, total_seconds: float) -> list[str]:
    """What to type for a shorter run, with the time it would take."""
    args, rt, advice = run.args, run.rt, []

    def with_flags(**changed):
        return sum(seconds for seconds, _ in times(run, found, Namespace(**vars(args) | changed))[1].values())

    for name, part in (("val_interval", "validation"), ("save_interval", "saving")):
        rarely = with_flags(**{name: 0})
        if rarely < 0.9 * total_seconds:
            advice.append(f"--{name} 0: {part} only at the end, {shown_time(rarely)}")
    auto = runtime.choose_dtype(
        "auto", rt.device, 0 if getattr(args, "exact", False) else model.config.hidden_size
    )
    if args.dtype not in ("auto", None) and auto != rt.dtype:
        advice.append(
            f"--dtype auto: {str(auto).removeprefix('torch.')} products, which this machine does faster"
        )
    if args.use_compile == "0" and total_seconds > runtime.COMPILING_PAYS_AFTER:
        reason = runtime.why_not_compile(rt.device)
        advice.append(
            f"--use_compile 1: not possible here ({reason})"
            if reason
            else "--use_compile 1: about a third less time for a step, after 30 to 60 s of compiling"
        )
    if rt.device.type != "cpu" and args.accumulation_steps % 2 == 0:
        advice.append(
            f"--batch_size {2 * args.batch_size} --accumulation_steps {args.accumulation_steps // 2}: the "
            "same update in larger pieces, if memory allows"
        )
    if total_seconds > 120 and not args.max_minutes:
        minutes = max(1, round(total_seconds / 120))
        limited = Namespace(**vars(args) | {"max_minutes": float(minutes), "max_steps": 0})
        steps, _ = times(run, found, limited)
        advice.append(f"--max_minutes {minutes}: what can be done in half the time, about {steps:,} steps")
    return advice


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


def report(run, model, parts: dict, room: float | None, found, ran_out: bool) -> list[str]:
    """The lines that are printed. found: a Rehearsal, or None when there was too little memory for one."""
    args = run.args
    bare = runtime.bare(model)
    amounts = memory(found, run, parts)
    peak = found.peak_gb if found and found.peak_gb else sum(amounts.values())
    lines = [
        "",
        "plan (nothing was trained or saved)",
        *size_lines(bare),
        *length_lines(run, bare, found),
        f"machine: {runtime.describe(run.rt)}, torch.compile {'on' if args.use_compile == '1' else 'off'}",
    ]
    fits = not ran_out and (room is None or peak <= 0.9 * room)
    verdict = "fits" if fits else "tight" if found else "ran out of it" if ran_out else "does not fit"
    source = "" if found else " (by a formula)"
    each = " per process" * (run.rt.world_size > 1)
    lines.append(
        f"memory:  {peak:.2f} GB{each} at its peak{source}{f' of {room:.2f} GB' * bool(room)}: {verdict}"
    )
    lines.append(
        "         " + ", ".join(f"{name} {amount:.2f}" for name, amount in amounts.items() if amount)
    )
    limit = math.inf if ran_out else 0.9 * (room or math.inf)
    advice = [] if fits else flags_that_fit(run, amounts, parts, limit)
    if found is None:
        lines.append("time:    unknown, because no step was made")
    else:
        _, by_part = times(run, found)
        seconds = sum(amount for amount, _ in by_part.values())
        ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
        lines.append(f"time:    {seconds:.1f} s{long_time(seconds)}; begun now, it would end at {ends}")
        lines += [f"         {name:<11}{amount:8.1f} s   {how}" for name, (amount, how) in by_part.items()]
        lines += once_lines(found)
        lines.append(disk_line(args, found))
        advice += flags_that_hasten(run, bare, found, seconds)
    return lines + [("change:  " if i == 0 else "         ") + line for i, line in enumerate(advice)]


def size_lines(model) -> list[str]:
    """Parameters: all, those that work on one token, those that learn."""
    from model.model_minimind import count_parameters

    total, active = count_parameters(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [f"model:   {total:,} parameters, {active:,} of them work on a token, {learning:,} learn"]


def length_lines(run, model, found: Rehearsal | None) -> list[str]:
    """Steps, tokens and FLOPs."""
    args, train = run.args, run.train
    total = times(run, found)[0] if found else batches.num_steps(len(train), args)
    rows = batches.rows_per_step(args)
    all_rows = total * rows if args.max_steps or args.max_minutes else args.epochs * len(train)
    tokens, about = train.tokens_per_row, "" if train.unit == "rows" else "about "
    if train.unit == "prompts" and found:  # answers are what is trained on
        tokens = statistics.fmean(made for *_, made in found.steps) / rows if found.steps else 0.0
    flops = progress.training_flops(model, args)
    return [
        f"steps:   {total:,} of {rows} {train.unit}, {about}{rows * tokens:,.0f} tokens each, "
        f"{batches.micro_rows(args, run.rt.world_size)} {train.unit} at a time; "
        f"{about}{all_rows * tokens:,.0f} tokens in all ({all_rows / len(train):.2f} epochs)",
        f"compute: {flops:.4g} FLOPs per token, {about}{flops * rows * tokens:.4g} per step, "
        f"{about}{flops * all_rows * tokens:.4g} in all",
    ]


def once_lines(found: Rehearsal) -> list[str]:
    """Time that this plan took and the run will not."""
    from dataset.token_cache import BUILDING

    done = [f"tokenizing {sum(BUILDING):.1f} s"] if BUILDING else []
    done += [f"compiling {found.compiled:.1f} s"] if found.compiled else []
    return [f"         not in it, because it is done and kept: {', '.join(done)}"] if done else []


def disk_line(args, found: Rehearsal) -> str:
    place = Path(args.checkpoint_dir).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    weights, resume = found.weights_bytes / 1e6, found.resume_bytes / 1e6
    return (
        f"disk:    weights {weights:,.1f} MB, resume file {resume:,.1f} MB, "
        f"twice that while they are replaced ({free:.1f} GB free)"
    )


def shown_time(seconds: float) -> str:
    return f"{seconds:.1f} s{long_time(seconds)}"


def long_time(seconds: float) -> str:
    """What stands behind seconds that nobody can imagine."""
    return (
        f" ({seconds / 3600:.1f} h)"
        if seconds > 7200
        else f" ({seconds / 60:.1f} min)"
        if seconds > 120
        else ""
    )
