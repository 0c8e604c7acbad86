"""Operator benchmark driver: select providers, check their results, time them interleaved."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.harness.capture import NotCaptured, capture
from bench.harness.devices import Device, Timer
from bench.harness.providers import (
    UNCHECKED,
    FunctionProvider,
    Provider,
    check_agreement,
    chosen_backend,
    make_provider,
    make_sets,
    results,
)
from bench.harness.report import Row, make_rows
from bench.harness.shapes import Case

ALWAYS = ("cen_ext", "copy")  # what rows compare with
MOST_OF_BUDGET = 1 / 3  # that preparing one provider, compiling it above all, may take


def time_provider(provider: Provider, timer: Timer) -> Iterator[tuple[str, float]]:
    """One round: forward of all sets, then backward of all; phase and seconds of each call."""
    timed: list[Any] = [timer(provider.forward, i) for i in range(len(provider.calls))]
    for i, call in enumerate(provider.calls):
        (outputs, forward), timed[i] = timed[i], None
        yield "forward", forward
        if call.leaves:
            gradients, backward = timer(provider.backward, i, outputs)
            del gradients  # here and not in the next set's time
            yield from (("backward", backward), ("both", forward + backward))
        del outputs


class Run:
    """Measures cases one by one, and remembers what is missing.

    Args:
        device: where and how calls are timed.
        repetitions: timed rounds.
        budget: seconds of which preparing one provider may take ``MOST_OF_BUDGET``.
    """

    def __init__(self, device: Device, repetitions: int, budget: float = math.inf) -> None:
        self.device = device
        self.repetitions = repetitions
        self.budget = budget
        self.missing: Counter[str] = Counter()  # cases by what they lack, and why
        self.failed = False  # something is missing that should be there
        self._preparing: dict[str, float] = defaultdict(float)  # seconds by provider

    def measure(self, case: Case, names: Sequence[str]) -> list[Row]:
        """Check the providers of one case, measure their memory, then time them interleaved."""
        torch.compiler.reset()  # the earlier shapes' code is not needed again
        self.device.release()
        rows: list[Row] = []
        with self._noting("case"):
            sets = make_sets(case, self.device.count_sets(case), self.device.name)
            expected = results(make_provider("reference", case, sets[:1]))
            providers: dict[str, FunctionProvider] = {}
            peaks: dict[str, int] = {}
            for name in filter(self._affordable, names):
                with self._noting(name), self._preparation(name):
                    provider = make_provider(name, case, sets)
                    if name not in UNCHECKED:
                        check_agreement(case, provider, expected)
                    if provider.calls[0].leaves:
                        peaks[name] = self.device.peak_bytes(provider.step)
                    providers[name] = provider
            if not providers.keys() >= set(ALWAYS):
                return rows  # noted above
            timed = self._providers_by_mode(case, providers, expected)
            del expected
            self.device.reserve(len(sets) * max(peaks.values()))
            backends = {"cen_ext": chosen_backend(case, sets[0])}
            for mode, times in self._time(timed).items():
                rows += make_rows(case, mode, times, peaks, backends)
        return rows

    def _providers_by_mode(
        self, case: Case, providers: dict[str, FunctionProvider], expected: dict[str, Tensor]
    ) -> dict[tuple[str, str], Provider]:
        """By mode and name: everybody eager and, on a GPU, captured in graphs."""
        timed: dict[tuple[str, str], Provider] = {
            ("eager", name): provider for name, provider in providers.items()
        }
        if "graph" not in self.device.timers:
            return timed
        captured: dict[tuple[str, str], Provider] = {}
        for name, provider in providers.items():
            with self._noting(f"{name}, captured"), self._preparation(name):
                try:
                    graphs = capture(provider)
                except NotCaptured as error:
                    self.missing[f"{name}: not captured, {error}"] += 1
                    continue
                if name not in UNCHECKED:
                    check_agreement(case, graphs, expected)
                captured["graph", name] = graphs
        if all(("graph", name) in captured for name in ALWAYS):
            return timed | captured
        self.failed = True
        return timed

    def _time(self, timed: dict[tuple[str, str], Provider]) -> dict[str, dict[tuple[str, str], list[float]]]:
        """Seconds by mode, then by provider and phase."""
        times: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
        gc.collect()
        gc.disable()
        try:
            for repetition in range(self.repetitions + 1):
                for (mode, name), provider in timed.items():
                    for phase, seconds in time_provider(provider, self.device.timers[mode]):
                        if repetition > 0:  # the first one warms up
                            times[mode][name, phase].append(seconds)
        finally:
            gc.enable()
        return times

    def _affordable(self, name: str) -> bool:
        within = name in ALWAYS or self._preparing[name] <= MOST_OF_BUDGET * self.budget
        if not within:
            self.missing[f"{name}: preparing it had taken {MOST_OF_BUDGET:.0%} of the time"] += 1
        return within

    @contextmanager
    def _preparation(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._preparing[name] += time.perf_counter() - start

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Note what fails, and go on without it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self.missing[f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"] += 1
