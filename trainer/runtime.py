"""Where a stage runs: device, precision, processes, seeds, and the optimizer step. No algorithm lives here.

A stage calls `start(args)` first and `stop(rt)` last; in between it never asks for a rank, a device or a
dtype. One process on a laptop and sixteen under torchrun take the same path: every function below does
nothing, or does the same, when the world has one process.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import random
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model.precision import integer_products, multiplies_integers, prefers_bfloat16, prefers_integers
from trainer.cli import model_config, settle

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,  # products of the blocks only, see model/precision.py; all else float32
}
MAX_BAD_STEPS = 5  # non-finite steps in a row before a run gives up
SECOND_CTRL_C_AFTER = 1.0  # seconds; a terminal and torchrun both pass on one and the same Ctrl-C
# oneDNN compiles its bfloat16 products for every shape it meets, and keeps 1,024 of them. Answers and their
# batches never have the same shape twice, so a run of reinforcement learning would grow by 7 MB in a step.
CPU_KERNELS_KEPT = 128
MAX_OVERFLOWS = (
    25  # the same with a GradScaler, whose first steps overflow on purpose while it looks for its scale
)


class TrainingError(RuntimeError):
    """The run cannot go on, and the message says what to do; `cli.run` prints it as one line."""


@dataclass
class Runtime:
    """What `start` found. Stages use `autocast()` and `seed_step(step)`; the rest is for the helpers."""

    device: torch.device
    dtype: torch.dtype  # compute type of autocast; weights, gradients and optimizer state stay float32
    seed: int
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    scaler: torch.amp.GradScaler | None = None  # float16 only
    host_group: object = None  # gloo group for numbers that live on the CPU
    samples: str = (
        ""  # what the current step is computed from, so that a bad step can name it (set by batches)
    )
    bad_steps: int = 0  # non-finite steps in a row
    skipped: int = 0  # steps that changed nothing, in the whole run
    stop_signal: str | None = None  # this process was asked to stop
    stop_asked: float = 0.0  # when
    stopping: bool = False  # all processes agreed to stop after this step
    rehearsing: bool = False  # --plan: of many equal pieces of work a few are enough (see batches.enough_of)
    left_out: float = 0.0  # seconds that the others would have taken
    started: float = field(default_factory=time.monotonic)
    old_handlers: dict = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words):
        if self.is_main:
            print(*words, flush=True)

    def autocast(self):
        """Matrix products in `dtype`, everything that needs precision in float32."""
        if self.dtype == torch.int8:
            return integer_products()
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed_step(self, step: int):
        """Make every draw of this step a function of (seed, step, rank): dropout, sampling, augmentation.
        This is why resuming needs no saved generator state, and why no two ranks draw alike."""
        mixed = mix_seed(self.seed, step, self.rank)
        torch.manual_seed(mixed)
        random.seed(mixed)
        np.random.seed(mixed % 2**32)


def mix_seed(*numbers: int) -> int:
    """A 63-bit number from a few small ones; neighbours give unrelated results (splitmix64, Steele et al.
    2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 1


# --------------------------------------------------------------------------------------------------
# Start and stop
# --------------------------------------------------------------------------------------------------


def start(args) -> Runtime:
    """Look at the machine and the torchrun environment; reads args.device, args.dtype, args.seed,
    args.num_threads.

    After this all ranks share the same torch seed, so that they build the same initial weights.
    """
    tune_allocator()
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # its two layers
        os.environ.setdefault(name, str(CPU_KERNELS_KEPT))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(getattr(args, "device", "auto"), world_size, local_rank)
    set_threads(getattr(args, "num_threads", 0), device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A stage that compares its weights with those it began from (args.exact) must not round them to 8 bits:
    # most of what a small rate changes would be rounded away.
    rounds = hasattr(args, "hidden_size") and not getattr(args, "exact", False)
    width = model_config(args).hidden_size if rounds else 0
    dtype = choose_dtype(getattr(args, "dtype", "auto"), device, width)
    if hasattr(args, "learning_rate"):  # the flags of a stage
        settle(args, device.type)
    rt = Runtime(device, dtype, seed=args.seed, local_rank=local_rank)
    rt.started = getattr(args, "started", rt.started)
    rt.rehearsing = getattr(args, "plan", False)
    if world_size > 1:
        rt.rank, rt.world_size = int(os.environ["RANK"]), world_size
        # A step takes seconds, so half an hour of silence means a lost process; the host group also waits
        # for rank 0 while it tokenizes a large corpus, which may take longer.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        rt.host_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        rt.dtype = dtype = broadcast(dtype, rt)  # a CPU's is measured: all must agree
    if dtype == torch.float16:
        rt.scaler = torch.amp.GradScaler(device.type)
    torch.manual_seed(mix_seed(rt.seed))
    random.seed(rt.seed)
    np.random.seed(rt.seed % 2**32)
    return rt


def stop(rt: Runtime):
    """Give signals back, and leave the process group together so that nobody waits for somebody who left."""
    release_signals(rt)
    if rt.world_size > 1:
        dist.barrier(group=rt.host_group)
        dist.destroy_process_group()
        # Its last reference: this waits for the group's threads. One that still held a tensor of Python's
        # when the interpreter ends would end the process with "terminate called without an active exception".
        rt.host_group = None


def describe(rt: Runtime) -> str:
    """One phrase for the first lines of a run."""
    if rt.device.type == "cuda":
        name = torch.cuda.get_device_name(rt.device)
    elif rt.device.type == "cpu":
        name = f"{torch.get_num_threads()} threads"
    else:
        name = platform.machine()
    precision = str(rt.dtype).removeprefix("torch.")
    precision += {
        torch.float32: "",
        torch.float16: " compute with loss scaling, float32 weights",
        torch.int8: " products, all else float32",
    }.get(rt.dtype, " compute, float32 weights")
    processes = "1 process" if rt.world_size == 1 else f"{rt.world_size} processes"
    return f"{rt.device.type} ({name}), {precision}, {processes}"


def choose_device(wanted: str, world_size: int = 1, local_rank: int = 0) -> torch.device:
    """CUDA before MPS before CPU; under torchrun each process takes the card of its local rank."""
    if wanted in (None, "auto"):
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cpu" and torch.backends.mps.is_available() and world_size == 1:
            wanted = "mps"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise TrainingError(
            f"--device {wanted} is not a device; use auto, cuda, cuda:1, mps or cpu"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError(
                f"--device {wanted}: torch {torch.__version__} sees no CUDA GPU; use --device auto, or "
                "install a torch build with CUDA"
            )
        index = local_rank if world_size > 1 else device.index or 0
        if index >= torch.cuda.device_count():
            raise TrainingError(
                f"process {local_rank} of this machine wants GPU {index}, but only "
                f"{torch.cuda.device_count()} are visible: lower --nproc_per_node, or pass --device cpu"
            )
        return torch.device("cuda", index)
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise TrainingError("--device mps: no Apple GPU here; use --device auto")
        if world_size > 1:
            raise TrainingError(
                "--device mps runs one process only: start without torchrun, or pass --device cpu"
            )
    elif device.type != "cpu":
        raise TrainingError(f"--device {wanted} is not supported; use auto, cuda, mps or cpu")
    return device


def choose_dtype(wanted: str, device: torch.device, width: int = 0) -> torch.dtype:
    """`auto`: bfloat16 where this machine multiplies it faster than float32, else float16 with loss scaling
    on CUDA, else products of 8-bit integers on a CPU that has them, if the model that is trained has a
    `width` where they save more than rounding costs; else float32."""
    if wanted in (None, "auto"):
        if prefers_bfloat16(device):
            return torch.bfloat16
        if device.type == "cuda":
            return torch.float16
        return torch.int8 if prefers_integers(device, width) else torch.float32
    wanted = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}.get(wanted, wanted)
    if wanted not in DTYPES:
        raise TrainingError(f"--dtype {wanted} is unknown; use auto, {', '.join(DTYPES)}")
    if wanted == "float16" and device.type != "cuda":
        raise TrainingError(
            f"--dtype float16 on {device.type} would be slower and less exact than float32; use --dtype auto"
        )
    if wanted == "int8" and not multiplies_integers(device):
        raise TrainingError(
            f"--dtype int8 needs a CPU with instructions for 8-bit products (x86 with VNNI), which this "
            f"{device.type} is not; use --dtype auto"
        )
    return DTYPES[wanted]


def set_threads(num_threads: int, device: torch.device):
    """0 = what the environment says (OMP_NUM_THREADS), and on CPU under torchrun a fair share of the cores,
    since torchrun itself sets one thread per process."""
    if not num_threads and device.type == "cpu" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        num_threads = max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))
    if num_threads:
        torch.set_num_threads(num_threads)


def tune_allocator():
    """Keep freed memory (Linux/glibc): by default every large tensor is mapped and unmapped, and a fresh
    bfloat16 product loses more time to page faults than to arithmetic. Whole training steps gain 7-9 %. One
    arena for all threads: what one frees, another can use, so that memory does not creep up."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return  # another allocator (jemalloc, tcmalloc) is not glibc's to tune
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# --------------------------------------------------------------------------------------------------
# Signals
# --------------------------------------------------------------------------------------------------


def catch_signals(rt: Runtime):
    """From now on Ctrl-C and SIGTERM ask the loop to finish its step, save and exit 0. A second Ctrl-C
    stops at once; files are written whole or not at all, so even that leaves nothing torn."""
    if threading.current_thread() is not threading.main_thread() or rt.old_handlers:
        return

    def on_signal(number, frame):
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if rt.stop_signal is not None:
            if number == signal.SIGINT and time.monotonic() - rt.stop_asked > SECOND_CTRL_C_AFTER:
                raise KeyboardInterrupt
            return
        rt.stop_signal, rt.stop_asked = name, time.monotonic()
        if rt.is_main:  # os.write: print may not be entered twice, and a signal can arrive inside print
            os.write(2, f"\n{name}: finishing this step, then saving (Ctrl-C again: stop at once)\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        rt.old_handlers[number] = signal.signal(number, on_signal)


def release_signals(rt: Runtime):
    for number, handler in rt.old_handlers.items():
        signal.signal(number, handler)
    rt.old_handlers.clear()


# --------------------------------------------------------------------------------------------------
# Sums over processes, DDP
# --------------------------------------------------------------------------------------------------


def total(x, rt: Runtime):
    """The sum of a number (or of nested lists of numbers) over all processes, in float64 on the CPU.

    Every process must call it. The request to stop travels with it, so that after any `total` all know the
    same.
    """
    numbers = plain(x)
    if rt.world_size == 1:
        rt.stopping = rt.stopping or rt.stop_signal is not None
        return numbers
    flat = list(flatten(numbers))
    sums = torch.tensor([*flat, rt.stop_signal is not None], dtype=torch.float64)
    dist.all_reduce(sums, group=rt.host_group)
    *sums, stops = sums.tolist()
    rt.stopping = rt.stopping or stops > 0
    values = iter(int(new) if isinstance(old, int) else new for old, new in zip(flat, sums))
    return unflatten(numbers, values)


def plain(x):
    """Python numbers from numbers, tensors or nested lists of them; waits for the device."""
    if isinstance(x, list | tuple):
        return [plain(item) for item in x]
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().tolist()
    return int(x) if isinstance(x, bool) else x


def flatten(x):
    if isinstance(x, list):
        for item in x:
            yield from flatten(item)
    else:
        yield x


def unflatten(like, values):
    return [unflatten(item, values) for item in like] if isinstance(like, list) else next(values)


def broadcast(x, rt: Runtime):
    """Rank 0's value of a small Python object, on every rank."""
    if rt.world_size == 1:
        return x
    box = [x]
    dist.broadcast_object_list(box, src=0, group=rt.host_group)
    return box[0]


def spread(values, rt: Runtime | None = None) -> tuple[float, float]:
    """Mean and standard deviation (of a sample, n - 1) of numbers over all processes, in float64."""
    values = values.double().flatten()
    sums = [float(values.sum()), len(values)]
    total_sum, count = sums if rt is None else total(sums, rt)
    mean = total_sum / max(count, 1)
    squares = float(((values - mean) ** 2).sum())
    squares = squares if rt is None else total(squares, rt)
    return mean, math.sqrt(squares / max(count - 1, 1))


def gather(x, rt: Runtime) -> list:
    """Every process's value of a small Python object, in order of rank, on every rank."""
    if rt.world_size == 1:
        return [x]
    found = [None] * rt.world_size
    dist.all_gather_object(found, x, group=rt.host_group)
    return found


@contextlib.contextmanager
def main_first(rt: Runtime):
    """The first process of each machine does the work (say, builds the token cache); the others find it
    done."""
    if rt.world_size > 1 and rt.local_rank != 0:
        dist.barrier(group=rt.host_group)
    yield
    if rt.world_size > 1 and rt.local_rank == 0:
        dist.barrier(group=rt.host_group)


def wrap(model, rt: Runtime):
    """Move to the device and, with several processes, wrap for gradient averaging. The loss-bearing forward
    must go through what this returns; sampling and saving use `bare(model)`."""
    model.to(rt.device)
    if rt.world_size == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model,
        device_ids=[rt.device.index] if rt.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # no second copy of the gradients
    )


def bare(model):
    """The model inside the wrapper."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def no_sync(model, rt: Runtime, last: bool):
    """Around the forward AND the backward of a micro-batch: gradients are exchanged only for the last one
    of a step. (Around the backward alone it does nothing: DDP decides in the forward.)"""
    return contextlib.nullcontext() if rt.world_size == 1 or last else model.no_sync()


def backward(loss: torch.Tensor, rt: Runtime):
    """Gradients of this process's share of a loss that was divided by the count of ALL processes. DDP
    averages where the formula sums, hence the factor; with float16 the GradScaler adds its own."""
    loss = loss * rt.world_size
    (loss if rt.scaler is None else rt.scaler.scale(loss)).backward()


# --------------------------------------------------------------------------------------------------
# The optimizer step
# --------------------------------------------------------------------------------------------------


def optimizer_step(model, optimizers, rt: Runtime, grad_clip: float) -> float:
    """Clip, step, clear; returns the gradient norm before clipping (of the synchronised, unscaled gradients).

    A norm that is not finite skips the step: nothing moves, no momentum decays, on any rank (all see the same
    gradients, so all decide alike). After MAX_BAD_STEPS of those in a row the run stops.
    """
    if rt.scaler is not None:
        for optimizer in optimizers:
            rt.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip if grad_clip > 0 else math.inf)
    grad_norm = norm.item()  # the one wait for the device in a step
    finite = math.isfinite(grad_norm)
    if finite:
        for optimizer in optimizers:
            optimizer.step() if rt.scaler is None else rt.scaler.step(optimizer)
        rt.bad_steps = 0
    if rt.scaler is not None:
        rt.scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    model.zero_grad(set_to_none=True)  # also what no optimizer holds (frozen later, or left out)
    if not finite:
        count_bad_step(rt, grad_norm)
    return grad_norm


def count_bad_step(rt: Runtime, grad_norm: float):
    rt.bad_steps += 1
    rt.skipped += 1
    overflow = rt.scaler is not None and rt.scaler.get_scale() >= 1
    if not overflow:
        rt.print(
            f"gradient norm {grad_norm}: step skipped, nothing changed ({rt.bad_steps} in a row); "
            f"{rt.samples}"
        )
    if rt.bad_steps >= (MAX_OVERFLOWS if overflow else MAX_BAD_STEPS):
        raise TrainingError(
            f"{rt.bad_steps} steps in a row had a gradient that is not finite, the last from {rt.samples}; "
            "the files on disk keep the last good weights. Lower --learning_rate or --grad_clip, look at "
            "those rows, or pass --dtype float32, then continue with --from_resume 1"
        )


def snapshot(model, optimizers, rt: Runtime):
    """Remember fresh weights and optimizers; the function returned puts them back (see
    batches.steps_for_minutes)."""
    weights = {name: tensor.detach().clone() for name, tensor in bare(model).state_dict().items()}
    scale = rt.scaler.state_dict() if rt.scaler is not None else None

    def undo():
        with torch.no_grad():
            for name, tensor in bare(model).state_dict().items():
                tensor.copy_(weights[name])
        for optimizer in optimizers:
            optimizer.state.clear()
        if scale is not None:
            rt.scaler.load_state_dict(scale)
        rt.bad_steps = rt.skipped = 0

    return undo


# --------------------------------------------------------------------------------------------------
# torch.compile
# --------------------------------------------------------------------------------------------------


COMPILING_PAYS_AFTER = (
    180  # seconds of expected training: compiling costs 30-60 s of CPU, and saves about a third
)


def maybe_compile(
    model, use_compile: str, rt: Runtime, expected_seconds: float = math.inf, batch=None, dynamic=False
):
    """`1`: compile. `0`: do not. `auto`: compile a run that lasts long enough for it to pay, when a short
    trial succeeds (it needs a C++ compiler on CPU, Triton on CUDA); otherwise say so and go on uncompiled.

    Works on a model (its `compile_blocks` where it has one) or a function. `batch()` gives a micro-batch:
    with `auto`, on a CPU, a compiled model must have the gradient of the uncompiled one on it. dynamic:
    compile for batches of any shape. Returns (what to call, "1" or "0").
    """
    auto = use_compile == "auto"
    if auto:
        reason = why_not_compile(rt.device) if expected_seconds > COMPILING_PAYS_AFTER else "a short run"
        reason = broadcast(reason, rt)
        if reason:
            rt.print(f"torch.compile: off ({reason})")
        use_compile = "0" if reason else "1"
    if use_compile == "0":
        return model, "0"
    if hasattr(model, "compile_blocks"):
        model.compile_blocks(dynamic)
        if auto and batch is not None and rt.device.type == "cpu":
            reason = why_gradients_differ(model, batch(), rt)
            if total(int(reason is not None), rt):  # one process is enough
                rt.print(f"torch.compile: off ({reason or 'another process found a wrong gradient'})")
                model.uncompile_blocks()
                return model, "0"
        return model, "1"
    if isinstance(model, torch.nn.Module):
        model.compile()  # in place: state dict names stay as they are
        return model, "1"
    return torch.compile(model), "1"


def uncompiled(args):
    """Within it, compiled code is not used: without gradients it would be compiled a second time, for a few
    batches. (The stance costs a second of imports, so a run that compiles nothing does not take it.)"""
    if str(args.use_compile) == "0":
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def why_gradients_differ(model, batch: dict, rt: Runtime) -> str | None:
    """None when the compiled model has the loss and the gradient of the uncompiled one, but for rounding.
    Torch 2.13 is known to compile some bfloat16 code for CPUs into NaN; a run should not find out the hard
    way."""
    seen = []
    for stance in ("force_eager", "default"):
        with torch.compiler.set_stance(stance):
            with rt.autocast():
                loss = trial_loss(model, batch)
            loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        seen.append((loss.item(), norm.item()))
    (loss, norm), (compiled_loss, compiled_norm) = seen
    close = abs(compiled_loss - loss) <= 0.02 * abs(loss) and abs(compiled_norm - norm) <= 0.1 * norm
    if close:  # False for NaN
        return None
    return (
        f"compiled, this torch gives loss {compiled_loss:.4g} and gradient norm {compiled_norm:.4g} where "
        f"uncompiled it gives {loss:.4g} and {norm:.4g}"
    )


def trial_loss(model, batch: dict) -> torch.Tensor:
    """Something to differentiate in every model that has `compile_blocks`: of a language model its loss, of
    others (a fresh reward model rates everything 0) a function of the blocks' output."""
    if hasattr(model, "lm_head"):
        names = ("input_ids", "labels", "position_ids")
        return model(**{n: batch[n] for n in names if n in batch}, return_logits=False).loss
    hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"])[0]
    return torch.nn.functional.softplus(hidden.float()).mean()


def why_not_compile(device: torch.device) -> str | None:
    """None when torch.compile works here, else the reason in a few words."""
    if device.type == "mps":
        return "not tried on MPS"
    if device.type == "cpu":
        names = (
            [os.environ.get("CXX"), "cl"] if os.name == "nt" else [os.environ.get("CXX"), "g++", "clang++"]
        )
        if not any(name and shutil.which(name) for name in names):
            return "no C++ compiler found; install g++ for a faster run"
    try:
        trial = torch.compile(lambda x: (x * 2 + 1).relu())
        trial(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler stack raises, uncompiled code still works
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0][:100] if text else 'no message'}"
    return None


# --------------------------------------------------------------------------------------------------
# Memory and speed of the machine
# --------------------------------------------------------------------------------------------------


def synchronize(rt: Runtime):
    """Wait until the device has done what it was given, before reading a clock."""
    if rt.device.type == "cuda":
        torch.cuda.synchronize(rt.device)
    elif rt.device.type == "mps":
        torch.mps.synchronize()


def peak_memory_gb(rt: Runtime) -> float | None:
    """Most memory held so far: by tensors on a GPU, by the process on a CPU. In GB (10^9 bytes); None where
    nobody tells."""
    if rt.device.type == "cuda":
        return torch.cuda.max_memory_allocated(rt.device) / 1e9
    if rt.device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        with contextlib.suppress(ImportError, AttributeError):
            import psutil

            return psutil.Process().memory_info().peak_wset / 1e9
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def held_memory_gb(rt: Runtime) -> float:
    """What `peak_memory_gb` counts, as it is now; on a CPU outside of Linux its peak so far."""
    if rt.device.type == "cuda":
        return torch.cuda.memory_allocated(rt.device) / 1e9
    if rt.device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):  # AttributeError: no sysconf on Windows
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    return peak_memory_gb(rt) or 0.0


def others_running() -> float:
    """How many threads besides this one want a core right now, the mean of ten looks in a tenth of a second;
    a load average still counts the program that ended a moment ago. Infinity where nobody tells."""
    seen = []
    try:
        for _ in range(10):
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0]
            seen.append(int(running) - 1)
            time.sleep(0.01)
    except (OSError, IndexError, ValueError):
        return math.inf
    return sum(seen) / len(seen)


def available_memory_gb(rt: Runtime) -> float | None:
    """Memory a run may still take, or None where nobody tells."""
    if rt.device.type == "cuda":
        return torch.cuda.mem_get_info(rt.device)[0] / 1e9
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024 / 1e9
    return None


# Dense bfloat16 tensor rates with float32 accumulation, TFLOP/s, from the vendors' data sheets; first match
# counts.
GPU_TFLOPS = [
    (r"B200|GB200", 2250),
    (r"H200|GH200|H100.*(SXM|HBM3)|H800", 989),
    (r"H100", 756),
    (r"A100|A800", 312),
    (r"L40S", 362),
    (r"L40", 181),
    (r"L4\b", 121),
    (r"A10G", 70),
    (r"A10\b", 125),
    (r"A6000", 155),
    (r"RTX 5090", 209),
    (r"RTX 4090", 165),
    (r"RTX 4080", 98),
    (r"RTX 3090", 71),
    (r"RTX 3080", 60),
    (r"V100", 112),
    (r"T4", 65),
]


def peak_flops(rt: Runtime) -> float | None:
    """FLOP/s that count as 100 % in MFU, over all processes: a GPU's data sheet; on a CPU the best of a few
    products of this project's size, measured here (in float32 also for int8). None when unknown."""
    if rt.device.type == "cuda":
        name = torch.cuda.get_device_name(rt.device)
        for pattern, tflops in GPU_TFLOPS:
            if re.search(pattern, name):
                return tflops * 1e12 * rt.world_size * (0.5 if rt.dtype == torch.float32 else 1.0)
        return None
    if rt.device.type != "cpu":
        return None
    dtype = torch.float32 if rt.dtype == torch.int8 else rt.dtype
    a, b = torch.randn(2048, 512).to(dtype), torch.randn(512, 1024).to(dtype)
    out = torch.empty(2048, 1024, dtype=dtype)
    best, begin = 0.0, time.perf_counter()
    while time.perf_counter() - begin < 0.1:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * 2048 * 512 * 1024 / (time.perf_counter() - start))
    return best * rt.world_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the several ways torch says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"out of memory|can't allocate memory|DefaultCPUAllocator", str(error))
    )


def memory_advice(args) -> str:
    """Which flags to lower after running out of memory, most effective first, with their present values."""
    if hasattr(args, "tokens_at_once"):  # reinforcement learning: rows in memory do not follow --batch_size
        at_once = f"--tokens_at_once (now {args.tokens_at_once or 'chosen by the device'})"
        return (
            f"out of memory. Lower, in this order: {at_once}; --max_gen_len (now {args.max_gen_len}); a "
            "smaller --preset or --hidden_size"
        )
    advice = []
    if (getattr(args, "batch_size", None) or 1) > 1:
        half = args.batch_size // 2
        advice.append(
            f"--batch_size {half} --accumulation_steps {2 * getattr(args, 'accumulation_steps', 1)} (half "
            "the memory, the same update)"
        )
    if getattr(args, "max_seq_len", 0):
        advice.append(f"a shorter --max_seq_len (now {args.max_seq_len})")
    advice.append("a smaller --preset or --hidden_size")
    return "out of memory. Lower, in this order: " + "; ".join(advice)
