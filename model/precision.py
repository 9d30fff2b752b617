"""What this machine multiplies fastest; shared by training and generation."""

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
