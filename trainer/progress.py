"""What you see while it runs: one line in the terminal is one JSON line in out/<weight>_log.jsonl, which
may hold more figures.

docs/metrics.md says for each metric its formula, sign and unit. Losses and counts are sums over all
processes since the line before; the device is waited for when a line is written, not at every step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from trainer import energy, runtime
from trainer.checkpoint import resume_path, shown

ROOT = Path(__file__).resolve().parents[1]


class Progress:
    """The log of one run. All processes hold one and call the same methods; the first one writes."""

    def __init__(self, args, rt, model, run: dict, data: dict | None = None):
        self.args, self.rt, self.total_steps = args, rt, run["total_steps"]
        self.flops_per_token = training_flops(model, args)
        self.path = Path(args.save_dir) / f"{args.save_weight}_log.jsonl"
        self.done = 0  # finished optimizer steps of the run
        self.tokens = 0  # consumed by the run, over all processes, without padding
        self.seconds = 0.0  # that earlier sittings of this run took
        self.joules = 0.0  # where the hardware counts them, over all processes
        self.data, self.parameters = data, sum(p.numel() for p in runtime.bare(model).parameters())
        self.sittings: list = []  # what `describe_run` said of every start of this run, without the arguments
        self.latest: dict = {}  # the newest value of every metric
        self.first: dict = {}  # of the held-out metrics: the value before the first step
        self.sums: dict = {}  # since the last line: name -> [sum, count]
        self.steps_in_line, self.aside_seconds = 0, 0.0
        self.run_id = self.tracker = self.file = None

    # -- life of a log

    def start(self, start_step: int):
        """Open the log: anew, or cut back to the step from which a resumed run continues."""
        self.done = start_step
        self.peak_flops = runtime.peak_flops(self.rt)
        self.begin = self.line_begin = time.perf_counter()
        self.meter = energy.Meter(self.rt.device, counts_cpu=self.rt.local_rank == 0)
        if not self.rt.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_log(self.path, up_to=start_step) if start_step else []
        if start_step == self.total_steps:  # a finished run: its last validation will be written again
            lines = [x for x in lines if x["step"] != start_step or not any(n.startswith("val_") for n in x)]
        header = {"event": "resume" if start_step else "start", "step": start_step, **describe_run(self.args)}
        header |= {"machine": runtime.describe(self.rt), "data": self.data, "parameters": self.parameters}
        self.sittings.append({k: v for k, v in header.items() if k != "args"})
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(json.dumps(x) + "\n" for x in [*lines, header]), encoding="utf-8")
        os.replace(temporary, self.path)
        self.file = self.path.open("a", encoding="utf-8")
        if self.args.use_wandb:
            self.tracker = open_tracker(self.args, self.run_id, settings=header["args"])
            self.run_id = self.tracker.run_id

    def finish(self):
        """Close the files and draw the curve."""
        if self.tracker is not None:
            self.tracker.finish()
        if self.file is not None:
            self.file.close()
            draw_curve(self.path, self.path.with_name(f"{self.args.save_weight}_curve.png"))
        self.tracker = self.file = None

    def state_dict(self) -> dict:
        """For the resume file: a continued run writes the lines of an uninterrupted one (but for times).
        All processes must call it: open sums are added up."""
        self.count_energy()
        names = sorted(self.sums)
        sums = dict(zip(names, runtime.total([self.sums[name] for name in names], self.rt)))
        seconds = self.seconds + time.perf_counter() - self.begin
        return {
            "tokens": self.tokens,
            "seconds": seconds,
            "joules": self.joules,
            "sittings": self.sittings,
            "sums": sums,
            "run_id": self.run_id,
            "latest": self.latest,
            "first": self.first,
        }

    def load_state_dict(self, state: dict):
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.joules, self.sittings = state.get("joules", 0.0), list(state.get("sittings", []))
        self.run_id, self.latest, self.first = state["run_id"], state["latest"], state.get("first", {})
        mine = 1 if self.rt.is_main else 0  # the sums of all processes go on in the first one
        self.sums = {name: [total * mine, count * mine] for name, (total, count) in state["sums"].items()}

    # -- during the run

    def due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps happens now; 0 = never. The end of the run
        is not such a moment: what happens then stands behind the loop."""
        return interval > 0 and self.done % interval == 0 and self.done < self.total_steps

    def step(
        self, step: int, lr: float, grad_norm: float | None = None, num_tokens: int = 0, **ratios: tuple
    ):
        """Count a finished optimizer step; write a line when one is due.

        Every metric is a ratio of two sums, loss=(summed loss, number of targets): this process gives its
        own two, tensors or numbers; the line shows total / total since the line before. A skipped step
        gives none.
        """
        self.count(step, grad_norm, num_tokens, ratios)
        if self.done % self.args.log_interval == 0 or self.done == self.total_steps:
            self.write_step(lr, grad_norm)

    def catch_up(self, made: list):
        """Count the steps that were made to measure the speed (see batches.steps_for_minutes), with their
        time; the next line shows them."""
        for step, (stats, _) in enumerate(made):
            ratios = {name: value for name, value in stats.items() if isinstance(value, tuple)}
            self.count(step, stats.get("grad_norm"), stats.get("num_tokens", 0), ratios)
        self.begin -= sum(seconds for _, seconds in made)
        self.line_begin = self.begin

    def count(self, step: int, grad_norm: float | None, num_tokens: int, ratios: dict):
        self.done = step + 1
        self.steps_in_line += 1
        if grad_norm is not None and not math.isfinite(grad_norm):
            ratios = {}
        for name, (total, count) in {"num_tokens": (num_tokens, 1), **ratios}.items():
            old_total, old_count = self.sums.get(name, (0, 0))
            total = total.detach() if hasattr(total, "detach") else total
            self.sums[name] = [old_total + total, old_count + count]

    def count_energy(self):
        joules = self.meter.used()
        if joules is not None:
            self.sums["joules"] = [self.sums.get("joules", (0, 0))[0] + joules, 1]

    def write_step(self, lr: float, grad_norm: float | None):
        self.count_energy()
        names = sorted(self.sums)
        sums = dict(
            zip(names, runtime.total([self.sums[name] for name in names], self.rt))
        )  # waits for the device
        now = time.perf_counter()
        busy = max(now - self.line_begin - self.aside_seconds, 1e-9)
        num_tokens = int(sums.pop("num_tokens")[0])
        self.joules += sums.pop("joules", (0.0, 0))[0]
        self.tokens += num_tokens
        rate = num_tokens / busy
        record = {"step": self.done, "total_steps": self.total_steps}
        order = sorted(sums, key=lambda name: (name != "loss", name))
        record |= {name: sums[name][0] / sums[name][1] for name in order if sums[name][1]}
        record |= {
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self.tokens,
            "tokens_per_s": rate,
            "mfu": rate * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            "memory_gb": runtime.peak_memory_gb(self.rt),
            "time_s": self.seconds + now - self.begin,
            "energy_j": self.joules or None,
            "eta_min": (self.total_steps - self.done) * busy / self.steps_in_line / 60,
            "skipped": self.rt.skipped or None,
        }
        self.sums.clear()
        self.line_begin, self.aside_seconds, self.steps_in_line = now, 0.0, 0
        self.write(record)

    def log(self, **metrics):
        """Write a line of its own: validation, samples. Nothing for no metrics."""
        if metrics and self.done == 0:
            self.first = {name: clean(value) for name, value in metrics.items()}
        if metrics:
            elapsed = self.seconds + time.perf_counter() - self.begin
            self.write({"step": self.done, "total_steps": self.total_steps, **metrics, "time_s": elapsed})

    def changes(self) -> list[str]:
        """What the run did to every held-out metric that was measured before its first step."""
        found = []
        for name, before in self.first.items():
            after = self.latest.get(name)
            if isinstance(before, float) and isinstance(after, float):
                found.append(f"{name} {before:.4f} -> {after:.4f} ({after - before:+.4f})")
        return found

    @contextlib.contextmanager
    def aside(self):
        """Time spent in here (validation, saving) counts neither for tokens/s nor for the time left."""
        begin = time.perf_counter()
        yield
        self.aside_seconds += time.perf_counter() - begin

    def write(self, record: dict):
        record = {k: clean(v) for k, v in record.items() if v is not None}
        self.latest |= record
        if not self.rt.is_main:
            return
        print(terminal_line(record), flush=True)
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in record.items() if k != "step"}, record["step"])


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def clean(value):
    """JSON has no NaN; six digits are enough for a log."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


FORMATS = {
    "lr": "{:.2e}",
    "grad_norm": "{:.2f}",
    "tokens": "{:,}",
    "tokens_per_s": "{:,.0f}",
    "mfu": "{:.1%}",
    "memory_gb": "{:.2f}",
    "time_s": "{:.0f}",
    "eta_min": "{:.1f}",
}


# Figures of reinforcement learning that stand in the file alone: a line in the terminal is for reading.
FILE_ONLY = set(
    """advantage advantage_abs advantage_std advantage_max all_right all_wrong clip_low clip_high drift_k1 ess
    energy_j
    groups_kept kl_k1 length_ended length_p95 mismatch mismatch_max ratio_max reward_var rollout_s score_s
    update_s sampled_tokens value_clip refused change first_visits prompt_entropy rho rho_floor tracker_n
    visits calls failed_calls tool_tokens""".split()
)


def terminal_line(record: dict) -> str:
    """`step 20/400 | loss 5.1234 | lr 3.00e-03 | ...`, in the order of the record."""
    parts = []
    for name, value in record.items():
        if name == "total_steps" or name in FILE_ONLY:
            continue
        if name == "step":
            parts.append(
                f"step {value}/{record['total_steps']}" if "total_steps" in record else f"step {value}"
            )
        elif isinstance(value, float):
            parts.append(f"{name} {FORMATS.get(name, '{:.4f}').format(value)}")
        elif isinstance(value, int):
            parts.append(f"{name} {value:,}")
        elif isinstance(value, str):
            parts.append(f"{name} {value}")
    return " | ".join(parts)


def read_log(path: Path, up_to: int | None = None) -> list[dict]:
    """The records of a log file, without those beyond step `up_to` and without a torn last line."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the process was killed while it wrote this line
                continue
            if isinstance(record, dict) and (up_to is None or record.get("step", 0) <= up_to):
                records.append(record)
    return records


def describe_run(args) -> dict:
    """Arguments, commit and versions: the first line of a log."""
    import torch
    import transformers

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "started"}
    return {
        "command": typed_command(),
        "folder": os.getcwd(),
        "args": settings,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a TorchVersion is no plain value
            "transformers": transformers.__version__,
        },
        "platform": platform.platform(),
        "processor": processor(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def describe_data(path, train) -> dict:
    """What was read: the files as they were typed, the SHA-256 of each (None for a data set of the hub), rows
    and tokens."""
    whole = Path(path).exists()
    files = [path] if whole else [part.strip() for part in str(path).split(",") if part.strip()]
    tokens = getattr(train, "num_tokens", None) or round(train.tokens_per_row * len(train))
    known = [cache.meta["key"]["content"] for cache in getattr(train, "caches", [])]  # "name:..." = no file
    if len(known) != len(files):
        known = [sha256_of(Path(file)) for file in files]
    found = [
        {"path": str(file), "sha256": None if ":" in (content or ":") else content}
        for file, content in zip(files, known)
    ]
    return {"files": found, "rows": len(train), "unit": train.unit, "tokens": tokens}


def sha256_of(path: Path) -> str | None:
    """Of a file's bytes, in hexadecimal; None when there is no such file, or it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):  # on Linux alone, where platform does not know it
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The repository's commit, with + when files differ from it; None outside of git."""
    try:
        head = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() or None


# --------------------------------------------------------------------------------------------------
# First and last words
# --------------------------------------------------------------------------------------------------


def announce(args, rt, model, run: dict, data_path, train, val, written: Path, others: int = 0):
    """What this run will do, before it does it. written: where the weights will be; others: bytes of other
    models that it holds."""
    if not rt.is_main:
        return
    from trainer import batches

    config = runtime.bare(model).config
    rows = batches.rows_per_step(args)
    print(
        f"stage:   {run['stage']}, from "
        f"{args.from_weight if args.from_weight != 'none' else 'random weights'}"
    )
    print(f"reads:   {data_path}: {train.summary()}")
    if val is not None:
        size = f", {val.num_bytes:,} bytes of text" if val.num_bytes else ""
        print(f"held out: {len(val):,} {val.unit}, {val.num_targets:,} targets{size}")
    print(f"writes:  {shown(written)}; to continue: {shown(resume_path(args, config))}")
    print(f"{model_size(runtime.bare(model))}, {config.hidden_size} wide, {config.num_hidden_layers} layers")
    print(
        f"steps:   {run['total_steps']:,} of {rows} {train.unit} x {train.tokens_per_row:.0f} = "
        f"{rows * train.tokens_per_row:,.0f} tokens ({run['total_steps'] * rows / len(train):.2f} epochs), "
        f"{batches.micro_rows(args, rt.world_size)} {train.unit} at a time"
    )
    print(f"machine: {runtime.describe(rt)}, torch.compile {'on' if is_compiled(model) else 'off'}")
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: Windows has no load average
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if rt.device.type == "cpu" and load > cores and runtime.others_running() >= cores / 2:
            print(
                f"note: other programs keep this machine busy (load {load:.0f} on {cores} cores); threads "
                "that"
            )
            print("      wait for each other may make --num_threads 1 faster")
    tokens = batches.micro_rows(args, rt.world_size) * train.tokens_per_row
    predicted = (sum(memory_parts(model, args, rt, tokens).values()) + others) / 1e9
    free = runtime.available_memory_gb(rt)
    print(f"memory:  about {predicted:.1f} GB" + (f" of {free:.1f} GB free" if free is not None else ""))
    if free is not None and predicted > free:
        print(f"warning: this may not fit. {runtime.memory_advice(args).split('. ', 1)[1]}")
    sys.stdout.flush()


def is_compiled(model) -> bool:
    from model.model_minimind import Block

    return runtime.bare(model).model.run_block is not Block.forward


def model_size(model) -> str:
    """`Model Params: 25.83M`, with `-A91.95M` for the part of a mixture that works on one token."""
    from model.model_minimind import count_parameters

    num_params, num_active = count_parameters(model)
    active = f"-A{num_active / 1e6:.2f}M" if num_active < num_params else ""
    return f"Model Params: {num_params / 1e6:.2f}M{active}"


def training_flops(model, args) -> float:
    """FLOPs per token, forward and backward, of the model that learns."""
    from model.model_minimind import count_parameters, flops_per_token

    model = runtime.bare(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    flops = flops_per_token(model.config, args.max_seq_len, count_parameters(model)[1])
    return flops - 2 * frozen  # nobody asks for their gradient


def memory_parts(model, args, rt, tokens: float) -> dict[str, float]:
    """A forecast of the peak, in bytes: weights, gradients and optimizer state exactly, activations by a
    count per token and layer that was fitted to measurements (docs/training.md), and the process itself.
    tokens: in a micro-batch."""
    from trainer.optim import split_parameters

    model = runtime.bare(model)
    config = model.config
    hidden, other, vectors = (sum(p.numel() for p in group) for group in split_parameters(model))
    state = 4 * hidden + 8 * (other + vectors) if args.optimizer == "muon" else 8 * (hidden + other + vectors)
    weights = sum(4 * p.numel() for p in model.parameters())
    width = 2 if rt.dtype.itemsize == 2 else 4
    mlp = config.intermediate_size * (
        1 if not config.use_moe else config.num_experts_per_tok + config.n_shared_experts
    )
    per_layer = width * (10 * config.hidden_size + 5 * mlp)
    if rt.device.type == "cpu":  # the attention weights of half the square are kept for the backward pass
        per_layer += config.num_attention_heads * args.max_seq_len // 2 * (4 + width)
    activations = tokens * (config.num_hidden_layers * per_layer + 12 * config.hidden_size)
    loss = 1024 * config.vocab_size * 14
    base = 0.5e9 if rt.device.type == "cpu" else 0.0
    return {
        "process": base,
        "weights": weights,
        "gradients": 4 * (hidden + other + vectors),
        "optimizer": state,
        "activations": activations,
        "loss": loss,
    }


def farewell(args, rt, written: Path, log: Progress, next_command: str):
    """What the stage changed, where the weights are, and what to type next."""
    if not rt.is_main:
        return
    changes = log.changes() if log.done == log.total_steps else []
    for i, change in enumerate(changes):
        print(("held out: " if i == 0 else " " * 10) + change)
    print(f"weights: {shown(written)} (step {log.done} of {log.total_steps})")
    print(f"log:     {shown(log.path)}, curve {shown(log.path.with_name(f'{args.save_weight}_curve.png'))}")
    if log.done < log.total_steps:
        print(f"stopped ({rt.stop_signal or 'signal'}). To continue: {resume_command(args)}", flush=True)
    else:
        print(f"next:    {next_command}", flush=True)


def resume_command(args) -> str:
    """The command that was typed, with --from_resume 1."""
    script = shown(Path(sys.argv[0]))
    if not script.endswith(".py") or "pytest" in script:  # called from Python
        script, words = f"trainer/train_{args.save_weight}.py", []
    else:
        words = sys.argv[1:]
    kept = [
        w for i, w in enumerate(words) if w != "--from_resume" and (i == 0 or words[i - 1] != "--from_resume")
    ]
    kept = [w for w in kept if not w.startswith("--from_resume=")]
    return f"{launcher()} {script} {quoted(kept)}--from_resume 1"


def typed_command() -> str:
    """The command that was typed."""
    return f"{launcher()} {quoted([shown(Path(sys.argv[0])), *sys.argv[1:]]).strip()}"


def launcher() -> str:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return f"torchrun --nproc_per_node {processes}" if processes > 1 else "python"


def quoted(words: list[str]) -> str:
    import shlex

    return "".join(shlex.quote(word) + " " for word in words)


def same_model_flags(args, known=None) -> str:
    """The flags that make another command mean the same model and folder. known: those it has, if not all."""
    from trainer.cli import ARCHITECTURE, ROOT

    words = []
    for name in ["preset", *ARCHITECTURE]:
        if getattr(args, name, None) is not None and (known is None or name in known):
            words += [f"--{name}", str(getattr(args, name))]
    if Path(args.save_dir).resolve() != (ROOT / "out").resolve():
        words += ["--save_dir", str(args.save_dir)]
    return " " + quoted(words).strip() if words else ""


# --------------------------------------------------------------------------------------------------
# The curve
# --------------------------------------------------------------------------------------------------


def draw_curve(log: Path, picture: Path) -> bool:
    """Loss, validation loss and learning rate over steps, as a PNG; of reinforcement learning, whose loss
    says little, reward and held-out success. Returns False, with a line, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no curve drawn: `pip install matplotlib` to get one")
        return False
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    records = read_log(log)
    learns = any("reward" in r and "val_loss" not in r and "length" in r for r in records)
    shown, checked = ("reward", "val_pass1") if learns else ("loss", "val_loss")
    train = [(r["step"], r[shown]) for r in records if isinstance(r.get(shown), int | float)]
    held_out = [(r["step"], r[checked]) for r in records if isinstance(r.get(checked), int | float)]
    rates = [(r["step"], r["lr"]) for r in records if isinstance(r.get("lr"), int | float)]
    if not train:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train), label=shown, linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out), "o-", label=checked, markersize=3)
    axes.set(xlabel="step" if learns else "optimizer step", ylabel=shown, title=log.stem.removesuffix("_log"))
    axes.grid(alpha=0.3)
    right = axes.twinx()
    right.plot(*zip(*rates), color="gray", linewidth=0.8, alpha=0.6, label="lr")
    right.set(ylabel="learning rate", ylim=(0, None))
    axes.legend(loc="upper right")
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, picture)
    return True


# --------------------------------------------------------------------------------------------------
# Trackers
# --------------------------------------------------------------------------------------------------


def open_tracker(args, run_id: str | None, settings: dict):
    """A mirror of the log in SwanLab, wandb or TensorBoard. Without an account (or a network) files are
    written under --save_dir, to look at or upload later. run_id continues the run of that id."""
    folder = Path(args.save_dir)
    project = args.wandb_project or "MiniMind"
    name = f"{args.save_weight}-{time.strftime('%m%d-%H%M%S')}"
    try:
        return {"swanlab": SwanLab, "wandb": Wandb, "tensorboard": TensorBoard}[args.tracker](
            folder, project, name, run_id, settings
        )
    except ImportError as error:
        package = {"tensorboard": "tensorboard", "wandb": "wandb", "swanlab": "swanlab"}[args.tracker]
        raise runtime.TrainingError(
            f"--use_wandb --tracker {args.tracker} needs a package that is not installed ({error}): "
            f"pip install {package}, or leave --use_wandb out (the log and the curve are written anyway)"
        ) from None


class SwanLab:
    """Offline unless logged in; `swanlab sync` uploads later, `swanlab watch` shows local runs."""

    def __init__(self, folder, project, name, run_id, settings):
        import swanlab

        self.swanlab = swanlab
        online = bool(os.environ.get("SWANLAB_API_KEY")) or (Path.home() / ".swanlab" / ".netrc").exists()
        mode = os.environ.get("SWANLAB_MODE") or ("online" if online else "offline")
        self.run_id = run_id or new_run_id()
        (folder / "swanlog").mkdir(parents=True, exist_ok=True)
        swanlab.init(
            project=project,
            name=name,
            id=self.run_id,
            resume="allow",
            mode=mode,
            log_dir=str(folder / "swanlog"),
            config=settings,
            reinit=True,
        )

    def log(self, metrics, step):
        self.swanlab.log(metrics, step=step)

    def finish(self):
        self.swanlab.finish()


class Wandb:
    """Offline unless logged in; `wandb sync` uploads later."""

    def __init__(self, folder, project, name, run_id, settings):
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in netrc_text()
        mode = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        self.run_id = run_id or new_run_id()
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=project,
            name=name,
            id=self.run_id,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config=settings,
            reinit="finish_previous",
        )

    def log(self, metrics, step):
        self.run.log(metrics, step=step)

    def finish(self):
        self.run.finish()


class TensorBoard:
    """Event files in <save_dir>/runs; `tensorboard --logdir out/runs` shows them."""

    def __init__(self, folder, project, name, run_id, settings):
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or name
        self.writer = SummaryWriter(log_dir=str(folder / "runs" / self.run_id))
        self.writer.add_text("args", json.dumps(settings, indent=1))

    def log(self, metrics, step):
        for key, value in metrics.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, step)

    def finish(self):
        self.writer.close()


def new_run_id() -> str:
    """A fresh identifier; the clock, not the seed, because two runs with one seed are two runs."""
    return f"{time.time_ns():x}"[-12:]


def netrc_text() -> str:
    for name in (".netrc", "_netrc"):
        with contextlib.suppress(OSError):
            return (Path.home() / name).read_text(encoding="utf-8", errors="replace")
    return ""
