"""Which floating-point type this machine multiplies fastest; shared by training and generation."""

import functools
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


@functools.cache
def cpu_prefers_bfloat16() -> bool:
    """Multiplies once in each type, best of several: 20 ms on one core of a small machine. The factor keeps
    the answer the same from run to run; no machine seen lies near it."""
    return product_seconds(torch.bfloat16) * 1.3 < product_seconds(torch.float32)


def product_seconds(dtype: torch.dtype, repeats: int = 5) -> float:
    """Seconds of one (512, 512) x (512, 512) product in `dtype`, the best of `repeats`."""
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(repeats + 1):  # the first prepares the kernel
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - begin)
    return best
