"""Rows of the operator's benchmark, their table, CSV, markdown and plot."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from bench.harness.shapes import PHASES, Case, bare, floor_bytes

# How calls were timed (bench.harness.devices).
MODES = {"eager": "Eager calls", "graph": "Replays of CUDA graphs"}
LABELS = {"norm": "norm alone"}  # it does not do the operator's work, and is named so wherever shown


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
    mode: str
    phase: str
    provider: str
    backend: str
    samples: int
    median_ms: float
    lower_ms: float  # quartiles
    upper_ms: float
    floor_mb: float  # bytes that must move (bench.harness.shapes.floor_bytes; norm: the norm's), 1e6
    gb_per_s: float  # the floor's bytes in the median time, 1e9
    share_of_copy: float  # of a plain copy's bytes per second in the same case
    speedup: float  # its median over cen_ext's: how many times as fast cen_ext is
    peak_mb: float  # most tensor memory of forward and backward above the inputs, 1e6 (copy: of the copy)

    @property
    def key(self) -> tuple[str, ...]:
        """Key of the row's kind: its case without the shape."""
        return (self.group, self.statistics, self.layout, self.dtype, str(self.modalities))


def make_rows(
    case: Case,
    mode: str,
    times: Mapping[tuple[str, str], Sequence[float]],
    peaks: Mapping[str, int],
    backends: Mapping[str, str],
) -> list[Row]:
    """Figures of one case and mode from seconds by provider and phase; "copy" is there, forward alone."""
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    copy = 2 * case.x_bytes / medians["copy", "forward"]
    work = {"norm": bare(case)}
    rows = []
    for (provider, phase), taken in times.items():
        floor = 2 * case.x_bytes if provider == "copy" else floor_bytes(work.get(provider, case), phase)
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
                mode=mode,
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


# A table's first row is its header.
Table = list[list[str]]
KIND = ["group", "statistics", "layout", "dtype", "M", "backend"]


def kinds(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of the shapes that are averaged, by the columns of ``KIND``; the backend is cen_ext's."""
    backends = {(r.key, r.size): r.backend for r in rows if r.provider == "cen_ext"}
    members: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for r in rows:
        kind = (*r.key, backends[r.key, r.size])
        members[kind].append(r)
    return members


def label(provider: str) -> str:
    """Its name where it is shown."""
    return LABELS.get(provider, provider)


def mean(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    """The geometric mean with the worst value in brackets; a dash without values."""
    return f"{geometric_mean(values):.2f} ({worst(values):.2f})" if values else "–"


def others(rows: Sequence[Row]) -> list[str]:
    """Names of the providers that cen_ext is compared with."""
    return list(dict.fromkeys(r.provider for r in rows if r.provider not in ("cen_ext", "copy")))


def speed(rows: Sequence[Row]) -> Table:
    """cen_ext's share of copy and its speed-ups: geometric means over the shapes, the lowest in brackets."""
    table = [[*KIND, "phase", "share of copy", *(f"× {label(name)}" for name in others(rows))]]
    for kind, members in kinds(rows).items():
        for phase in PHASES:
            of_phase = [r for r in members if r.phase == phase]
            columns = [[r.share_of_copy for r in of_phase if r.provider == "cen_ext"]]
            columns += [[r.speedup for r in of_phase if r.provider == name] for name in others(rows)]
            table.append([*kind, phase, *(mean(column, min) for column in columns)])
    return table


def memory(rows: Sequence[Row]) -> Table:
    """cen_ext's peak memory over the others': geometric means over the shapes, the highest in brackets."""
    table = [[*KIND, *(f"÷ {label(name)}" for name in others(rows))]]
    for kind, members in kinds(rows).items():
        peaks = {(r.provider, r.size): r.peak_mb for r in members}
        sizes = list(dict.fromkeys(r.size for r in members))
        columns = [
            [peaks["cen_ext", s] / peaks[name, s] for s in sizes if (name, s) in peaks]
            for name in others(rows)
        ]
        table.append([*kind, *(mean(column, max) for column in columns)])
    return table


def details(rows: Sequence[Row]) -> Table:
    """Case by case and phase by phase: cen_ext's figures, and its speed-up over the others."""
    figures = ["floor MB", "ms (quartiles)", "GB/s", "share of copy"]
    table = [[*KIND[:-1], "size", "phase", *figures, *(f"× {label(name)}" for name in others(rows))]]
    speedups = {(r.key, r.size, r.phase, r.provider): f"{r.speedup:.2f}" for r in rows}
    for r in rows:
        if r.provider == "cen_ext":
            milliseconds = f"{r.median_ms:.3f} ({r.lower_ms:.3f}–{r.upper_ms:.3f})"
            cells = [f"{r.floor_mb:.2f}", milliseconds, f"{r.gb_per_s:.1f}", f"{r.share_of_copy:.2f}"]
            cells += [speedups.get((r.key, r.size, r.phase, name), "–") for name in others(rows)]
            table.append([*r.key, r.size, r.phase, *cells])
    return table


def by_mode(title: str, table: Callable[[Sequence[Row]], Table], rows: Sequence[Row]) -> dict[str, Table]:
    """A table of each mode by its title, which names the mode where there are several."""
    modes = list(dict.fromkeys(r.mode for r in rows))
    tables = {}
    for mode in modes:
        named = f"{MODES[mode]}: {title[0].lower()}{title[1:]}" if len(modes) > 1 else title
        tables[named] = table([r for r in rows if r.mode == mode])
    return tables


def means(rows: Sequence[Row]) -> dict[str, Table]:
    """Speed of every mode, and memory, by title."""
    eager = [r for r in rows if r.mode == "eager"]
    title = "Share of copy speed, and speed-up over the others: geometric mean (lowest) over the shapes"
    return {
        **by_mode(title, speed, rows),
        "Peak memory over the others': geometric mean (highest) over the shapes": memory(eager),
    }


def lines_of(settings: Mapping[str, object]) -> list[str]:
    """``name: value`` lines; a value of several parts on one line too."""
    plain = {
        name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        for name, value in settings.items()
    }
    return [f"{name}: {value}" for name, value in plain.items()]


def as_text(rows: Sequence[Row], settings: Mapping[str, object], summary: Mapping[str, Table]) -> str:
    """Settings and tables for a terminal: the means, every case, and a summary's tables by title last."""
    parts = ["\n".join(lines_of(settings))]
    for title, cells in {**means(rows), **by_mode("Every case", details, rows), **summary}.items():
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def as_markdown(rows: Sequence[Row], settings: Mapping[str, object], summary: Mapping[str, Table]) -> str:
    """Settings, a summary's tables by title and the tables of means, to be quoted."""
    parts = [" · ".join(lines_of(settings))]
    for title, cells in {**summary, **means(rows)}.items():
        header, *body = ["| " + " | ".join(row) + " |" for row in cells]
        rule = "|" + "---|" * (header.count("|") - 1)
        parts.append("\n".join([f"{title}.\n", header, rule, *body]))
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Row], settings: Mapping[str, object]) -> str:
    """Every row; the settings before them as comments."""
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in lines_of(settings))
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
