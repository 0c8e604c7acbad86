"""Counters in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

_BOUNDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds


class Metrics:
    """What has been asked and how long answers took; used by one thread."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0

    def count(self, path: str, status: int) -> None:
        """Count an answer."""
        self._requests[path, status] += 1

    def observe(self, seconds: float) -> None:
        """Note how long an answer of the network took, from the first byte of its request on."""
        self._buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._seconds += seconds

    def text(self, gauges: Mapping[str, tuple[str, int]]) -> str:
        """All of it.

        Args:
            gauges: by name a description, and the value now.
        """
        lines = _head("cen_requests_total", "counter", "Requests by path and status; 499: the client left.")
        for (path, status), number in sorted(self._requests.items()):
            lines.append(f'cen_requests_total{{path="{path}",status="{status}"}} {number}')
        for name, (help, value) in gauges.items():
            lines += [*_head(name, "gauge", help), f"{name} {value}"]
        name = "cen_predict_seconds"
        lines += _head(name, "histogram", "Seconds from a request's first byte to the network's answer.")
        total = 0
        for bound, number in zip((*_BOUNDS, "+Inf"), self._buckets, strict=True):
            total += number
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return "\n".join([*lines, f"{name}_sum {self._seconds:.6f}", f"{name}_count {total}", ""])


def _head(name: str, kind: str, help: str) -> list[str]:
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
