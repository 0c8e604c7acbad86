"""Rows of the operator's benchmark, their table, CSV, markdown and plot."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.machine import write
from bench.shapes import Case, floor_bytes


@dataclass(frozen=True)
class Row:
    """One provider's figures of one case and phase."""

    group: str
    size: str  # of a modality: NxCxHxW
    modalities: int
    batch: int
    dtype: str
    layout: str
    statistics: str
    phase: str
    provider: str
    backend: str
    samples: int
    median_ms: float
    lower_ms: float  # quartiles
    upper_ms: float
    floor_mb: float  # bytes that must move (bench.shapes.floor_bytes), 1e6
    gb_per_s: float  # the floor's bytes in the median time, 1e9
    share_of_copy: float  # of a plain copy's bytes a second in the same case
    speedup: float  # its median over cen_ext's: how many times as fast cen_ext is
    peak_mb: float  # most tensor memory of forward and backward above the inputs, 1e6


def make_rows(
    case: Case,
    times: Mapping[tuple[str, str], Sequence[float]],
    peaks: Mapping[str, int],
    backends: Mapping[str, str],
) -> list[Row]:
    """Figures of one case from its seconds by provider and phase; among them "copy", forward alone."""
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    copy = 2 * case.x_bytes / medians["copy", "forward"]
    rows = []
    for (provider, phase), taken in times.items():
        floor = 2 * case.x_bytes if provider == "copy" else floor_bytes(case, phase)
        median = medians[provider, phase]
        lower, _, upper = quartiles(taken)
        ours = medians.get(("cen_ext", phase), math.nan)
        rows.append(
            Row(
                group=case.group,
                size=case.size,
                modalities=case.shape.num_modalities,
                batch=case.shape.batch,
                dtype=case.dtype,
                layout=case.layout,
                statistics=case.statistics,
                phase=phase,
                provider=provider,
                backend=backends.get(provider, ""),
                samples=len(taken),
                median_ms=1e3 * median,
                lower_ms=1e3 * lower,
                upper_ms=1e3 * upper,
                floor_mb=floor / 1e6,
                gb_per_s=floor / median / 1e9,
                share_of_copy=floor / median / copy,
                speedup=median / ours,
                peak_mb=peaks.get(provider, case.x_bytes) / 1e6,
            )
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third; the value itself where there is one."""
    if len(values) == 1:
        return (values[0],) * 3
    first, second, third = statistics.quantiles(values, method="inclusive")
    return first, second, third


def geometric_mean(values: Iterable[float]) -> float:
    """The n-th root of the product of n positive values; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def describe(case: Case) -> str:
    """A case in one line."""
    return (
        f"{case.group} {case.statistics} {case.layout} {case.dtype} M={case.shape.num_modalities} {case.size}"
    )


Table = list[list[str]]  # the first row is the header


def summary(rows: Sequence[Row]) -> Table:
    """Geometric means over the shapes of each kind, with the lowest in brackets: share of copy, speed-ups."""
    providers = list(dict.fromkeys(r.provider for r in rows if r.provider not in ("copy", "cen_ext")))
    header = ["group", "statistics", "layout", "dtype", "M", "phase", "share of copy"]
    table = [header + [f"× {name}" for name in providers]]
    kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for r in rows:
        kinds[r.group, r.statistics, r.layout, r.dtype, str(r.modalities), r.phase].append(r)
    for kind, members in kinds.items():
        columns = [[r.share_of_copy for r in members if r.provider == "cen_ext"]]
        columns += [[r.speedup for r in members if r.provider == name] for name in providers]
        table.append([*kind, *(mean_and_lowest(column) for column in columns)])
    return table


def mean_and_lowest(values: Sequence[float]) -> str:
    """``2.41 (1.90)``: geometric mean and the lowest."""
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else ""


def aligned(table: Table) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table
    )


def show(rows: Sequence[Row], settings: Mapping[str, object]) -> None:
    for name, value in settings.items():
        print(f"{name}: {value}")
    print(aligned(summary(rows)))


def write_all(out: Path, rows: Sequence[Row], settings: Mapping[str, object]) -> None:
    text = io.StringIO()
    for name, value in settings.items():
        text.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write(out.with_name(out.name + ".csv"), text.getvalue())
