"""What this machine multiplies fastest, and products of 8-bit integers; shared by training and generation."""

import contextlib
import functools
import platform
import time

import torch


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are the faster ones: known for a GPU, measured on a CPU.

    A CPU's flags do not tell: with AMX, or on AMD's Zen 4 and 5, bfloat16 is three to eight times as fast as
    float32; on an Intel CPU that has AVX512-BF16 alone it takes twice as long.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        if not torch.backends.mps.is_macos_or_newer(14, 0):
            return False
        try:
            return bool(torch.ones(1, dtype=torch.bfloat16, device=device).add(1).isfinite().all())
        except (RuntimeError, TypeError):
            return False
    return cpu_prefers_bfloat16()


def cpu_features() -> dict[str, bool | int | str]:
    """What torch knows of this CPU ("avx512_vnni": True, ...); empty before torch 2.11."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def cpu_prefers_bfloat16() -> bool:
    """The factor keeps the answer the same from run to run; no machine seen lies near it."""
    seconds = product_seconds(torch.float32, torch.bfloat16)
    return seconds[torch.bfloat16] * 1.3 < seconds[torch.float32]


def product_seconds(*dtypes: torch.dtype, rounds: int = 12) -> dict[torch.dtype, float]:
    """Seconds of one (512, 512) x (512, 512) product in each type: the best of several, in turns, since a CPU
    that was idle takes some milliseconds to reach its speed. About 40 ms on two cores."""
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in dtypes}
    best = dict.fromkeys(dtypes, float("inf"))
    for _ in range(rounds):
        for dtype, matrix in matrices.items():
            begin = time.perf_counter()
            torch.mm(matrix, matrix)
            best[dtype] = min(best[dtype], time.perf_counter() - begin)
    return best


# ------------------------------------------------------------------------------------------------------------
# Products of 8-bit integers
# ------------------------------------------------------------------------------------------------------------

# From there on they save more than rounding costs: training steps are 1.1 times as fast at 256, 1.3 compiled.
INTEGERS_PAY_FROM_WIDTH = 256
in_integers = False  # see `integer_products`


@contextlib.contextmanager
def integer_products():
    """Within it, the linear layers of the blocks compute by `IntegerLinear` wherever gradients are wanted, as
    autocast would have them compute in bfloat16."""
    global in_integers
    before, in_integers = in_integers, True
    try:
        yield
    finally:
        in_integers = before


def for_both_passes():
    """For `torch.utils.checkpoint`: the second forward pass computes as the first did."""
    again = integer_products() if in_integers else contextlib.nullcontext()
    return contextlib.nullcontext(), again


def multiplies_integers(device: torch.device) -> bool:
    """Whether products of 8-bit numbers are fast and exact here: about four times as fast as float32 on x86
    CPUs with VNNI. Without it they add two products in 16 bits, which overflows; elsewhere torch has no
    kernel worth using."""
    if device.type != "cpu" or not has_packed_products():
        return False
    able = cpu_features()
    return bool(able.get("avx512_vnni") or able.get("avx_vnni"))


def prefers_integers(device: torch.device, width: int) -> bool:
    """Whether a model of this width should compute in 8-bit products on this machine. Where bfloat16 is fast,
    bfloat16 is preferred: it is more exact."""
    wide = width >= INTEGERS_PAY_FROM_WIDTH
    return wide and multiplies_integers(device) and not prefers_bfloat16(device)


@functools.cache
def has_packed_products() -> bool:
    """Whether this is an x86 CPU with oneDNN's kernels."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def round_to_integers(x: torch.Tensor, dim=-1) -> tuple[torch.Tensor, torch.Tensor]:
    """x -> whole numbers -127 ... 127 as int8, and float32 scales, so that their product is x but for half a
    step of rounding. One scale for all numbers along `dim`: -1 per row, 0 per column, (0, 1) for all."""
    peak = torch.maximum(x.amax(dim, keepdim=True), x.amin(dim, keepdim=True).neg_()).float()
    peak = peak.clamp_(min=1e-28)  # of a NaN or an infinity the scale tells
    return (x * (127 / peak)).round_().to(torch.int8), peak.mul_(1 / 127)


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_to_integers` with one scale. What a frozen weight (below an adapter, of a teacher) was rounded
    to is kept beside it, until somebody writes to it (through `.data` or `.detach()` unnoticed)."""
    if weight.requires_grad or torch.compiler.is_compiling():
        return round_to_integers(weight, dim=(0, 1))
    state = (weight._version, weight.data_ptr())
    kept = getattr(weight, "rounded", None)
    if kept is None or kept[0] != state:
        kept = weight.rounded = (state, round_to_integers(weight.detach(), dim=(0, 1)))
    return kept[1]


class IntegerLinear(torch.autograd.Function):
    """y = x W^T and both its gradients as products of 8-bit integers, whose sums are exact.

    x (..., in) float32, weight (out, in) float32 -> (..., out) float32. The inputs have one scale per token,
    the weights one (SwitchBack, Wortsman et al. 2023, https://arxiv.org/abs/2304.13013, section 2.2). The
    gradient of y meets the weights with one scale per token. For the gradient of the weights, a sum over
    tokens, it takes the inputs' scales upon itself and has one scale per output: so the rounded inputs are
    all that is kept for it, a quarter of the memory.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x_int, x_scale = round_to_integers(x.reshape(-1, x.shape[-1]))
        w_int, w_scale = round_weight(weight)
        inputs = (x_int, x_scale) if ctx.needs_input_grad[1] else (None, None)
        ctx.save_for_backward(*inputs, w_int, w_scale)
        y = torch._int_mm(x_int, w_int.t()).float().mul_(x_scale * w_scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x_int, x_scale, w_int, w_scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            g_int, g_scale = round_to_integers(rows)
            grad_x = torch._int_mm(g_int, w_int).float().mul_(g_scale * w_scale)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            g_int, g_scale = round_to_integers(rows * x_scale, dim=0)
            grad_weight = torch._int_mm(g_int.t(), x_int).float().mul_(g_scale.t())
        return grad_x, grad_weight
