"""Joules that a run used, where the hardware counts them: CPU packages by Linux' powercap files (RAPL),
NVIDIA boards by the driver's own library (NVML). Nothing is estimated here; what has no counter is unknown.

A CPU counter is of the whole package, whoever else computes on it, and does not see disks, fans or the power
supply; only root may read it on most systems. A board's counter is of the whole board.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Adds up what the counters of this process moved on: CPU packages by the first process of a machine, a
    board by the process that uses it. `used()` -> joules since the call before, None without a counter."""

    def __init__(self, device=None, counts_cpu: bool = True):
        """device: the torch.device of this process, None = no board."""
        self.counters = cpu_counters() if counts_cpu else []
        if device is not None and device.type == "cuda":
            self.counters += board_counters(device)
        self.before = [read() for read, _ in self.counters]

    def used(self) -> float | None:
        if not self.counters:
            return None
        now = [read() for read, _ in self.counters]
        spans = [span for _, span in self.counters]
        before, self.before = self.before, now
        return sum(moved(a, b, span) for a, b, span in zip(before, now, spans))


def moved(before: float, now: float, span: float) -> float:
    """Joules between two readings of a counter that starts again at `span` joules (0 = it never does)."""
    return now - before if now >= before else now + span - before if span else 0.0


def cpu_counters() -> list:
    """(function that reads joules, joules at which it starts again) of every CPU package that can be read.
    Domains inside a package (cores, memory) are named PACKAGE:N and are part of it."""
    found = []
    for zone in sorted(POWERCAP.glob("*-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            if zone.name.count(":") > 1 or not zone.joinpath("name").read_text().startswith("package"):
                continue
            energy = zone / "energy_uj"

            def read(energy=energy) -> float:
                return int(energy.read_text()) / 1e6

            read()
            found.append((read, int((zone / "max_energy_range_uj").read_text()) / 1e6))
    return found


def board_counters(device) -> list:
    """The same of an NVIDIA board, by its identifier, which CUDA_VISIBLE_DEVICES does not change."""
    import torch

    with contextlib.suppress(OSError, AttributeError, AssertionError, RuntimeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return []

        def read() -> float:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
            return millijoules.value / 1e3

        if not nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return [(read, 0.0)]
    return []
