"""Small cases of the benchmark, and rows of them from made-up times."""

from __future__ import annotations

from dataclasses import replace

from bench.harness import report, shapes
from bench.harness.shapes import GROUPS, Case, Shape


def case(group: str = "resnet", *, size: tuple[int, int, int] = (2, 20, 5), **changes: object) -> Case:
    kind = GROUPS[group]
    batch, channels, side = size
    shape = Shape(2, batch, channels, (side, side))
    made = Case(group, shape, kind.options, kind.residual, "batch", "float32", "contiguous")
    return replace(made, **changes)


def made_up_rows(one: Case, mode: str, milliseconds: dict[str, float]) -> list[report.Row]:
    times = {
        (name, phase): [1e-3 * t]
        for name, t in milliseconds.items()
        for phase in (("forward",) if name == "copy" else shapes.PHASES)
    }
    peaks = {name: 1000 for name in milliseconds if name != "copy"}
    return report.make_rows(one, mode, times, peaks, {"cen_ext": "cuda"})
