"""Our LoRA and DPO stages beside the trainers people trust: peft in trl's SFTTrainer, and trl's DPOTrainer.

    python scripts/bench_stages.py lora --data_path chats.jsonl --preset minimind2-small
    python scripts/bench_stages.py dpo  --data_path pairs.jsonl --preset minimind2-small

Everybody has a process of its own, the same weights, the same token ids in the same order, the same number of
threads, and takes turns with the others. Nobody is compiled. A token counts when it is no padding, and only
what happens between the end of step 2 and the end of the last step: starting up, reading data and the first
steps cost nothing. An update of the peer sees as many conversations (pairs) as one of ours, in micro-batches
of at most --peer_batch.

    ours, ours_float32     trainer/train_lora.py, trainer/train_dpo.py, in --dtype auto and in float32
    peft                   conversations padded to the longest of a micro-batch, as trl does by default
    peft_packed            trl's own packing
    trl                    the reference is a second model, computed in every step
    trl_precomputed        precompute_ref_log_probs: as ours, once before training
    peft_defaults, trl_defaults   in bfloat16 and with activations recomputed (gradient_checkpointing), as trl
                           ships: less memory, slower. The other peers run without, in --peer_dtype

DPO has a second figure, "with reference": one epoch, in which every token goes through the reference once.
Peak memory is the resident set of the whole process, as the kernel counts it.
Results go to out/bench/ as JSON; --ledger appends a row to docs/benchmarks.md.
"""

import importlib.util
import json
import os
import shlex
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench
from scripts.bench import BenchError, say
from trainer.cli import HelpFormatter, count, positive_int, switch

WORKER = ROOT / "scripts" / "bench_stages_peers.py"
WARM_UP = 2  # steps that are not counted
NAMES = {
    "lora": {
        "ours": "ours",
        "ours_float32": "ours float32",
        "peft": "peft",
        "peft_packed": "peft packed",
        "peft_defaults": "peft, trl's defaults",
    },
    "dpo": {
        "ours": "ours",
        "ours_float32": "ours float32",
        "trl": "trl",
        "trl_precomputed": "trl precomputed",
        "trl_defaults": "trl, its defaults",
    },
}
ROWS = {"lora": "conversations", "dpo": "chosen and rejected answers"}
UNITS = {"lora": "conversations", "dpo": "pairs"}
LENGTHS = {"lora": 340, "dpo": 1024}  # the stages' defaults
FIGURES = {"with_reference": "tokens/s with reference", "tokens_per_second": "tokens/s"}


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


def run_job(args, kind, name, **job) -> dict:
    """One job of bench_stages_peers.py in a fresh process: its result and what the kernel counted."""
    folder = args.work_dir / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    job_path, result_path = folder / f"{name}.job.json", folder / f"{name}.result.json"
    job |= dict(
        kind=kind,
        stage=args.task,
        shape=args.shape,
        steps=args.steps,
        max_seq_len=args.max_seq_len,
        threads=args.threads,
        seed=args.seed,
    )
    job_path.write_text(json.dumps(job, indent=1, default=str), encoding="utf-8")
    command = [sys.executable, WORKER, job_path, result_path]
    measured = bench.run_process(command, bench.environment(args), folder / f"{name}.log")
    return measured | json.loads(result_path.read_text(encoding="utf-8"))


def run_ours(args, name, number) -> dict:
    """The stage as a user starts it."""
    folder = args.work_dir / "stage"
    terminal, log = folder / f"{name}_{number}.log", folder / "bench_log.jsonl"
    command = [sys.executable, ROOT / "trainer" / f"train_{args.task}.py"]
    command += ["--data_path", args.prepared["data"], "--from_weight", "base", "--save_weight", "bench"]
    command += ["--save_dir", folder, "--checkpoint_dir", folder / "checkpoints", "--save_interval", 0]
    command += ["--val_fraction", 0, "--val_interval", 0, "--tax_path", "none", "--use_compile", 0]
    at_once = args.batch_size
    if args.task == "lora":  # as many rows in memory as the packed peer has
        at_once = max(n for n in range(1, args.packed_rows + 1) if args.batch_size % n == 0)
    command += ["--max_seq_len", args.max_seq_len, "--batch_size", at_once]
    command += ["--accumulation_steps", args.batch_size // at_once]
    command += ["--max_steps", args.steps, "--log_interval", 1, "--seed", args.seed]
    command += ["--num_threads", args.threads, "--device", "cpu", *bench.ours_shape_flags(args)]
    if args.task == "lora":
        command += ["--lora_rank", args.lora_rank]
    if name == "ours_float32":
        command += ["--dtype", "float32"]
    log.unlink(missing_ok=True)
    with LineTimes(terminal, ["reference:", "stage:"]) as lines:
        run = bench.run_process([*command, *args.ours_flags], bench.environment(args), terminal)
    run["marks"], run["losses"] = read_log(log)
    run["dtype"] = compute_type(terminal)
    expected, slots = (sum(column) for column in zip(*args.prepared["our_steps"]))
    if run["marks"][-1][0] != expected:
        raise BenchError(
            f"ours trained on {run['marks'][-1][0]:,} tokens instead of {expected:,}; --ours_flags must "
            "leave the rows of a step, their length and --seed alone"
        )
    run["padding"] = 1 - expected / slots
    if args.task == "dpo":
        run["reference_seconds"] = lines.between("reference:", "stage:")
        run["reference_tokens"] = args.prepared["rows_tokens"]
    return run


def run_peer(args, name, number) -> dict:
    packed = name == "peft_packed"
    defaults = name.endswith("_defaults")
    micro, accumulation = args.prepared["micro_batch"], args.prepared["accumulation"]
    if packed:  # its rows are as long as ours, so an update has as many of them
        micro = min(args.packed_rows, args.batch_size)
        accumulation = -(-args.batch_size // micro)
    run = run_job(
        args,
        "peer",
        f"{name}_{number}",
        examples=args.prepared["examples"],
        weights=args.prepared["weights"],
        folder=args.work_dir / "peer",
        micro_batch=micro,
        accumulation=accumulation,
        lora_rank=getattr(args, "lora_rank", None),
        packed=packed,
        precomputed=name == "trl_precomputed",
        defaults=defaults,
        dtype=args.peer_dtype,
    )
    run["dtype"] = "bfloat16" if defaults else args.peer_dtype
    run["reference_tokens"] = run["marks"][-1][0]  # it computes the reference of the same examples
    cpu, wall = (values[-1] - values[WARM_UP - 1] for values in (run["cpu_marks"], column(run["marks"], 1)))
    run["cpu_share"] = cpu / (wall * args.threads)
    return run


def column(rows, number):
    return [row[number] for row in rows]


def read_log(log: Path) -> tuple[list, list]:
    """From a stage's log: [tokens so far, seconds] at the end of each step, and the loss of each step."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_s" in line]
    return [[line["tokens"], line["time_s"]] for line in steps], [line["loss"] for line in steps]


def compute_type(terminal: Path) -> str:
    """What --dtype auto became: `machine: cpu (2 threads), int8 products, all else float32, ...`."""
    for line in terminal.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("machine:") and line.count(", "):
            return line.split(", ")[1].split()[0]
    return "-"


class LineTimes(threading.Thread):
    """When the first lines with these beginnings appear in a file that another process writes: a stage does
    not say by itself how long its reference took. Looks fifty times a second, until it has seen all."""

    def __init__(self, path: Path, beginnings: list[str]):
        super().__init__(daemon=True)
        self.path, self.beginnings, self.times, self.over = path, beginnings, {}, threading.Event()

    def __enter__(self):
        self.path.unlink(missing_ok=True)  # the lines of an earlier run
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        while len(self.times) < len(self.beginnings) and not self.over.wait(0.02):
            self.look()
        self.look()

    def look(self):
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        now = time.perf_counter()
        for beginning in self.beginnings:
            if beginning not in self.times and any(line.startswith(beginning) for line in lines):
                self.times[beginning] = now

    def between(self, first: str, last: str) -> float:
        if first not in self.times or last not in self.times:
            raise BenchError(f"{self.path} has no lines {first!r} and {last!r}: their seconds are not known")
        return self.times[last] - self.times[first]


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def tokens_per_second(marks) -> float:
    """marks: [tokens so far, seconds] at the end of each step. The first WARM_UP steps are not counted."""
    (tokens, seconds), (all_tokens, end) = marks[WARM_UP - 1], marks[-1]
    return (all_tokens - tokens) / (end - seconds)


def with_reference(run: dict) -> float:
    """Tokens per second of one epoch: a token takes its share of the reference pass and of training."""
    if run.get("reference_seconds") is None:  # there is none, or it is part of every step
        return run["tokens_per_second"]
    return 1 / (1 / run["tokens_per_second"] + run["reference_seconds"] / run["reference_tokens"])


def summary(runs: list[dict]) -> dict:
    """Repeats of one contender -> means, and by how much they differ; memory is the most of any."""
    speeds = [run["tokens_per_second"] for run in runs]
    seconds = [run["reference_seconds"] for run in runs if run.get("reference_seconds") is not None]
    shares = [run["cpu_share"] for run in runs if run.get("cpu_share") is not None]
    return dict(
        tokens_per_second=bench.mean(speeds),
        spread=bench.spread(speeds),
        with_reference=bench.mean([run["with_reference"] for run in runs]),
        reference_seconds=bench.mean(seconds) if seconds else None,
        rss_bytes=max((run["rss_bytes"] for run in runs if run["rss_bytes"]), default=None),
        cpu_share=min(shares, default=None),
        load_before=max(run["load_before"] for run in runs),
        tokens_per_step=runs[0]["marks"][-1][0] / len(runs[0]["marks"]),
        **{key: runs[0].get(key) for key in ("padding", "dtype", "isolates", "rss_before_training_bytes")},
        runs=runs,
    )


def compare(found: dict, figure: str) -> list[dict]:
    """For each of ours: the peer that is best in `figure`, the one that needs least memory, and the ratios
    ours / peer (above 1: ours is faster; needs more)."""
    ours = [name for name in found if name.startswith("ours")]
    peers = [name for name in found if name not in ours]
    if not peers:
        return []
    fastest = max(peers, key=lambda name: found[name][figure])
    leanest = min(peers, key=lambda name: found[name]["rss_bytes"] or 0)
    return [
        dict(
            ours=name,
            figure=figure,
            peer=fastest,
            ratio=found[name][figure] / found[fastest][figure],
            memory=memory_ratio(found[name], found[fastest]),
            leanest=leanest,
            leanest_memory=memory_ratio(found[name], found[leanest]),
        )
        for name in ours
    ]


def memory_ratio(a: dict, b: dict) -> float | None:
    return a["rss_bytes"] / b["rss_bytes"] if a["rss_bytes"] and b["rss_bytes"] else None


def times(ratio) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


# --------------------------------------------------------------------------------------------------
# The whole comparison
# --------------------------------------------------------------------------------------------------


def bench_stage(args) -> dict:
    require_packages(args)
    if not args.data_path.is_file():
        raise BenchError(f"--data_path {args.data_path} does not exist: give a file of {ROWS[args.task]}")
    args.shape, machine = bench.describe(args)
    if args.shape["use_moe"]:
        raise BenchError("mixtures of experts are not compared: peft adapts their experts in another way")
    say(f"machine    {bench.machine_line(machine)}")
    bench.warn_if_busy(args)
    if args.peer_dtype == "auto":
        args.peer_dtype = machine["dtype"]
    prepared = args.prepared = run_job(
        args,
        "prepare",
        "prepare",
        data_path=args.data_path.resolve(),
        folder=args.work_dir / "stage",
        batch_size=args.batch_size,
        peer_batch=args.peer_batch or args.batch_size,
    )
    units = UNITS[args.task]
    say(f"data       {prepared['rows']:,} {units}, {prepared['rows_tokens']:,} tokens")
    say(
        f"an update  ours {args.batch_size} {'packed rows' if args.task == 'lora' else units}, an unpacked "
        f"peer {prepared['micro_batch']} x {prepared['accumulation']} {units}"
    )
    known = versions()
    say("peers      " + ", ".join(f"{name} {version}" for name, version in known.items() if version))
    found = measure(args)
    result = dict(command=args.command_line, machine=machine, shape=args.shape, threads=args.threads)
    result |= dict(steps=args.steps, batch_size=args.batch_size, max_seq_len=args.max_seq_len)
    result |= dict(prepared={k: v for k, v in prepared.items() if k not in ("data", "examples", "weights")})
    return result | dict(versions=known, contenders=found) | report(args, found, machine)


def require_packages(args):
    """Say what is missing before anything is measured."""
    needed = ("peft", "trl", "datasets") if args.task == "lora" else ("trl", "datasets")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing and any(not name.startswith("ours") for name in args.contenders):
        raise BenchError(f"{' and '.join(missing)} not installed: pip install -r requirements-dev.txt")


def versions() -> dict:
    from importlib import metadata

    known = {}
    for name in ("peft", "trl", "transformers", "accelerate"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = None
    return known


def measure(args) -> dict:
    """Contenders in turn, `--repeats` times, so that a slow minute of the machine hits everybody."""
    say(f"\n{args.repeats} rounds of {args.steps} steps each, in turn; the first {WARM_UP} are not counted")
    runs = {name: [] for name in args.contenders}
    for number in range(args.repeats):
        for name in args.contenders:
            run = (run_ours if name.startswith("ours") else run_peer)(args, name, number)
            run["tokens_per_second"] = tokens_per_second(run["marks"])
            run["with_reference"] = with_reference(run)
            runs[name].append(run)
            say(
                f"  round {number + 1} {NAMES[args.task][name]:24} {run['tokens_per_second']:10,.0f} tokens/s"
            )
    return {name: summary(of_name) for name, of_name in runs.items()}


def report(args, found, machine) -> dict:
    """Print the table, the ratios and what to know about them; return ratios and rows of the ledger."""
    names, dpo = NAMES[args.task], args.task == "dpo"
    figures = list(FIGURES) if dpo else ["tokens_per_second"]
    mine = found.get("ours") or found.get("ours_float32")
    rows = []
    for name, of_name in found.items():
        row = [names[name], f"{of_name['tokens_per_second']:,.0f}", bench.percent(of_name["spread"])]
        if dpo:
            seconds = of_name["reference_seconds"]
            row += [
                "in the step" if seconds is None else f"{seconds:.1f}",
                f"{of_name['with_reference']:,.0f}",
            ]
        row += [f"{of_name['tokens_per_step']:,.0f}", bench.percent(of_name["padding"]), of_name["dtype"]]
        row += [bench.gigabytes(of_name["rss_bytes"]), bench.percent(of_name["cpu_share"])]
        if mine:
            row += [times(mine[figures[0]] / of_name[figures[0]]), times(memory_ratio(mine, of_name))]
        rows.append(row)
    head = ["contender", "tokens/s", "spread", *(["reference s", "with reference"] if dpo else [])]
    head += ["tokens/step", "padding", "dtype", "peak GB", "CPU share"]
    head += ["ours / it: speed", "ours / it: memory"] if mine else []
    say("\n" + bench.table(head, rows))
    for name, of_name in found.items():
        if of_name["isolates"] is not None:
            does = (
                "do not see each other" if of_name["isolates"] else "SEE EACH OTHER: it computes another loss"
            )
            say(f"{names[name]}: packed documents {does}")
    ratios = [row for figure in figures for row in compare(found, figure)]
    for row in ratios:
        say(
            f"{names[row['ours']]} / fastest peer ({names[row['peer']]}): {times(row['ratio'])} "
            f"{FIGURES[row['figure']]}, {times(row['memory'])} memory; "
            f"/ leanest peer ({names[row['leanest']]}): {times(row['leanest_memory'])} memory"
        )
    return dict(ratios=ratios, rows=ledger_rows(args, found, ratios, machine))


def ledger_rows(args, found, ratios, machine) -> list[str]:
    """One row: the first of ours over the fastest peer, and in brackets what else was compared."""
    if not ratios:
        return []
    first, *others = ratios
    names = NAMES[args.task]

    def shown(name):
        of_name = found[name]
        speed = f"{of_name[first['figure']]:,.0f} {FIGURES[first['figure']]}"
        return f"{names[name]} ({of_name['dtype']}): {speed}, {bench.gigabytes(of_name['rss_bytes'])} GB"

    more = [f"memory {times(first['memory'])}"]
    for row in others:
        label = names[row["ours"]] if row["ours"] != first["ours"] else ""
        label += f" {FIGURES[row['figure']]}" if row["figure"] != first["figure"] else ""
        more.append(f"{label.strip()} {times(row['ratio'])}")
    note = bench.noisy(args, *found.values())
    a, b = f"{args.task}: {shown(first['peer'])}", shown(first["ours"])
    ratio = f"{times(first['ratio'])} ({', '.join(more)})"
    return [bench.ledger_row(args, a, b, ratio, machine, note)]


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = bench.BenchParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="lora|dpo")
    for name, text in (("lora", "train_lora.py and peft"), ("dpo", "train_dpo.py and trl")):
        task = tasks.add_parser(
            name, help=text, description=text, formatter_class=HelpFormatter, allow_abbrev=False
        )
        add_flags(task, name)
    args = parser.parse_args(argv)
    reason = settle(args)
    if reason:
        parser.error(reason)
    args.command_line = bench.command_line(argv).replace("bench.py", "bench_stages.py", 1)
    return args


def add_flags(parser, stage):
    bench.flags(
        parser,
        "model (without --preset: 256 x 6)",
        ("preset", str, None, "one of the model's presets, such as minimind2-small"),
        *((name, positive_int, None, "as in the stages") for name in bench.SHAPE_FLAGS),
        ("qk_norm", switch, None, "0 or 1; without --preset 1. 0 is transformers' Llama, 1 its Qwen3"),
    )
    bench.flags(
        parser,
        "what is compared",
        ("data_path", Path, None, f"required: .jsonl file of {ROWS[stage]}"),
        (
            "contenders",
            bench.names,
            None,
            f"A,B from {', '.join(NAMES[stage])}; without it all but _defaults",
        ),
        ("max_seq_len", positive_int, LENGTHS[stage], "longer examples are left out"),
        ("batch_size", positive_int, 16, "rows of one of our updates" if stage == "lora" else "pairs"),
        ("steps", positive_int, 20, f"optimizer steps of a run; the first {WARM_UP} are not counted"),
        ("repeats", positive_int, 2, "runs of each contender, in turn"),
    )
    bench.flags(
        parser,
        "settings of the contenders",
        *([("lora_rank", positive_int, 8, "of both sides' adapters")] if stage == "lora" else []),
        (
            "peer_batch",
            positive_int,
            None,
            "most examples of a peer in memory at once; without it --batch_size",
        ),
        *(
            [
                (
                    "packed_rows",
                    positive_int,
                    1,
                    "of ours and peft_packed at once; it makes one long sequence of them",
                )
            ]
            if stage == "lora"
            else []
        ),
        ("peer_dtype", str, "auto", "float32, bfloat16 (autocast), or auto = the machine's best"),
        ("ours_flags", shlex.split, (), "'--FLAG X ...': more flags for our stage"),
    )
    bench.flags(
        parser,
        "run",
        ("threads", count, 0, "CPU threads of every contender, 0 = all cores"),
        ("seed", count, 42, "weights and order"),
        ("quick", bench.ON, None, "tiny sizes, seconds: does it run at all?"),
        ("out_dir", Path, ROOT / "out" / "bench", "folder of logs and results"),
        ("json", Path, None, "file of the result; without it in --out_dir"),
        ("ledger", bench.ON, None, "append a row to docs/benchmarks.md"),
    )


def settle(args) -> str | None:
    """Fill in what depends on other flags; a reason when they make no sense together."""
    if args.data_path is None:
        return f"--data_path is missing: give a .jsonl file of {ROWS[args.task]}"
    known = NAMES[args.task]
    args.contenders = args.contenders or [name for name in known if not name.endswith("_defaults")]
    unknown = [name for name in args.contenders if name not in known]
    if unknown:
        return f"--contenders {unknown[0]}: choose from {', '.join(known)}"
    if args.peer_dtype not in bench.CHOICES["peer_dtype"]:
        return f"--peer_dtype {args.peer_dtype}: choose from {', '.join(bench.CHOICES['peer_dtype'])}"
    if args.quick:
        args.steps, args.repeats, args.batch_size = min(args.steps, 4), 1, min(args.batch_size, 4)
        args.max_seq_len = min(args.max_seq_len, 128)
        if not args.preset and args.hidden_size is None:
            args.hidden_size, args.num_hidden_layers = 64, 2
    elif not args.preset:
        args.hidden_size, args.num_hidden_layers = args.hidden_size or 256, args.num_hidden_layers or 6
    if args.steps <= WARM_UP:
        return f"--steps {args.steps}: the first {WARM_UP} are not counted, so there must be more"
    args.device = "cpu"
    args.threads = args.threads or bench.available_cores()
    args.out_dir = args.out_dir.resolve()
    args.work_dir = args.out_dir / "work" / f"{args.task}_{os.getpid()}"
    return None


def main(args):
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        result = bench_stage(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    bench.finish(args, result)
    bench.remove_folder(args.work_dir)


if __name__ == "__main__":
    main(parse_args())
