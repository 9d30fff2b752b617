"""Which rows make up optimizer step k: a pure function of (seed, step), sliced by rank.

The whole run is one stream of positions 0, 1, 2, ... Position p is row `permutation(seed, epoch)[p mod
rows]` with epoch = p // rows. Step k (counted from 0) takes positions k * G ... (k + 1) * G - 1, with G =
batch_size * accumulation_steps rows whatever the number of processes; process r takes its contiguous share
of them. So a run can stop after any step and go on with more or fewer processes: the same rows meet in the
same updates.
"""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

import numpy as np
import torch

IGNORE = -100


class StepBatches(list):
    """The micro-batches of one optimizer step on this process (dicts of tensors on its device), with what
    was counted while they were still on the CPU."""

    num_targets = 0  # valid labels of this process
    num_shown = 0  # of them, those that are computed (a label without a gradient need not be)
    weight = 0.0  # sum of their loss_weights, where a stage has such
    num_tokens = 0  # tokens that are not padding, of this process
    num_rows = 0  # rows of this process that hold data
    rows: list = []  # their numbers in the dataset
    places: list = []  # and in the step, over all processes


# --------------------------------------------------------------------------------------------------
# Pure functions of the step
# --------------------------------------------------------------------------------------------------


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in one epoch. RandomState, because numpy promises that its numbers never change."""
    return np.random.RandomState([seed % 2**32, epoch]).permutation(num_rows)


def rows_per_step(args) -> int:
    return args.batch_size * args.accumulation_steps


def num_steps(num_rows: int, args) -> int:
    """Optimizer steps of the run: --max_steps if given, else enough for --epochs (the last may be
    smaller)."""
    if args.max_steps:
        return args.max_steps
    return -(-args.epochs * num_rows // rows_per_step(args))


def step_positions(step: int, num_rows: int, args) -> range:
    """Stream positions of a step. With --max_steps the stream goes on for as many epochs as it takes."""
    size = rows_per_step(args)
    end = (step + 1) * size
    if not args.max_steps:
        end = min(end, args.epochs * num_rows)
    return range(step * size, max(end, step * size))


class Order:
    """Rows by stream position; remembers the last two epochs' permutations."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed, self.known = num_rows, seed, {}

    def rows(self, positions) -> list[int]:
        return [int(self.epoch(p // self.num_rows)[p % self.num_rows]) for p in positions]

    def epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self.known:
            self.known = {e: order for e, order in self.known.items() if e == epoch - 1}
            self.known[epoch] = epoch_order(self.num_rows, self.seed, epoch)
        return self.known[epoch]


def micro_rows(args, world_size: int) -> int:
    """Rows in every micro-batch: at most batch_size, and the process's share of a step in equal parts."""
    share = -(-rows_per_step(args) // world_size)
    return -(-share // -(-share // args.batch_size))


def split_step(items: list, world_size: int, micro_size: int) -> list[list[list]]:
    """Share the items of one step: result[rank][micro_batch] is a list of items, with the same number of
    micro-batches on every rank (processes meet at the end of the last one). Shares differ by at most one
    item; a micro-batch may be empty when there are fewer items than processes."""
    num_micro = max(1, -(-len(items) // (world_size * micro_size)))
    result, start = [], 0
    for rank in range(world_size):
        size = len(items) // world_size + (rank < len(items) % world_size)
        share = items[start : start + size]
        start += size
        result.append([share[i * micro_size : (i + 1) * micro_size] for i in range(num_micro)])
    return result


def check_split(args, rt):
    """Refuse a step that the processes cannot share evenly: it would be summed correctly, but all would
    wait for the one with the largest share, at every step and without notice."""
    from trainer.runtime import TrainingError

    size = rows_per_step(args)
    if size % rt.world_size:
        multiple = -(-size // rt.world_size) * rt.world_size
        raise TrainingError(
            f"--batch_size {args.batch_size} x --accumulation_steps {args.accumulation_steps} = {size} "
            f"rows per step cannot be shared by {rt.world_size} processes: use a multiple of "
            f"{rt.world_size}, for example --batch_size {multiple} --accumulation_steps 1"
        )


# --------------------------------------------------------------------------------------------------
# Reading ahead
# --------------------------------------------------------------------------------------------------


def load_step(dataset, rows: list[int], args, rt, pin: bool = False) -> StepBatches:
    """This process's micro-batches of the rows of one step, on the CPU, and their counts."""
    size = micro_rows(args, rt.world_size)
    mine = split_step(list(range(len(rows))), rt.world_size, size)[rt.rank]
    step = StepBatches()
    step.places = [place for micro in mine for place in micro]
    step.rows = [rows[place] for place in step.places]
    step.num_rows = len(step.rows)
    for micro in mine:
        batch = dataset.collate([rows[place] for place in micro], size)
        step.num_targets += int((batch["labels"][:, 1:] != IGNORE).sum())
        if "loss_weights" in batch:
            step.weight += float(batch["loss_weights"].sum(dtype=torch.float64))
        step.num_tokens += int((batch["input_ids"] != dataset.pad_id).sum())
        step.append({name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch)
    return step


def training_steps(dataset, args, rt, start_step: int = 0, end_step: int | None = None):
    """Yield (step, micro_batches) from start_step to the end of the run; a thread prepares the next steps
    meanwhile.

    Ends early, after the running step, when Ctrl-C or SIGTERM arrived anywhere (`rt.stopping`); before the
    first step that is a KeyboardInterrupt.
    """
    from trainer import runtime

    check_split(args, rt)
    runtime.catch_signals(rt)
    end_step = num_steps(len(dataset), args) if end_step is None else end_step
    order = Order(len(dataset), args.seed)
    pin = rt.device.type == "cuda"
    ready: queue.Queue = queue.Queue(maxsize=2)
    closed = threading.Event()

    def put(item):
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read_ahead():
        try:
            for step in range(start_step, end_step):
                rows = order.rows(step_positions(step, len(dataset), args))
                put((step, load_step(dataset, rows, args, rt, pin), None))
                if closed.is_set():
                    return
            put((None, None, None))
        except BaseException as error:  # handed over: the main thread raises it
            put((None, None, error))

    thread = threading.Thread(target=read_ahead, name="read-ahead", daemon=True)
    thread.start()
    started = False
    try:
        while not (rt.stopping or rt.world_size == 1 and rt.stop_signal):
            step, batches, error = ready.get()
            if error is not None:
                raise error
            if batches is None:
                return
            started = True
            for i, batch in enumerate(batches):
                batches[i] = {name: t.to(rt.device, non_blocking=pin) for name, t in batch.items()}
            shown = ", ".join(map(str, batches.rows[:8])) + (", ..." if len(batches.rows) > 8 else "")
            rt.samples = f"step {step + 1}, rows {shown} of the training data"
            yield step, batches
            del batches
        if not started:
            raise KeyboardInterrupt  # there is nothing new to save
    finally:
        closed.set()
        thread.join()


def first_micro_batch(dataset, args, rt) -> dict:
    """The micro-batch that this process sees first, on its device."""
    rows = Order(len(dataset), args.seed).rows(step_positions(0, len(dataset), args))
    return {name: tensor.to(rt.device) for name, tensor in load_step(dataset, rows, args, rt)[0].items()}


def validation_batches(dataset, args, rt):
    """This process's share of a held-out set, in fixed order, as micro-batches on the device."""
    mine = range(rt.rank, len(dataset), rt.world_size)
    size = min(args.batch_size, max(1, -(-len(dataset) // rt.world_size)))
    for start in enough_of(range(0, len(mine), size), rt):
        batch = dataset.collate(list(mine[start : start + size]), size)
        yield {name: tensor.to(rt.device) for name, tensor in batch.items()}


ENOUGH_SECONDS = 5  # of like work, to know how long the rest of it takes


def enough_of(items, rt):
    """All items in their order. While --plan rehearses a run: the last one (where items are sorted, the one
    that needs most memory) and evenly spread others, for a few seconds; the time of the rest is added to
    rt.left_out."""
    items = list(items)
    if not rt.rehearsing or len(items) < 4:
        yield from items
        return
    spread = np.argsort(np.arange(1, len(items)) * 0.6180339887 % 1)  # neighbours in it lie far apart
    yield items[-1]
    begin = time.perf_counter()
    for done, place in enumerate(spread, 1):
        yield items[place]
        spent = time.perf_counter() - begin
        if spent > ENOUGH_SECONDS and done >= 5 or spent > 4 * ENOUGH_SECONDS:
            rt.left_out += spent / done * (len(spread) - done)
            return


# --------------------------------------------------------------------------------------------------
# Rows of sampled sequences
# --------------------------------------------------------------------------------------------------


def first_prompts(batch: dict) -> list[list[list[int]]]:
    """The prompts of each row of a packed micro-batch: of every conversation in it, the tokens before its
    first answer."""
    prompts = []
    for ids, labels, positions in zip(*(batch[n].tolist() for n in ("input_ids", "labels", "position_ids"))):
        prompts.append([])
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)]):
            answer = next((i for i in range(start, end) if labels[i] != IGNORE), None)
            if answer is not None:
                prompts[-1].append(ids[start:answer])
    return prompts


def rows_of(sequences: list[tuple[list[int], int]], max_seq_len: int, pad_id: int, numbers=None) -> dict:
    """(ids, length of the prompt) of each sequence -> input_ids, labels, position_ids (R, T), packed; T is
    the longest sequence, at most max_seq_len, rounded up. What follows the prompt is a target. No sequences:
    one row of padding.

    numbers: for each sequence an int array, one entry per id: the number under which the caller keeps what
    belongs to that token, -1 for a token that is no target; they come back as `tokens` (R, T).
    """
    from dataset import packing

    sequences = [(ids[:max_seq_len], prompt) for ids, prompt in sequences]
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64)
    width = min(max_seq_len, -(-int(lengths.max(initial=1)) // 32) * 32)
    order, offsets = packing.rows(lengths, width)
    rows = max(1, len(offsets) - 1)
    input_ids, labels = np.full((rows, width), pad_id), np.full((rows, width), IGNORE)
    position_ids, tokens = np.tile(np.arange(width), (rows, 1)), np.full((rows, width), -1)
    for row in range(len(offsets) - 1):
        place = 0
        for number in order[offsets[row] : offsets[row + 1]]:
            ids, prompt = sequences[number]
            part = slice(place, place + len(ids))
            input_ids[row, part], position_ids[row, part] = ids, np.arange(len(ids))
            if numbers is None:
                labels[row, place + prompt : place + len(ids)] = ids[prompt:]
            else:
                tokens[row, part] = numbers[number]
            place += len(ids)
        position_ids[row, place:] = np.arange(width - place)
    arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    if numbers is not None:
        arrays |= {"labels": np.where(tokens >= 0, input_ids, IGNORE), "tokens": tokens}
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


# --------------------------------------------------------------------------------------------------
# Counting
# --------------------------------------------------------------------------------------------------


def load(loader, path, tokenizer, args, rt):
    """(train, val) of a stage, by `load_pretrain` or `load_sft`: val is --val_path, or the held-out share
    of the training data, or None. The first process of a machine builds the token cache, the others open
    it. On a CPU a run by --max_minutes has a part of the held-out share, which it validates in little
    time."""
    from trainer import cli, runtime

    options = {"cache_dir": args.cache_dir, "pack": bool(args.pack), "num_workers": args.num_workers}
    val_fraction = 0.0 if args.val_path else args.val_fraction
    with runtime.main_first(rt):
        train, val = loader(
            path, tokenizer, args.max_seq_len, val_fraction=val_fraction, seed=args.seed, **options
        )
        if args.val_path:
            val, _ = loader(args.val_path, tokenizer, args.max_seq_len, seed=args.seed, **options)
    if val is not None and val.num_targets == 0:
        rt.print(f"no validation: --val_fraction {args.val_fraction} of this file holds out no document")
        val = None
    if val is not None and not args.val_path and args.max_minutes and rt.device.type == "cpu":
        val = val.thinned(int(cli.validation_tokens(args) / args.max_seq_len))
    return train, val


TAX_ROWS = 256  # of an earlier stage's held-out data: enough to see it forgotten


def load_tax(path, tokenizer, args, rt):
    """The held-out conversations of an earlier stage, by which the alignment tax is measured: --tax_path, or
    what lies beside the embedded curriculum's file `path`, unless --val_path is that; None when there is
    neither."""
    from dataset.lm_dataset import load_sft
    from trainer import runtime

    beside = Path(path.split(",")[0]).parent / "sft_heldout.jsonl"
    known = args.val_path and Path(args.val_path).resolve() == beside.resolve()
    chosen = args.tax_path or (str(beside) if beside.exists() and not known else None)
    if chosen in (None, "none"):
        return None
    options = {"cache_dir": args.cache_dir, "num_workers": args.num_workers}
    with runtime.main_first(rt):
        return load_sft(chosen, tokenizer, args.max_seq_len, seed=args.seed, **options)[0].thinned(TAX_ROWS)


def expected_seconds(model, args, rt, dataset) -> float:
    """A guess of how long a run will take without torch.compile, good enough to decide whether to compile: a
    third of the machine's rate, counted by FLOPs."""
    from model.model_minimind import count_parameters, flops_per_token
    from trainer import runtime

    if args.max_minutes and not args.max_steps:
        return args.max_minutes * 60
    config = runtime.bare(model).config
    cost = flops_per_token(config, args.max_seq_len, count_parameters(runtime.bare(model))[1])
    tokens = num_steps(len(dataset), args) * rows_per_step(args) * dataset.tokens_per_row
    return tokens * cost / (0.3 * (runtime.peak_flops(rt) or 1e13))


def steps_for_minutes(dataset, args, rt, update, undo, validate=None) -> tuple[int, list]:
    """How many steps fit into --max_minutes, counted from the start of the process.

    Some steps are made to see how long they take (`update(step, micro_batches)`, the first of them compiles).
    They stay, as the first of the run, when the schedule gives them the same rates now that their number is
    known; else `undo()` takes them back. Either way the run is the one that `--max_steps N` repeats exactly.
    `validate()` is timed once; the validations of the run are set aside.

    Returns the number of steps and, for `Progress.catch_up`, (what update returned, seconds) of those that
    stay.
    """
    from trainer import runtime

    budget, made, guess = args.max_minutes * 60, [], num_steps(len(dataset), args)

    def timed(act, *inputs):
        begin = time.perf_counter()
        result = act(*inputs)
        runtime.synchronize(rt)
        return result, time.perf_counter() - begin

    # Steps that will stay may take longer; a fifth of the run is less than any wsd keeps its peak by default.
    wanted = min(0.2 * budget, 60) if args.schedule in ("wsd", "constant") else 0.02 * budget
    for step, micro_batches in training_steps(dataset, args, rt, 0, guess):
        made.append(timed(update, step, micro_batches))
        enough = len(made) >= 4 and sum(seconds for _, seconds in made[1:]) > wanted
        if runtime.total(int(enough), rt):
            break
    if rt.stopping:
        rt.print("stopped while the first steps were timed; nothing was saved")
        raise KeyboardInterrupt
    validation = timed(validate)[1] if validate else 0.0
    # The first step compiles, the next ones warm up; the median of the others is not moved by a hiccup.
    seconds = float(np.median([seconds for _, seconds in made[max(1, len(made) // 3) :] or made]))
    more = runtime.broadcast(steps_left(args, time.monotonic() - rt.started, seconds, validation), rt)
    if not same_start(len(made), guess, len(made) + more, len(dataset), args):
        undo()
        made = []
    steps = len(made) + more
    rt.print(
        f"{steps} steps of {seconds:.3g} s fit into {args.max_minutes:g} minutes; the same run again: "
        f"--max_steps {steps} --batch_size {args.batch_size} --max_seq_len {args.max_seq_len} "
        f"--use_compile {args.use_compile}"
    )
    return steps, made


def steps_left(args, spent: float, seconds: float, validation: float) -> int:
    """How many steps of so many seconds fit into the rest of --max_minutes, when `spent` seconds are gone and
    a validation takes `validation`. At least one."""
    budget = args.max_minutes * 60
    seconds += validation / args.val_interval if args.val_interval else 0.0
    # Set aside: saves, the curve, the end of the process; steps slower than those timed.
    left = budget - spent - validation - (1.5 + 0.03 * budget)
    return max(1, int(left / max(seconds, 1e-9)))


def same_start(done: int, before: int, after: int, num_rows: int, args) -> bool:
    """Whether the first `done` steps of a run are the same for both totals: the learning rates, and the rows
    (which are fewer at the end of the last epoch)."""
    from trainer.cli import schedule
    from trainer.optim import lr_factor

    rates = [[lr_factor(step, total, **schedule(args)) for step in range(done)] for total in (before, after)]
    return rates[0] == rates[1] and done * rows_per_step(args) <= args.epochs * num_rows
