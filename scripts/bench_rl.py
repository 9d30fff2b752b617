"""One step of GRPO (rollout, reward, update) by ours, by MiniMind's loop and by trl's GRPOTrainer.

    python scripts/bench_rl.py --minimind DIR
    python scripts/bench_rl.py --data_path rlaif.jsonl --preset minimind2-small --contenders ours,trl_bfloat16

Everybody has a process of its own, the same weights, the same prompts in the same order, the same number of
threads and the same reward, and takes turns with the others. Nobody is compiled. Answers are sampled from the
whole distribution (temperature 1, no top-k, no top-p); random weights hardly ever end one early.

    ours, ours_float32    trainer/train_grpo.py, in --dtype auto and in float32; no reference (--beta 0)
    minimind              MiniMind's loop around the model of a checkout (--minimind DIR): every sample reads
                          its prompt, padded on the left; the cache is concatenated at every token; all is
                          scored by the sampler, the policy and a reference. float32, as it ships on a CPU
    minimind_shape        without a checkout: the same loop, around transformers' model
    trl, trl_bfloat16     GRPOTrainer without a reference, sampling with transformers, in float32 and in
                          bfloat16 (autocast); activations are kept, micro-batches of --trl_batch answers

A step's seconds are the median of the steps after --warmup. Where contenders sampled numbers of tokens that
differ by more than 2 %, seconds are scaled to the number that was asked for, and the output says so.
Peak memory is the resident set of the whole process, as the kernel counts it (CUDA: what torch allocated).
Results go to out/bench/ as JSON; --ledger appends a row to docs/benchmarks.md.
"""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts import bench
from scripts.bench import BenchError, say
from scripts.bench_stages import compute_type, memory_ratio, times, versions
from trainer.cli import HelpFormatter, count, number_type, positive_int, switch

WORKER = ROOT / "scripts" / "bench_rl_peers.py"
NAMES = {
    "ours": "ours",
    "ours_float32": "ours float32",
    "minimind": "MiniMind",
    "minimind_shape": "MiniMind's loop, transformers' model",
    "trl": "trl",
    "trl_bfloat16": "trl bfloat16",
}
RIVALS = (("minimind",), ("minimind_shape",), ("trl", "trl_bfloat16"))
SAME = 1.02  # numbers of tokens that are taken for equal
LEARNING_RATE = 1e-6
LEAST_SHARE = 0.6  # of the CPU; sampling leaves some of it idle on a quiet machine too


# --------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------


def run_job(args, kind, name, **job) -> dict:
    """One job of bench_rl_peers.py in a fresh process: its result and what the kernel counted."""
    folder = args.work_dir / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    job_path, result_path = folder / f"{name}.job.json", folder / f"{name}.result.json"
    job |= dict(
        kind=kind,
        shape=args.shape,
        steps=args.warmup + args.steps,
        prompts_per_step=args.prompts,
        num_generations=args.num_generations,
        max_gen_len=args.max_gen_len,
        learning_rate=LEARNING_RATE,
        threads=args.threads,
        device=args.device,
        seed=args.seed,
    )
    job_path.write_text(json.dumps(job, indent=1, default=str), encoding="utf-8")
    command = [sys.executable, WORKER, job_path, result_path]
    measured = bench.run_process(command, bench.environment(args), folder / f"{name}.log")
    return measured | json.loads(result_path.read_text(encoding="utf-8"))


def run_contender(args, name, number) -> dict:
    """A run: what bench_rl_peers.py found, what the kernel counted, and the compute type."""
    place = f"{name}_{number}"
    known = {key: args.prepared[key] for key in ("prompts", "weights")}
    if name.startswith("ours"):
        flags = [str(word) for word in our_flags(args, name, place)]
        run = run_job(args, "rl_ours", place, flags=flags, log=args.work_dir / "start" / f"{place}_log.jsonl")
        run["dtype"] = compute_type(args.work_dir / "jobs" / f"{place}.log")
    else:
        kind = "rl_minimind" if name.startswith("minimind") else "rl_trl"
        reduced = name == "trl_bfloat16" or (kind == "rl_minimind" and args.device == "cuda")  # as it ships
        dtype = "bfloat16" if reduced else "float32"
        known |= dict(contender=name, minimind=args.minimind, folder=args.work_dir / place, dtype=dtype)
        run = run_job(args, kind, place, micro_batches=micro_batches(args), **known) | dict(dtype=dtype)
    if not run["moved"] and not args.quick:  # of so few answers all may be worth the same
        raise BenchError(f"{NAMES[name]} made a step that moved no weight: it did less than the others")
    if args.device == "cuda":
        run["rss_bytes"], run["rss_before_bytes"] = run["cuda_peak_bytes"], None
    return run


def our_flags(args, name, place) -> list:
    """The stage, starting from the weights of everybody; --reward is added where it runs."""
    start = args.work_dir / "start"
    flags = ["--data_path", args.data_path, "--from_weight", "base", "--save_weight", place]
    flags += ["--save_dir", start, "--checkpoint_dir", args.work_dir / place, "--save_interval", 0]
    flags += ["--val_fraction", 0, "--val_interval", 0, "--tax_path", "none", "--use_compile", 0]
    flags += ["--max_seq_len", args.max_seq_len, "--batch_size", args.prompts]
    flags += ["--num_generations", args.num_generations, "--max_gen_len", args.max_gen_len]
    flags += ["--max_steps", args.warmup + args.steps, "--log_interval", 1, "--seed", args.seed]
    flags += ["--loss_type", "grpo", "--beta", 0, "--learning_rate", LEARNING_RATE]
    flags += ["--num_threads", args.threads, "--device", args.device, *bench.ours_shape_flags(args)]
    if name == "ours_float32":
        flags += ["--dtype", "float32"]
    return flags + list(args.ours_flags)


def micro_batches(args) -> int:
    """Of trl in a step: the fewest of equal size that hold at most --trl_batch answers."""
    answers = args.prompts * args.num_generations
    return next(n for n in range(1, answers + 1) if answers % n == 0 and answers // n <= args.trl_batch)


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def summary(runs: list[dict], warmup: int) -> dict:
    """Runs of one contender -> medians of the steps after the first `warmup` of each, their mean of sampled
    tokens, by how much the runs' medians differ, and the most memory of any run."""
    timed = [step for run in runs for step in run["steps"][warmup:]]
    found = {name: median([step[name] for step in timed]) for name in ("seconds", "rollout_s", "update_s")}
    above = [run["rss_bytes"] - run["rss_before_bytes"] for run in runs if run.get("rss_before_bytes")]
    return found | dict(
        tokens_per_step=bench.mean([step["sampled_tokens"] for step in timed]),
        spread=bench.spread([median([step["seconds"] for step in run["steps"][warmup:]]) for run in runs]),
        rss_bytes=max((run["rss_bytes"] for run in runs if run["rss_bytes"]), default=None),
        above_start_bytes=max(above, default=None),
        silent_share=max(run.get("silent_share", 0.0) for run in runs),
        load_before=max(run["load_before"] for run in runs),
        share=min((run["cpu_share"] for run in runs if run.get("cpu_share")), default=None),
        dtype=runs[0]["dtype"],
        runs=runs,
    )


def median(values) -> float:
    """The middle one, or the mean of the two in the middle."""
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def normalise(found: dict, wanted: int) -> bool:
    """Scale seconds to `wanted` sampled tokens where contenders sampled numbers that differ by more than 2 %;
    whether it was done. found: summaries by contender, changed in place."""
    tokens = [of_name["tokens_per_step"] for of_name in found.values()]
    if max(tokens) <= SAME * min(tokens):
        return False
    for of_name in found.values():
        for figure in ("seconds", "rollout_s", "update_s"):
            of_name[figure] *= wanted / of_name["tokens_per_step"]
    return True


def compare(found: dict) -> list[dict]:
    """For each of ours and each rival: its fastest variant, how many times ours is as fast, and the ratio of
    the peaks of memory, ours / rival. Whoever brought MiniMind's own model needs no stand-in for it."""
    rows = []
    for mine in (name for name in found if name.startswith("ours")):
        for variants in RIVALS:
            peers = [name for name in variants if name in found]
            if not peers or (peers == ["minimind_shape"] and "minimind" in found):
                continue
            peer = min(peers, key=lambda name: found[name]["seconds"])
            ratio = found[peer]["seconds"] / found[mine]["seconds"]
            memory = memory_ratio(found[mine], found[peer])
            rows.append(dict(ours=mine, peer=peer, ratio=ratio, memory=memory))
    return rows


# --------------------------------------------------------------------------------------------------
# The whole comparison
# --------------------------------------------------------------------------------------------------


def bench_rl(args) -> dict:
    require_packages(args)
    args.data_path = find_data(args)
    args.shape, machine = bench.describe(args)
    if args.shape["use_moe"]:
        raise BenchError("mixtures of experts are not compared: the peers balance their experts otherwise")
    args.contenders = args.contenders or default_contenders(args, machine)
    say(f"machine    {bench.machine_line(machine)}")
    bench.warn_if_busy(args)
    prepared = args.prepared = run_job(
        args,
        "rl_prepare",
        "prepare",
        data_path=args.data_path,
        max_seq_len=args.max_seq_len,
        weights=args.weights,
        folder=args.work_dir / "start",
    )
    say(f"data       {prepared['rows']:,} prompts; those used have {prepared['prompt_tokens']:.0f} tokens")
    wanted = args.prompts * args.num_generations * args.max_gen_len
    say(
        f"a step     {args.prompts} prompts x {args.num_generations} answers of at most {args.max_gen_len} "
        "tokens"
    )
    known = versions()
    say("peers      " + ", ".join(f"{name} {version}" for name, version in known.items() if version))
    found = measure(args)
    scaled = normalise(found, wanted)
    result = dict(command=args.command_line, machine=machine, shape=args.shape, threads=args.threads)
    result |= dict(steps=args.steps, warmup=args.warmup, wanted_tokens=wanted, scaled=scaled)
    return result | dict(versions=known, contenders=found) | report(args, found, machine, wanted, scaled)


def require_packages(args):
    """Say what is missing before anything is measured."""
    names = args.contenders or list(NAMES)
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing and any(name.startswith("trl") for name in names):
        raise BenchError(f"{' and '.join(missing)} not installed: pip install -r requirements-dev.txt")


def find_data(args) -> Path:
    """--data_path, or the embedded curriculum's prompts, written for this bench alone."""
    if args.data_path is None:
        from dataset import make_mini

        make_mini.make_mini(args.work_dir / "mini")
        return args.work_dir / "mini" / "rlaif.jsonl"
    if not args.data_path.is_file():
        raise BenchError(f"--data_path {args.data_path} does not exist: give a .jsonl file of prompts")
    return args.data_path.resolve()


def default_contenders(args, machine) -> list[str]:
    """bfloat16 only where the machine is faster in it."""
    names = ["ours", "minimind" if args.minimind else "minimind_shape", "trl"]
    return names + (["trl_bfloat16"] if machine["dtype"] == "bfloat16" else [])


def measure(args) -> dict:
    """Contenders in turn, `--repeats` times, so that a slow minute of the machine hits everybody."""
    say(f"\n{args.repeats} rounds of {args.warmup} + {args.steps} steps each, in turn")
    runs = {name: [] for name in args.contenders}
    for number in range(args.repeats):
        for name in args.contenders:
            runs[name].append(run_contender(args, name, number))
            seconds = median([step["seconds"] for step in runs[name][-1]["steps"][args.warmup :]])
            say(f"  round {number + 1} {NAMES[name]:36} {seconds:8.2f} s per step")
    return {name: summary(of_name, args.warmup) for name, of_name in runs.items()}


def report(args, found, machine, wanted, scaled) -> dict:
    """Print the table, the ratios and what to know about them; return ratios and rows of the ledger."""
    mine = next((found[name] for name in ("ours", "ours_float32") if name in found), None)
    rows = []
    for name, of_name in found.items():
        row = [NAMES[name], f"{of_name['seconds']:.2f}", bench.percent(of_name["spread"])]
        row += [f"{of_name['rollout_s']:.2f}", f"{of_name['update_s']:.2f}"]
        row += [f"{of_name['tokens_per_step']:,.0f}", of_name["dtype"], bench.gigabytes(of_name["rss_bytes"])]
        row += [bench.gigabytes(of_name["above_start_bytes"]), bench.percent(of_name["share"])]
        if mine:
            row += [times(of_name["seconds"] / mine["seconds"]), times(memory_ratio(mine, of_name))]
        rows.append(row)
    head = ["contender", "s/step", "spread", "rollout s", "update s", "sampled", "dtype", "peak GB"]
    head += ["above imports", "CPU share", *(["ours is faster", "ours / it: memory"] if mine else [])]
    say("\n" + bench.table(head, rows))
    if scaled:
        say(f"numbers of sampled tokens differ by more than 2 %: seconds are those of {wanted:,} tokens")
    for name, of_name in found.items():
        if of_name["silent_share"]:
            share = f"{100 * of_name['silent_share']:.0f} %"
            say(f"{NAMES[name]}: {share} of the groups had equal rewards, and were not computed")
    ratios = compare(found)
    for row in ratios:
        say(
            f"{NAMES[row['ours']]} is {times(row['ratio'])} as fast as {NAMES[row['peer']]}, "
            f"with {times(row['memory'])} its memory"
        )
    return dict(ratios=ratios, rows=ledger_rows(args, found, ratios, machine, wanted if scaled else 0))


def ledger_rows(args, found, ratios, machine, scaled_to=0) -> list[str]:
    """One row: the first of ours beside the fastest of each family of peers, and in brackets what else."""
    if not ratios:
        return []
    first = ratios[0]["ours"]
    main = [row for row in ratios if row["ours"] == first]
    others = [row for row in ratios if row["ours"] != first]

    def shown(name):
        of_name = found[name]
        text = f"{NAMES[name]} ({of_name['dtype']}): {of_name['seconds']:.2f} s/step"
        return text + f", {bench.gigabytes(of_name['rss_bytes'])} GB"

    parts = [f"{times(row['ratio'])} {NAMES[row['peer']]} (memory {times(row['memory'])})" for row in main]
    more = [f"{NAMES[row['ours']]} {times(row['ratio'])} {NAMES[row['peer']]}" for row in others]
    ratio = ", ".join(parts) + (f" ({', '.join(more)})" if more else "")
    silent = (
        f"{found[first]['silent_share']:.0%} of ours' groups equal" if found[first]["silent_share"] else ""
    )
    scaled = f"seconds per {scaled_to:,} sampled tokens" if scaled_to else ""
    note = "; ".join(filter(None, [scaled, silent, noisy(args, found)]))
    a = "GRPO: " + "; ".join(shown(row["peer"]) for row in main)
    return [bench.ledger_row(args, a, shown(first), ratio, machine, note)]


def noisy(args, found) -> str:
    """Why a row should be read with care, or ''."""
    crowded = args.device == "cpu" and any((one["share"] or 1) < LEAST_SHARE for one in found.values())
    return bench.noisy(args, *found.values()) or ("noisy: shared machine" if crowded else "")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = bench.BenchParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_flags(parser)
    args = parser.parse_args(argv)
    args.command_line = bench.command_line(argv).replace("bench.py", "bench_rl.py", 1)
    reason = settle(args)
    if reason:
        parser.error(reason)
    return args


def add_flags(parser):
    bench.flags(
        parser,
        "model (without --preset: minimind2-small)",
        ("preset", str, None, "one of the model's presets"),
        *((name, positive_int, None, "as in the stages") for name in bench.SHAPE_FLAGS),
        ("qk_norm", switch, None, "0 or 1; without it as in the preset"),
        ("weights", Path, None, "weights file to start from; without it random ones"),
    )
    bench.flags(
        parser,
        "what is compared",
        ("data_path", Path, None, ".jsonl file of prompts; without it the embedded curriculum's"),
        ("minimind", Path, None, "folder of a MiniMind checkout, for the contender minimind"),
        ("contenders", bench.names, None, f"A,B from {', '.join(NAMES)}"),
        ("prompts", positive_int, 8, "of a step"),
        ("num_generations", number_type(int, low=2), 8, "answers to a prompt"),
        ("max_gen_len", positive_int, 128, "longest answer, in tokens"),
        ("max_seq_len", positive_int, 512, "longer prompts are left out"),
        ("steps", positive_int, 3, "timed steps of a run"),
        ("warmup", positive_int, 1, "steps before them"),
        ("repeats", positive_int, 2, "runs of each contender, in turn"),
        ("trl_batch", positive_int, 8, "most answers in a micro-batch of trl; 8 is its default"),
        ("ours_flags", shlex.split, (), "'--FLAG X ...': more flags for our stage"),
    )
    bench.flags(
        parser,
        "run",
        ("threads", count, 0, "CPU threads of every contender, 0 = all cores"),
        ("device", str, "cpu", "cpu or cuda"),
        ("seed", count, 42, "weights, order and draws"),
        ("quick", bench.ON, None, "tiny sizes, seconds: does it run at all?"),
        ("out_dir", Path, ROOT / "out" / "bench", "folder of logs and results"),
        ("json", Path, None, "file of the result; without it in --out_dir"),
        ("ledger", bench.ON, None, "append a row to docs/benchmarks.md"),
    )


def settle(args) -> str | None:
    """Fill in what depends on other flags; a reason when they make no sense together."""
    for name in args.contenders or []:
        if name not in NAMES:
            return f"--contenders {name}: choose from {', '.join(NAMES)}"
    if args.device not in ("cpu", "cuda"):
        return f"--device {args.device}: choose from cpu, cuda"
    if args.minimind is not None:
        args.minimind = args.minimind.expanduser().resolve()
        if not (args.minimind / "model" / "model_minimind.py").is_file():
            return f"--minimind {args.minimind} is no MiniMind checkout: model/model_minimind.py is not in it"
    elif "minimind" in (args.contenders or []):
        return "--contenders minimind needs --minimind DIR; minimind_shape does without"
    if args.weights is not None:
        args.weights = args.weights.resolve()
        if not args.weights.is_file():
            return f"--weights {args.weights} does not exist"
    if args.quick:
        args.steps, args.warmup, args.repeats = 1, 1, 1
        args.prompts, args.num_generations, args.max_gen_len = 2, 2, 4
    if not args.preset and args.hidden_size is None:
        args.preset = "tiny" if args.quick else "minimind2-small"
    args.task = "rl"  # names the files of results
    args.threads = args.threads or bench.available_cores()
    args.out_dir = args.out_dir.resolve()
    args.work_dir = args.out_dir / "work" / f"rl_{os.getpid()}"
    return None


def main(args):
    args.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        result = bench_rl(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    bench.finish(args, result)
    bench.remove_folder(args.work_dir)


if __name__ == "__main__":
    main(parse_args())
