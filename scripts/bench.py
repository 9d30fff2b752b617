"""One command per claim: compare this repository with its peers in one run, on one machine, on the same text.

    python scripts/bench.py train --data_path FILE             tokens/s, memory, MFU against transformers
    python scripts/bench.py train --data_path FILE --minimind DIR --minutes 8   time to the same quality
    python scripts/bench.py generate                           tokens/s against transformers' generate
    python scripts/bench.py data --data_path FILE              cache, packing, batches per second

Peers: transformers' own Qwen3 with the usual loop, and a MiniMind checkout given by path (its model, data set
class and recipe, as it ships). Every contender runs in a process of its own, with the same number of threads,
on the same training text, and is scored on the same held-out text by the same definition of bits per byte.
What is counted differs in the peers' favour: their clock starts at the first step, ours with the process.
Results go to out/bench/ as JSON; --ledger appends a row to docs/benchmarks.md.
"""

import argparse
import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from trainer.cli import HelpFormatter, count, number_type, positive_float, positive_int, switch

WORKER = ROOT / "scripts" / "bench_contenders.py"
LEDGER = ROOT / "docs" / "benchmarks.md"
SHAPE_FLAGS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)
NAMES = {
    "ours": "ours",
    "transformers": "transformers Qwen3",
    "minimind": "MiniMind as shipped",
    "minimind_fast": "MiniMind, patched",
}


CHOICES = {
    "contenders": list(NAMES),
    "device": ["auto", "cpu", "cuda"],
    "clock": ["wall", "cpu"],
    "peer_dtype": ["auto", "float32", "bfloat16"],
    "dtypes": ["float32", "bfloat16", "float16", "int8"],
}


class BenchError(ValueError):
    """The message is one line that says what to do."""


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------
# This process imports no torch: a child's peak memory, as the kernel counts it, is never below its parent's.


def run_process(command, env=None, log=None) -> dict:
    """Run to the end -> wall seconds, CPU seconds (children included), peak memory, load before. Raises
    BenchError with the last lines of its output when it fails."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    log = Path(log)
    with log.open("wb") as sink:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=sink, stderr=subprocess.STDOUT, env=env
        )
        usage = None
        try:
            if hasattr(os, "wait4"):
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            else:
                process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        wall = time.perf_counter() - started
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        shown = shlex.join(str(part) for part in command)
        raise BenchError(f"{shown} ended with {process.returncode}; the end of {log}:\n" + "\n".join(tail))
    return dict(
        wall_seconds=wall,
        cpu_seconds=usage.ru_utime + usage.ru_stime if usage else None,
        rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) if usage else None,
        load_before=load,
    )


def run_job(args, kind, name, **job) -> dict:
    """One job of bench_contenders.py in a fresh process: its result and what the kernel counted."""
    folder = args.work_dir / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    job_path, result_path = folder / f"{name}.job.json", folder / f"{name}.result.json"
    job = dict(kind=kind, threads=args.threads, device=args.device, seed=args.seed) | job
    job_path.write_text(json.dumps(job, indent=1, default=str), encoding="utf-8")
    result_path.unlink(missing_ok=True)
    measured = run_process(
        [sys.executable, WORKER, job_path, result_path], environment(args), folder / f"{name}.log"
    )
    return measured | json.loads(result_path.read_text(encoding="utf-8"))


def environment(args, fresh_compile: Path | None = None) -> dict:
    """The same threads for everybody. Compiled code is kept within one bench, or in the empty folder
    `fresh_compile`, so that compiling counts."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "MKL_NUM_THREADS": str(args.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(args.threads),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(args.work_dir / "hf_datasets"),
        "TORCHINDUCTOR_CACHE_DIR": str(fresh_compile or args.work_dir / "inductor"),
    }
    return env


def cpu_share(result: dict, threads: int, cpu="cpu_seconds", wall="wall_seconds") -> float | None:
    """CPU seconds per wall second and thread: well below 1 means that others had the machine."""
    if not result.get(cpu):
        return None
    return result[cpu] / (result[wall] * threads)


# --------------------------------------------------------------------------------------------------
# Data: one split for everybody
# --------------------------------------------------------------------------------------------------


def split_text(data_path: Path, folder: Path, val_fraction: float, seed: int = 0) -> tuple[Path, Path]:
    """Write train.jsonl and val.jsonl. The hash of its text holds a document out: copies stay together.
    Another seed holds others out, for figures on text that no setting was chosen by."""
    if not data_path.is_file():
        raise BenchError(
            f"--data_path {data_path} does not exist: give a .jsonl file of {{'text': ...}} lines"
        )
    stat = data_path.stat()
    key = hashlib.sha256(
        f"{data_path.resolve()} {stat.st_size} {stat.st_mtime_ns} {val_fraction} {seed}".encode()
    ).hexdigest()[:12]
    folder = folder / f"split_{key}"
    train_path, val_path = folder / "train.jsonl", folder / "val.jsonl"
    if train_path.exists() and val_path.exists():
        return train_path, val_path
    folder.mkdir(parents=True, exist_ok=True)
    parts = [path.with_suffix(".part") for path in (train_path, val_path)]
    counts = [0, 0]
    with data_path.open(encoding="utf-8") as source, parts[0].open("w", encoding="utf-8") as train:
        with parts[1].open("w", encoding="utf-8") as val:
            for number, line in enumerate(source, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                    digest = hashlib.sha256((f"{seed} " * bool(seed) + text).encode()).digest()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise BenchError(f"{data_path}:{number}: not a {{'text': '...'}} line") from None
                held_out = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
                counts[held_out] += 1
                (val if held_out else train).write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if not all(counts):
        raise BenchError(
            f"{data_path}: {counts[0]} documents to train on and {counts[1]} held out; give more text or "
            "another --val_fraction"
        )
    parts[1].replace(val_path)
    parts[0].replace(train_path)
    return train_path, val_path


# --------------------------------------------------------------------------------------------------
# train
# --------------------------------------------------------------------------------------------------


def bench_train(args) -> dict:
    train_path, val_path = split_text(args.data_path, args.out_dir, args.val_fraction, args.split_seed)
    args.train_path, args.val_path = train_path.resolve(), val_path.resolve()
    args.shape, machine = describe(args)
    args.machine = machine
    args.work_dir.mkdir(parents=True, exist_ok=True)
    result = dict(
        command=args.command_line,
        machine=machine,
        shape=args.shape,
        threads=args.threads,
        train_bytes=args.train_path.stat().st_size,
        contenders={},
    )
    say(f"machine    {machine_line(machine)}")
    say(
        f"text       {result['train_bytes'] / 1e6:.1f} MB to train on, {args.val_bytes / 1e3:.0f} kB of the "
        f"held-out part to score ({args.val_path.parent})"
    )
    warn_if_busy(args)
    if args.minimind and args.tune_minimind:
        result["tuning"] = tune_minimind(args)
    if "ours" in args.contenders:
        say("building the token cache of ours (not counted) ...")
        warm = run_ours(args, "warm", ["--max_steps", "1", *(long_run_flags(args) if args.seconds else [])])
        args.our_data = result["our_data"] = run_job(
            args,
            "our_data",
            "our_data",
            train_path=args.train_path,
            tokenizer=args.tokenizer,
            max_seq_len=warm["max_seq_len"],
        )
    if args.seconds > 0:
        measure_throughput(args, result)
    if args.minutes > 0:
        measure_quality(args, result)
    return result


def describe(args) -> tuple[dict, dict]:
    """The shape as a dictionary of MiniMindConfig fields, and the machine."""
    overrides = {name: getattr(args, name) for name in SHAPE_FLAGS if getattr(args, name) is not None}
    if args.qk_norm is not None:
        overrides["qk_norm"] = bool(args.qk_norm)
    elif not args.preset:
        overrides["qk_norm"] = True  # as both peers
    found = run_job(
        args, "describe", "describe", preset=args.preset, overrides=overrides, max_seq_len=args.max_seq_len
    )
    return found["shape"], found["machine"]


def peer_job(args, contender, **more) -> dict:
    fast = contender == "minimind_fast"
    job = dict(
        contender=contender,
        train_path=args.train_path,
        tokenizer=args.tokenizer,
        shape=args.shape,
        max_seq_len=args.max_seq_len,
        workers=args.workers,
        clock=args.clock,
        minimind=args.minimind,
        learning_rate=args.minimind_lr,
        batch_size=args.minimind_batch,
        accumulation=args.minimind_accum,
        autocast=args.device == "cuda",
        compile=False,
    )
    if fast:
        job.update(autocast=job["autocast"] or args.minimind_autocast, compile=args.minimind_compile)
    elif contender == "transformers":
        job.update(
            learning_rate=args.peer_lr or args.minimind_lr,
            batch_size=args.peer_batch or args.minimind_batch,
            accumulation=args.peer_accum or args.minimind_accum,
            autocast=contender_dtype(args, contender, args.machine) == "bfloat16",
            compile=args.peer_compile,
        )
    return job | more


def run_peer(args, contender, name, seconds, score=False, **more) -> dict:
    weights = args.work_dir / f"{name}.pth" if score else None
    result = run_job(
        args, "train", name, **peer_job(args, contender, seconds=seconds, weights=weights, **more)
    )
    if score:
        result |= evaluate(args, contender, name, weights)
    return result


def evaluate(args, contender, name, weights, val_bytes=None) -> dict:
    scored = run_job(
        args,
        "evaluate",
        f"{name}_score",
        contender=contender,
        weights=weights,
        shape=args.shape,
        tokenizer=args.tokenizer,
        minimind=args.minimind,
        val_path=args.val_path,
        val_bytes=val_bytes or args.val_bytes,
    )
    Path(weights).unlink(missing_ok=True)
    return {key: scored[key] for key in scored if key.startswith(("bpb", "val_", "longest"))}


def run_ours(args, name, more, cold_compile=False) -> dict:
    """The pretraining stage as a user starts it, on the clock from its process' start to its end."""
    folder = args.work_dir / f"ours_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    fresh = None
    if cold_compile:
        fresh = folder / "inductor"
        remove_folder(fresh)
    command = [sys.executable, ROOT / "trainer" / "train_pretrain.py"]
    command += ["--data_path", args.train_path, "--val_fraction", 0, "--seed", args.seed]
    command += ["--save_dir", folder, "--checkpoint_dir", folder / "checkpoints", "--save_weight", "bench"]
    command += ["--num_threads", args.threads, "--device", args.device, "--log_interval", 1]
    command += ours_shape_flags(args) + more + list(args.ours_flags)
    result = run_process(command, environment(args, fresh), folder / "terminal.log")
    result |= read_our_log(folder)
    result["cpu_share"] = cpu_share(result, args.threads)
    result["weights"] = next(iter(sorted(folder.glob("bench_*.pth"))), None)
    if fresh is not None:
        remove_folder(fresh)
    return result


def long_run_flags(args) -> list:
    """A run of seconds is not compiled by itself, and on a CPU it chooses small steps of short rows; speed is
    about long runs."""
    compiler = args.device == "cuda" or any(map(shutil.which, ("g++", "clang++", "cl")))
    flags = ["--use_compile", int(bool(compiler))]
    return flags + (["--batch_size", 8, "--max_seq_len", args.max_seq_len] if args.device == "cpu" else [])


def ours_shape_flags(args) -> list:
    flags = ["--preset", args.preset] if args.preset else []
    names = [*SHAPE_FLAGS, "head_dim", "rms_norm_eps", "rope_theta", "qk_norm"]
    return flags + [part for name in names for part in (f"--{name}", plain(args.shape[name]))]


def plain(value):
    return int(value) if isinstance(value, bool) else value


def remove_folder(folder: Path):
    shutil.rmtree(folder, ignore_errors=True)


def read_our_log(folder: Path) -> dict:
    """Speed of the steady part of a run from its log: the first quarter of the lines, which warms up, is left
    out. The log also counts the first token of each document, which is not predicted."""
    lines = [json.loads(x) for x in (folder / "bench_log.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(line for line in lines if line.get("event") == "start")
    steps = [line for line in lines if "tokens_per_s" in line]
    if not steps:
        raise BenchError(f"{folder / 'bench_log.jsonl'} holds no training step: give it more time")
    steady = steps[len(steps) // 4 :] if len(steps) > 3 else steps[-1:]
    seconds = [b["time_s"] - a["time_s"] for a, b in zip(steady, steady[1:])]
    updates = [b["step"] - a["step"] for a, b in zip(steady, steady[1:])]
    return dict(
        tokens_per_second=middle([line["tokens_per_s"] for line in steady]),
        step_seconds=middle([s / n for s, n in zip(seconds, updates)]),
        updates=steps[-1]["step"],
        tokens=steps[-1]["tokens"],
        last_loss=steps[-1]["loss"],
        memory_gb=steps[-1].get("memory_gb"),
        max_seq_len=start["args"]["max_seq_len"],
        batch_size=start["args"]["batch_size"],
        accumulation=start["args"]["accumulation_steps"],
    )


def tune_minimind(args) -> list[dict]:
    """Short runs over learning rate x accumulation x batch; the lowest bits per byte becomes the setting."""
    say(f"looking for MiniMind's best setting, {args.tune_seconds:g} s each ...")
    tried = []
    for batch in args.tune_batches:
        for accumulation in args.tune_accums:
            for lr in args.tune_lrs:
                name = f"tune_{lr:g}_{batch}x{accumulation}"
                more = dict(learning_rate=lr, batch_size=batch, accumulation=accumulation)
                weights = args.work_dir / f"{name}.pth"
                job = peer_job(args, "minimind", seconds=args.tune_seconds, weights=weights, **more)
                run = run_job(args, "train", name, **job) | more
                run |= evaluate(args, "minimind", name, weights, val_bytes=args.val_bytes // 4)
                tried.append(run)
                say(
                    f"  lr {lr:g}, batch {batch} x {accumulation}: {run['bpb']:.3f} bpb, "
                    f"{run['updates']} updates"
                )
    best = min(tried, key=lambda run: run["bpb"])
    args.minimind_lr, args.minimind_batch = best["learning_rate"], best["batch_size"]
    args.minimind_accum = best["accumulation"]
    say(f"  chosen: lr {args.minimind_lr:g}, batch {args.minimind_batch} x {args.minimind_accum}")
    return tried


def measure_throughput(args, result):
    """Short runs in turn, `--rounds` times, so that a slow minute of the machine hits everybody."""
    say(f"\nspeed: {args.rounds} rounds of {args.seconds:g} s each, in turn")
    runs = {name: [] for name in args.contenders}
    for number in range(args.rounds):
        for name in args.contenders:
            if name == "ours":
                minutes = ["--max_minutes", (args.seconds + args.allowance) / 60]
                run = run_ours(args, f"speed_{number}", minutes + long_run_flags(args))
                Path(run["weights"]).unlink(missing_ok=True)
                if args.device == "cuda":
                    run["cuda_peak_bytes"] = run["memory_gb"] * 1e9
                data = args.our_data
                run["tokens_per_second"] *= data["num_targets"] / data["num_tokens"]
                run["bytes_per_second"] = run["tokens_per_second"] * data["num_bytes"] / data["num_targets"]
                run["padding"] = data["padding_percent"] / 100
            else:
                run = run_peer(args, name, f"{name}_speed_{number}", args.seconds)
                run["tokens_per_second"] = run["tokens"] / run["train_seconds"]
                run["bytes_per_second"] = run["bytes"] / run["train_seconds"]
                run["padding"] = 1 - run["tokens"] / run["slots"]
                run["batch_size"] = peer_job(args, name)["batch_size"]
                run["max_seq_len"] = args.max_seq_len
                run["cpu_share"] = cpu_share(run, args.threads, "train_cpu_seconds", "train_seconds")
            runs[name].append(run)
            say(f"  round {number + 1} {NAMES[name]:32} {run['tokens_per_second']:10,.0f} tokens/s")
    machine = result["machine"]
    rows = []
    for name, all_runs in runs.items():
        run = dict(all_runs[0])
        for key in ("tokens_per_second", "bytes_per_second", "step_seconds"):
            run[key] = middle([r[key] for r in all_runs if r.get(key) is not None])
        run["spread"] = spread([r["tokens_per_second"] for r in all_runs])
        dtype = contender_dtype(args, name, machine)
        run["dtype"] = dtype
        peak = machine["peaks"].get(dtype) or machine["peaks"]["float32"]  # what 8-bit products replace
        run["mfu"] = run["tokens_per_second"] * machine["flops_per_token"] / peak
        run.pop("weights", None)
        result["contenders"][name] = run
        rows.append(
            [
                NAMES[name],
                f"{run['tokens_per_second']:,.0f}",
                f"{run['bytes_per_second'] / 1e3:,.1f}" if run.get("bytes_per_second") else "-",
                percent(run["padding"]),
                f"{run['batch_size']} x {run['max_seq_len']}",
                dtype,
                f"{100 * run['mfu']:.1f} %",
                gigabytes(run.get("cuda_peak_bytes") or run.get("rss_bytes")),
                f"{run['step_seconds']:.3f}" if run.get("step_seconds") else "-",
                percent(run.get("cpu_share")),
            ]
        )
    head = "contender, tokens/s, kB/s, padding, rows, dtype, MFU, peak GB, s/step, CPU share".split(", ")
    say("\n" + table(head, rows))
    ours = result["contenders"].get("ours")
    for name in args.contenders:
        peer = result["contenders"][name]
        if ours and name != "ours":
            ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
            result.setdefault("rows", []).append(
                ledger_row(
                    args,
                    f"{NAMES[name]}: {speed_and_memory(peer)}",
                    f"ours: {speed_and_memory(ours)}",
                    f"{ratio:.2f}x",
                    machine,
                    noisy(args, ours, peer),
                )
            )
            say(f"ours / {NAMES[name]}: {ratio:.2f}x real tokens per second")


def speed_and_memory(run) -> str:
    memory = run.get("cuda_peak_bytes") or run["rss_bytes"]
    return f"{run['tokens_per_second']:,.0f} tokens/s, {gigabytes(memory)} GB"


def contender_dtype(args, name, machine) -> str:
    """What its matrix products are computed in. MiniMind ignores its --dtype on a CPU."""
    if name.startswith("minimind") and args.device == "cpu":
        return "bfloat16" if name == "minimind_fast" and args.minimind_autocast else "float32"
    if name == "transformers" and args.peer_dtype != "auto":
        return args.peer_dtype
    return machine["our_dtype" if name == "ours" else "dtype"]


def measure_quality(args, result):
    """Each peer trains for T minutes; ours for T / k, start-up and compilation included. Who is where?

    With --clock cpu the budgets are CPU seconds per thread: ours, which only knows the wall, is given as much
    more of it as others took in the run before."""
    T = 60 * args.minutes
    unit = "CPU seconds per thread" if args.clock == "cpu" else "s"
    say(
        f"\nquality: peers train {T:.0f} {unit} from their first step; "
        f"ours T/{', T/'.join(f'{k:g}' for k in args.fractions)}"
    )
    peers = [name for name in args.contenders if name != "ours"]
    table_rows, runs, share = [], [], 1.0
    for seed in args.seeds:
        args.seed = seed
        for name in peers:
            run = run_peer(args, name, f"{name}_quality_{seed}", T, score=True)
            run.update(name=name, seed=seed, counted_cpu=run["train_cpu_seconds"])
            run["counted_seconds"] = counted(args, run["train_seconds"], run["train_cpu_seconds"])
            share = run["cpu_share"] = cpu_share(run, args.threads, "train_cpu_seconds", "train_seconds")
            runs.append(run)
            say(f"  {NAMES[name]:32} {run['counted_seconds']:7.1f} s  {run['bpb']:.4f} bpb  (seed {seed})")
        if "ours" in args.contenders:
            for k in sorted(args.fractions, reverse=True):
                label = f"quality_{seed}_{k:g}"
                minutes = T / k / 60 / (share if args.clock == "cpu" else 1)
                run = run_ours(args, label, ["--max_minutes", f"{minutes:.4f}"], cold_compile=True)
                share = run["cpu_share"] or 1
                run |= evaluate(args, "ours", f"ours_{label}", run.pop("weights"))
                run.update(name="ours", seed=seed, fraction=k, counted_cpu=run["cpu_seconds"])
                run["counted_seconds"] = counted(args, run["wall_seconds"], run["cpu_seconds"])
                runs.append(run)
                say(
                    f"  {f'ours, T/{k:g}':32} {run['counted_seconds']:7.1f} s  {run['bpb']:.4f} bpb  "
                    f"(seed {seed})"
                )
    for run in runs:
        label = NAMES[run["name"]] + (f", T/{run['fraction']:g}" if run["name"] == "ours" else "")
        table_rows.append(
            [
                label,
                str(run["seed"]),
                f"{run['counted_seconds']:.1f}",
                f"{run['counted_cpu']:.1f}" if run["counted_cpu"] else "-",
                f"{run['updates']:,}" if run.get("updates") else "-",
                f"{run['tokens'] / 1e6:.2f}" if run.get("tokens") else "-",
                f"{run['bpb']:.4f}",
                f"{run['bpb_document_starts']:.4f}" if run["bpb_document_starts"] else "-",
                percent(run["cpu_share"]),
            ]
        )
    head = ["contender", "seed", "seconds", "CPU s", "updates", "M tokens", "bpb", "bpb starts", "CPU share"]
    say("\n" + table(head, table_rows))
    result["quality"] = [{k: v for k, v in run.items() if k != "weights"} for run in runs]
    for name in peers:
        summarise_quality(args, result, name, runs)


def counted(args, wall, cpu) -> float:
    """The seconds a budget is about: of the wall, or on a busy machine of the CPU, per thread."""
    return cpu / args.threads if args.clock == "cpu" else wall


def summarise_quality(args, result, name, runs):
    """The shortest of our budgets whose mean bits per byte is at or below the peer's mean, over seeds."""
    peer = [run for run in runs if run["name"] == name]
    target, T = mean(run["bpb"] for run in peer), mean(run["counted_seconds"] for run in peer)
    T_cpu = mean(run["counted_cpu"] for run in peer)
    reached = None
    for k in sorted(args.fractions, reverse=True):
        ours = [run for run in runs if run["name"] == "ours" and run["fraction"] == k]
        if ours and mean(run["bpb"] for run in ours) <= target:
            reached = dict(
                fraction=k,
                bpb=mean(run["bpb"] for run in ours),
                seconds=mean(run["counted_seconds"] for run in ours),
                cpu_seconds=mean(run["counted_cpu"] for run in ours) if ours[0]["counted_cpu"] else None,
            )
            break
    setting = f"lr {args.minimind_lr:g}, batch {args.minimind_batch} x {args.minimind_accum}"
    if name == "transformers":
        setting = f"lr {args.peer_lr or args.minimind_lr:g}"
    unit = "CPU s per thread" if args.clock == "cpu" else "s"
    a = f"{NAMES[name]} ({setting}): {target:.3f} bpb after {T:.0f} {unit}"
    if reached:
        ratio = f"{T / reached['seconds']:.1f}x"
        if reached["cpu_seconds"] and args.device == "cpu" and args.clock == "wall":
            ratio += f" ({T_cpu / reached['cpu_seconds']:.1f}x in CPU seconds)"
        b = f"ours: {reached['bpb']:.3f} bpb after {reached['seconds']:.1f} {unit}, start-up included"
        say(f"{a}; {b}: {ratio} sooner")
    else:
        best = min((run for run in runs if run["name"] == "ours"), key=lambda run: run["bpb"], default=None)
        b = (
            f"ours: {best['bpb']:.3f} bpb after {best['counted_seconds']:.1f} {unit}"
            if best
            else "ours did not run"
        )
        ratio = "not reached"
        say(f"{a}; {b}: not reached in any budget")
    result.setdefault("summary", []).append(dict(peer=name, target=target, seconds=T, reached=reached))
    note = noisy(args, *peer, *[run for run in runs if run["name"] == "ours"])
    result.setdefault("rows", []).append(ledger_row(args, a, b, ratio, result["machine"], note))


# --------------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------------


def bench_generate(args) -> dict:
    args.shape, machine = describe(args)
    say(f"machine    {machine_line(machine)}")
    warn_if_busy(args)
    dtypes = args.dtypes or list(dict.fromkeys(["float32", machine["dtype"], machine["our_dtype"]]))
    if "float32" not in dtypes:
        dtypes.insert(0, "float32")  # greedy outputs are compared in it
    found = run_job(
        args,
        "generate",
        "generate",
        shape=args.shape,
        weights=args.weights,
        minimind=args.minimind,
        dtypes=dtypes,
        batches=args.batches,
        new_tokens=args.new_tokens,
        prompt_tokens=args.prompt_tokens,
        repeats=args.repeats,
        compile=args.compile,
    )
    speed = {(r["engine"], r["batch"]): r["tokens_per_second"] for r in found["results"]}
    names = list(dict.fromkeys(r["engine"] for r in found["results"]))
    rows = []
    for name in names:
        spreads = [spread(r["seconds"]) for r in found["results"] if r["engine"] == name]
        rows.append([name, *(f"{speed[name, b]:,.0f}" for b in args.batches), f"{100 * max(spreads):.0f} %"])
    head = ["tokens/s", *(f"batch {b}" for b in args.batches), "spread"]
    say(f"\n{args.prompt_tokens} prompt tokens, {args.new_tokens} new ones, median of {args.repeats} in turn")
    say(table(head, rows))
    same = "identical" if found["identical"] else "DIFFERENT"
    say(f"greedy tokens in float32, ours and transformers: {same} {found['different_tokens']} kinds of token")
    result = dict(command=args.command_line, machine=machine, shape=args.shape, **found, rows=[], ratios={})
    note = noisy(args, found)
    for peer in ("transformers", "MiniMind"):
        if not any(name.startswith(peer) for name in names):
            continue
        for b in args.batches:
            at_batch = {name: tokens for (name, batch), tokens in speed.items() if batch == b}
            theirs, ours, ratios = compare_generation(at_batch, peer, machine["our_dtype"])
            result["ratios"][f"{peer} {b}"] = ratios
            shown = [f"{ratio:.2f}x {what}" for what, ratio in ratios.items()]
            say(f"ours / {peer}, batch {b}: {', '.join(shown)}")
            a, c = (f"{name}: {at_batch[name]:,.0f} tokens/s at batch {b}" for name in (theirs, ours))
            result["rows"].append(
                ledger_row(args, a, c, f"{shown[0]} ({', '.join(shown[1:])})", machine, note)
            )
    return result


def compare_generation(speed: dict[str, float], peer: str, auto: str) -> tuple[str, str, dict[str, float]]:
    """Tokens/s of every engine at one batch size -> the peer's fastest engine, ours in what `--dtype auto`
    takes (compiled, if that was run; our fastest float type, if neither was), and the ratios, that first.
    Float types count as they are fastest, compiled or not."""
    theirs = max((name for name in speed if name.startswith(peer)), key=speed.get)
    floats = [name for name in speed if name.startswith("ours") and "int8" not in name]
    ours = best_float = max(floats, key=speed.get)
    ratios = {}
    for label in (f"{auto} compiled", auto):
        if f"ours {label}" in speed:
            ours = f"ours {label}" if not ratios else ours
            ratios[f"auto ({label})"] = speed[f"ours {label}"] / speed[theirs]
    ratios["best float type"] = speed[best_float] / speed[theirs]
    float32 = max(speed[name] for name in floats if name.startswith("ours float32"))
    ratios["both float32"] = float32 / speed[f"{peer} float32"]
    if auto != "int8" and "ours int8" in speed:
        ratios["int8"] = speed["ours int8"] / speed[theirs]
    return theirs, ours, ratios


# --------------------------------------------------------------------------------------------------
# data
# --------------------------------------------------------------------------------------------------


def bench_data(args) -> dict:
    if not args.data_path.is_file():
        raise BenchError(f"--data_path {args.data_path} does not exist: give a .jsonl file of texts")
    args.train_path = args.data_path.resolve()
    args.shape, machine = describe(args)
    say(f"machine    {machine_line(machine)}")
    warn_if_busy(args)
    common = dict(
        train_path=args.train_path,
        tokenizer=args.tokenizer,
        max_seq_len=args.max_seq_len,
        batch_size=args.batch_size,
        seconds=args.seconds,
        minimind=args.minimind,
    )
    cache = args.work_dir / "token_cache"
    size = args.train_path.stat().st_size
    result = dict(command=args.command_line, machine=machine, bytes=size, rows=[])
    cold = run_job(args, "our_data", "data_cold", cache_dir=cache, **(common | {"seconds": 0}))
    warm = run_job(args, "our_data", "data_warm", cache_dir=cache, **common)
    result.update(ours_cold=cold, ours=warm)
    built = cold["start_seconds"]
    say(
        f"\nours: cache built once in {built:.1f} s: {size / built / 1e6:.1f} MB/s, "
        f"{warm['num_tokens'] / built:,.0f} tokens/s; opened in {warm['start_seconds']:.2f} s afterwards"
    )
    say(
        f"packing: {warm['documents']:,} documents in {warm['rows']:,} rows of {warm['max_seq_len']}, "
        f"{100 - warm['padding_percent']:.1f} % filled, {warm['kept_percent']:.1f} % of the tokens kept, "
        f"{warm['num_bytes'] / warm['num_targets']:.2f} bytes per token"
    )
    per_token = warm["num_bytes"] / warm["num_targets"]
    rows = [data_row("ours, from the cache", warm, warm["tokens_per_second"] * per_token)]
    if args.minimind:
        theirs = run_job(args, "minimind_data", "data_minimind", **common)
        result["minimind"] = theirs
        rows.append(data_row("MiniMind, on the fly", theirs, theirs["bytes_per_second"]))
        ratio = warm["tokens_per_second"] / theirs["tokens_per_second"]
        result["rows"].append(
            ledger_row(
                args,
                f"MiniMind's data set, {args.threads} workers: {theirs['tokens_per_second']:,.0f} real "
                f"tokens/s, {theirs['padding_percent']:.0f} % padding",
                f"ours: {warm['tokens_per_second']:,.0f} real tokens/s, {warm['padding_percent']:.1f} % "
                f"padding (cache built at {size / built / 1e6:.1f} MB/s)",
                f"{ratio:.1f}x",
                machine,
                noisy(args, cold, warm, theirs),
            )
        )
    say("\n" + table(["loader", "start s", "batches/s", "real tokens/s", "MB/s", "padding"], rows))
    return result


def data_row(name, found, bytes_per_second):
    return [
        name,
        f"{found['start_seconds']:.2f}",
        f"{found['batches_per_second']:,.1f}",
        f"{found['tokens_per_second']:,.0f}",
        f"{bytes_per_second / 1e6:.1f}",
        f"{found['padding_percent']:.1f} %",
    ]


# --------------------------------------------------------------------------------------------------
# What is printed and kept
# --------------------------------------------------------------------------------------------------


def say(*words):
    print(*words, flush=True)


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else float("nan")


def middle(values):
    values = sorted(values)
    return values[len(values) // 2] if values else None


def spread(values):
    """(max - min) / median: how much rounds differ."""
    return (max(values) - min(values)) / middle(values) if len(values) > 1 else 0.0


def gigabytes(number):
    return "-" if not number else f"{number / 1e9:.2f}"


def percent(share):
    return "-" if share is None else f"{100 * share:.0f} %"


def table(head, rows):
    """A markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells):
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def machine_line(machine):
    peaks = ", ".join(f"{dtype} {flops / 1e9:,.0f} GFLOP/s" for dtype, flops in machine["peaks"].items())
    what = f"{machine['name']}, {machine['cores']} cores, {machine['capability']}"
    return f"{what}; {peaks}; torch {machine['torch']}"


def warn_if_busy(args):
    if not hasattr(os, "getloadavg"):
        return
    load = os.getloadavg()[0]
    busy = " - the machine is busy: wall-clock figures will be noisy" if load > 0.5 else ""
    say(f"threads    {args.threads} each; load average {load:.2f}{busy}")


def noisy(args, *runs):
    """Why a row should be read with care, or ''."""
    if args.quick:
        return "quick: sizes mean nothing"
    if args.device != "cpu":
        return ""
    load = max((run.get("load_before") or 0) for run in runs)
    shares = [run["cpu_share"] for run in runs if run.get("cpu_share") is not None]
    if load > args.threads + 0.75 or (shares and min(shares) < 0.8):
        return "noisy: shared machine"
    return ""


def commit():
    """The repository's commit, with + when files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "-"


def ledger_row(args, a, b, ratio, machine, note=""):
    date = datetime.date.today().isoformat()
    peaks = ", ".join(f"{d} {f / 1e9:,.0f}" for d, f in machine["peaks"].items())
    where = f"{machine['name']}, {machine['cores']} cores, {machine['capability']}"
    where += f" ({peaks} GFLOP/s)" if peaks else ""
    where += f", {args.threads} thread{'s' if args.threads > 1 else ''}"
    cells = [date, commit(), where, f"`{args.command_line}`", a, b, ratio + (f" ({note})" if note else "")]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def command_line(argv):
    """The command without this machine's folders and without where results go: a ledger is read elsewhere."""
    words, rest = ["bench.py"], list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("--json", "--out_dir"):
            rest[:1] = []
        elif word != "--ledger":
            words.append(Path(word).name if os.sep in word and not word.startswith("-") else word)
    return shlex.join(words)


def finish(args, result):
    args.out_dir.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
    path = args.json or args.out_dir / f"{args.task}_{stamp}.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    temporary.replace(path)
    say(f"\nresult     {path}")
    if args.ledger and result.get("rows"):
        with LEDGER.open("a", encoding="utf-8") as ledger:
            ledger.write("".join(row + "\n" for row in result["rows"]))
        say(f"ledger     {len(result['rows'])} rows added to {LEDGER.relative_to(ROOT)}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


class BenchParser(argparse.ArgumentParser):
    def error(self, message):
        print(f"{Path(self.prog.split()[0]).name}: {message} (--help lists all flags)", file=sys.stderr)
        raise SystemExit(2)


def numbers(kind):
    convert = number_type(kind, above=0)
    return lambda text: [convert(part) for part in text.split(",")]


def names(text):
    return text.split(",")


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = BenchParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="train|generate|data")
    for name, text, add_flags in (
        ("train", "training speed, memory and time to quality", add_train_flags),
        ("generate", "tokens per second of generation on the same weights", add_generate_flags),
        ("data", "token cache, packing and batches per second", add_data_flags),
    ):
        task = tasks.add_parser(
            name, help=text, description=text, formatter_class=HelpFormatter, allow_abbrev=False
        )
        add_common_flags(task)
        add_flags(task)
    args = parser.parse_args(argv)
    reason = settle(args)
    if reason:
        parser.error(reason)
    args.command_line = command_line(argv)
    return args


def flags(parser, title, *rows):
    """Add a group of flags, each a row (name, type, default, help); `ON` as type makes it a switch."""
    group = parser.add_argument_group(title)
    for name, kind, default, text in rows:
        if kind is ON:
            group.add_argument(f"--{name}", action="store_true", help=text)
        else:
            group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text)


ON = object()
seconds = number_type(float, low=0)


def add_common_flags(parser):
    flags(
        parser,
        "model (without --preset: 256 x 6)",
        ("preset", str, None, "one of the model's presets, such as minimind2-small"),
        *((name, positive_int, None, "as in the stages") for name in SHAPE_FLAGS),
        ("qk_norm", switch, None, "0 or 1; without --preset 1, as both peers have it"),
    )
    flags(
        parser,
        "run",
        ("threads", count, 0, "CPU threads of every contender, 0 = all cores"),
        ("device", str, "auto", "cpu, cuda, or auto = CUDA where there is a GPU"),
        ("minimind", Path, None, "folder of a MiniMind checkout to compare with"),
        ("seed", count, 42, "weights and order"),
        ("quick", ON, None, "tiny sizes, seconds: does it run at all?"),
        ("tokenizer", Path, ROOT / "model", "tokenizer of ours and transformers"),
        ("out_dir", Path, ROOT / "out" / "bench", "folder of splits, logs and results"),
        ("json", Path, None, "file of the result; without it in --out_dir"),
        ("ledger", ON, None, "append rows to docs/benchmarks.md"),
    )


def add_train_flags(parser):
    fraction = number_type(float, above=0, high=0.5)
    flags(
        parser,
        "what is compared",
        ("data_path", Path, None, "required: .jsonl file with a 'text' per line"),
        ("contenders", names, None, f"A,B from {', '.join(NAMES)}; without it all that can run"),
        ("val_fraction", fraction, 0.01, "share of the documents held out"),
        ("split_seed", int, 0, "which documents are held out"),
        ("val_bytes", positive_int, 400_000, "bytes of held-out text to score"),
        ("max_seq_len", positive_int, 340, "tokens in a row of the peers (MiniMind's default)"),
    )
    flags(
        parser,
        "speed",
        ("seconds", seconds, 45.0, "length of one run, 0 = no speed part"),
        ("rounds", positive_int, 2, "runs of each contender, in turn"),
        (
            "allowance",
            seconds,
            20.0,
            "more seconds for ours, whose --max_minutes counts start and compilation",
        ),
    )
    flags(
        parser,
        "time to quality",
        ("minutes", seconds, 0.0, "T: how long the peers train, 0 = no quality part"),
        ("fractions", numbers(float), (20.0, 12.0, 8.0), "K,K: ours gets T/K"),
        ("seeds", numbers(int), None, "N,N: repeat with these seeds; without it --seed"),
        ("clock", str, "wall", "what T counts: wall, or cpu = CPU seconds per thread, for a busy machine"),
    )
    flags(
        parser,
        "settings of the contenders",
        ("ours_flags", shlex.split, (), "'--FLAG X ...': more flags for trainer/train_pretrain.py"),
        ("minimind_lr", positive_float, 2e-3, "tuned in its favour; it ships with 5e-4"),
        ("minimind_batch", positive_int, 2, "rows per batch, tuned in its favour; it ships with 32"),
        ("minimind_accum", positive_int, 1, "batches per update; it ships with 8"),
        ("minimind_autocast", ON, None, "also MiniMind with a line it lacks: bfloat16 autocast on the CPU"),
        ("minimind_compile", ON, None, "also MiniMind with its --use_compile 1: torch.compile"),
        ("tune_minimind", ON, None, "first sweep MiniMind's settings, and take the best"),
        ("tune_seconds", positive_float, 60.0, "length of one run of the sweep"),
        ("tune_lrs", numbers(float), (1e-3, 2e-3, 3e-3, 5e-3), "learning rates to try"),
        ("tune_accums", numbers(int), (1,), "accumulations to try; it ships with 8"),
        ("tune_batches", numbers(int), (2, 4, 8), "batches to try"),
        ("peer_lr", positive_float, None, "transformers; without it as MiniMind"),
        ("peer_batch", positive_int, None, "transformers; without it as MiniMind"),
        ("peer_accum", positive_int, None, "transformers; without it as MiniMind"),
        (
            "peer_dtype",
            str,
            "auto",
            "transformers: float32, bfloat16 (autocast), or auto = the machine's best",
        ),
        ("peer_compile", ON, None, "transformers: torch.compile"),
        ("workers", count, None, "loader processes of the peers; without it 1, with CUDA 8"),
    )


def add_generate_flags(parser):
    flags(
        parser,
        "generation",
        ("weights", Path, None, "a weight file of ours; without it random weights"),
        ("batches", numbers(int), (1, 8, 64), "prompts at once"),
        ("new_tokens", positive_int, 256, "tokens every row makes, eos ignored"),
        ("prompt_tokens", positive_int, 64, "length of every prompt"),
        ("repeats", positive_int, 3, "runs of each engine, in turn; the median counts"),
        ("compile", switch, 1, "0 or 1: our engines also compiled, int8 and float32"),
        (
            "dtypes",
            names,
            None,
            "float32,bfloat16,int8 (ours only); without it float32, the machine's best and what auto takes",
        ),
    )


def add_data_flags(parser):
    flags(
        parser,
        "data",
        ("data_path", Path, None, "required: .jsonl file with a 'text' per line"),
        ("max_seq_len", positive_int, 340, "tokens in a row"),
        ("batch_size", positive_int, 32, "rows in a batch"),
        ("seconds", positive_float, 10.0, "how long batches are drawn"),
    )


def settle(args) -> str | None:
    """Fill in what depends on other flags; a reason when they make no sense together."""
    for name, known in CHOICES.items():
        value = getattr(args, name, known[0])
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one not in known:
                return f"--{name} {one}: choose from {', '.join(known)}"
    if args.task != "generate" and args.data_path is None:
        return "--data_path is missing: give a .jsonl file with a 'text' per line"
    if args.minimind is not None:
        args.minimind = args.minimind.expanduser().resolve()
        if not (args.minimind / "model" / "model_minimind.py").is_file():
            return f"--minimind {args.minimind} is no MiniMind checkout: model/model_minimind.py is not in it"
    args.threads = args.threads or available_cores()
    args.out_dir, args.tokenizer = args.out_dir.resolve(), args.tokenizer.resolve()
    args.work_dir = args.out_dir / "work" / f"{args.task}_{os.getpid()}"
    if args.device == "auto":  # without importing torch: a CUDA build and a driver
        args.device = (
            "cuda" if Path("/dev/nvidiactl").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
        )
    args.max_seq_len = getattr(args, "max_seq_len", 512)
    if args.task == "train":
        return settle_train(args)
    if args.quick and args.task == "generate":
        args.batches, args.new_tokens, args.prompt_tokens, args.repeats = [1, 2], 8, 8, 1
        args.compile = False  # takes longer than all the rest
        if not args.preset and args.hidden_size is None:
            args.hidden_size, args.num_hidden_layers = 64, 2
    if args.quick and args.task == "data":
        args.seconds = 0.5
    return None


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle_train(args) -> str | None:
    everyone = ["ours", "transformers"] + (["minimind"] if args.minimind else [])
    patches = [w for w in ("autocast", "compile") if getattr(args, f"minimind_{w}")]
    NAMES["minimind_fast"] = " + ".join(["MiniMind", *patches])
    if args.minimind and patches:
        everyone.append("minimind_fast")
    chosen = args.contenders or everyone
    for name in chosen:
        if name == "minimind_fast" and not patches:
            return "--contenders minimind_fast needs --minimind_autocast, --minimind_compile or both"
        if name.startswith("minimind") and not args.minimind:
            return f"--contenders {name} needs --minimind DIR, a MiniMind checkout"
    args.contenders = chosen
    if args.tune_minimind and not args.minimind:
        return "--tune_minimind needs --minimind DIR, a MiniMind checkout"
    if not args.seconds and not args.minutes:
        return "--seconds 0 without --minutes leaves nothing to do"
    if args.quick:
        args.seconds, args.rounds, args.allowance = min(args.seconds, 2.0), 1, 8.0
        args.val_bytes, args.minimind_batch = min(args.val_bytes, 8000), min(args.minimind_batch, 4)
        args.workers, args.tune_seconds, args.tune_batches = 0, 1.0, [4]
        if not args.preset and args.hidden_size is None:
            args.hidden_size, args.num_hidden_layers = 64, 2
        args.ours_flags = ["--max_seq_len", "64", "--batch_size", "4", "--use_compile", "0", *args.ours_flags]
        args.max_seq_len = min(args.max_seq_len, 64)
    elif not args.preset:
        args.hidden_size, args.num_hidden_layers = args.hidden_size or 256, args.num_hidden_layers or 6
    if args.workers is None:
        args.workers = min(8, available_cores()) if args.device == "cuda" else 1
    args.seeds = args.seeds or [args.seed]
    return None


def main(args):
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        result = {"train": bench_train, "generate": bench_generate, "data": bench_data}[args.task](args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finish(args, result)
    remove_folder(args.work_dir)


if __name__ == "__main__":
    main(parse_args())
