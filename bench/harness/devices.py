"""The devices that the operator's benchmark runs on: how a call is timed, and what keeps its inputs cold."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from bench.harness.machine import gpu, last_level_cache, machine
from bench.harness.memory import device_bytes, keep_freed_memory, populate, return_free_memory, tensor_bytes
from bench.harness.shapes import Case

MOST_SETS = 16
MOST_MEMORY = 6 * 2**30
TENSORS_A_SET = 20  # of x's size: inputs, and what the reference takes until its backward pass is over
LEAD_CYCLES = 200_000  # of a GPU, 0.1 ms: more than the host takes to launch a graph

# Calls the function with the arguments; its result and the seconds that it took.
Timer = Callable[..., tuple[Any, float]]


class Device(Protocol):
    """Interface of a device to a run."""

    name: str  # of the torch device
    repetitions: int  # the default
    timers: dict[str, Timer]  # by mode: "eager" calls, and "graph" replays where there are CUDA graphs

    def settings(self) -> dict[str, object]:
        """Facts that the figures depend on, by name."""

    def count_sets(self, case: Case) -> int:
        """Number of input sets of a round."""

    def release(self) -> None:
        """Give back what earlier cases held."""

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most memory of tensors that ``run`` held at once beyond what was there."""

    def reserve(self, size: int) -> None:
        """Have ``size`` bytes at hand, so that no timed call has to get them from the system."""


class Cpu:
    """Calls are over when they return; their inputs are out of the cache in the next round.

    Args:
        cold: use enough input sets that each has left the cache when it is used again.
        kept: have glibc keep freed memory.
    """

    name = "cpu"
    repetitions = 7

    def __init__(self, cold: bool, kept: bool) -> None:
        self.cache = last_level_cache() if cold else 0
        self.kept = kept and keep_freed_memory()
        self.timers: dict[str, Timer] = {"eager": host_time}

    def settings(self) -> dict[str, object]:
        allocator = "keeps freed memory (mallopt)" if self.kept else "the C library's, as it is"
        return {**machine(), "cache": "cold" if self.cache else "warm", "allocator": allocator}

    def count_sets(self, case: Case) -> int:
        return count_sets(case, self.cache)

    def release(self) -> None:
        return_free_memory()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        return tensor_bytes(run)[1]

    def reserve(self, size: int) -> None:
        if self.kept:
            populate(size)


class Gpu:
    """The current GPU. An eager call starts on an idle device and includes the host's part, launch by launch;
    a graph waits behind other work when it is replayed, so that its time is the kernels' alone.

    Args:
        cold: flush the L2 before every call; otherwise it is as the previous round left it.
    """

    name = "cuda"
    repetitions = 25

    def __init__(self, cold: bool) -> None:
        self.l2: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.cold = cold
        # Three times the L2, in float32.
        self.buffer = torch.zeros(3 * self.l2 // 4 if cold else 0, device=self.name)
        self.timers: dict[str, Timer] = {
            "eager": partial(event_time, self._prepare_eager),
            "graph": partial(event_time, self._prepare_graph),
        }

    def _flush(self) -> None:
        self.buffer.zero_()
        self.buffer.sum()  # leaves clean lines behind: no timed call has to write others' back

    def _prepare_eager(self) -> None:
        if self.cold:
            self._flush()
        torch.cuda.synchronize()

    def _prepare_graph(self) -> None:
        if self.cold:
            self._flush()
        torch.cuda._sleep(LEAD_CYCLES)

    def settings(self) -> dict[str, object]:
        return {**machine(), **gpu(), "cache": "cold" if self.cold else "warm"}

    def count_sets(self, case: Case) -> int:
        return 1

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        return device_bytes(run)

    def reserve(self, size: int) -> None:
        pass  # PyTorch's allocator keeps what the first round took


def count_sets(case: Case, cache: int) -> int:
    """Input sets until x alone is twice the cache, within the limits above; 1 without a cache to flush."""
    wanted = -(-2 * cache // case.x_bytes)
    return max(1, min(wanted, MOST_SETS, MOST_MEMORY // (TENSORS_A_SET * case.x_bytes)))


def host_time(function: Callable[..., Any], *arguments: object) -> tuple[Any, float]:
    """Result and seconds by the host's clock."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def event_time(
    prepare: Callable[[], None], function: Callable[..., Any], *arguments: object
) -> tuple[Any, float]:
    """Result and seconds between two events of the current stream around the call, after ``prepare``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepare()
    start.record()
    result = function(*arguments)
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3
