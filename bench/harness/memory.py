"""Measure the memory that a function takes, and set how the C library's allocator behaves."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def tensor_bytes(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of tensors that ``run`` leaves (its result is alive) and the most it held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return held, peak


def device_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors on the GPU that ``run`` held at once beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_bytes(run: Callable[[], object]) -> int | None:
    """The most resident memory that ``run`` added to the process; None where Linux does not tell."""
    status = Path("/proc/self/status")
    if not return_free_memory():  # what earlier steps freed
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None

    def read(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024

    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for the next allocation; False where there is no glibc.

    Left alone it gives every block above 32 MiB back to the system at once and gets it anew for the next
    tensor, and the page faults, the same for whoever allocates, drown what a benchmark is to show.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Not M_MMAP_THRESHOLD: before 2.35 it accepts no more than 32 MiB. No trimming is -1.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def populate(size: int) -> None:
    """Have ``size`` bytes of kept memory from the system beforehand.

    Blocks do not always fit where others have been freed, so that the heap grows for a while even where
    the same tensors are allocated again and again.
    """
    torch.empty(size, dtype=torch.uint8).fill_(1)


def return_free_memory() -> bool:
    """Give the C library's free memory back to the system; False where there is no glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True
