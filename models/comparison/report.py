"""A comparison in tables: for the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.comparison.compare import Comparison
from models.comparison.costs import Costs
from models.comparison.groups import Group, Value, differences
from models.comparison.picture import save_picture
from models.comparison.runs import outputs
from models.text import aligned
from models.training.files import replacing, write_json

Cells = list[list[str]]  # the first row is the head

NAME = "compare"  # of the files
_UNFINISHED = "*"
_HOW = (
    "Metrics are those of the last evaluation; ± is the standard deviation over runs that differ in the seed "
    "alone. Multiply-adds are those of convolutions and matrix products for one scene of the input's size. "
    "Training's images/s are the median over a run's log, its peak memory is the process's."
)


def metric_cells(comparison: Comparison) -> Cells:
    """A row for each output of each group, a column for each score."""
    decimals = 2 if comparison.per_cent else 4
    cells = [["", "runs", "output", *(score.replace("_", " ") for score in comparison.scores)]]
    for group in comparison.groups:
        names = outputs(group.runs[0])
        for i, output in enumerate(names):
            values = [comparison.shown(f"{output}/{score}", group) for score in comparison.scores]
            start = [_name(group), str(len(group.runs))] if i == 0 else ["", ""]
            cells.append([*start, output, *(_text(value, decimals) for value in values)])
    return cells


def cost_cells(comparison: Comparison) -> Cells:
    """A row for each group."""
    head = ["", "parameters", "multiply-adds", "of input", "training images/s", "peak MiB", "trained on"]
    measured = any(cost.images_per_second is not None for cost in comparison.costs)
    cells = [[*head, *(["inference images/s", "measured on"] if measured else [])]]
    for group, cost in zip(comparison.groups, comparison.costs, strict=True):
        modalities, _, height, width = cost.shape
        row = [
            _name(group),
            f"{cost.parameters:,}",
            f"{cost.multiply_adds / 1e9:.3g} G",
            f"{modalities} x {height} x {width}",
            _text(group.value(lambda run: run.images_per_second), 2),
            _text(group.value(lambda run: run.peak_memory), 0),
            "; ".join(dict.fromkeys(run.machine for run in group.runs)),
        ]
        if measured:
            row += [f"{cost.images_per_second:.2f}", cost.measured_on]
        cells.append(row)
    return cells


def difference_cells(comparison: Comparison) -> Cells:
    """A row for each setting that differs, a column for each group; none where none differs."""
    found = differences(comparison.groups)
    head = ["", *map(_name, comparison.groups)]
    return [head, *([path, *values] for path, values in found.items())] if found else []


def members(comparison: Comparison) -> list[str]:
    """The runs of each group, with their seeds."""
    return [
        f"{_name(group)}: " + ", ".join(f"{run.path} (seed {run.recipe.run.seed})" for run in group.runs)
        for group in comparison.groups
    ]


def text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    tables = [metric_cells(comparison), cost_cells(comparison), difference_cells(comparison)]
    legend = [*members(comparison), *textwrap.wrap(_HOW, 110)]
    unit = "in per cent\n" if comparison.per_cent else ""
    return unit + "\n\n".join([*(aligned(cells) for cells in tables if cells), "\n".join(legend)])


def markdown(comparison: Comparison, picture: str) -> str:
    """The comparison as a page, with the picture of that name."""
    unit = " in per cent" if comparison.per_cent else ""
    parts = ["# Comparison of runs", f"Metrics{unit}:", _markdown(metric_cells(comparison)), "Costs:"]
    parts.append(_markdown(cost_cells(comparison)))
    if cells := difference_cells(comparison):
        parts += ["Settings that differ:", _markdown(cells)]
    parts += ["\n".join(f"- {line}" for line in members(comparison)), _HOW]
    parts += ["\n".join(f"- Warning: {warning}." for warning in comparison.warnings)] * bool(
        comparison.warnings
    )
    return "\n\n".join([*parts, f"![Metrics of every output]({picture})"]) + "\n"


def plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison for JSON: metrics as the runs have them, not in per cent."""
    return {
        "groups": [
            _plain(group, cost) for group, cost in zip(comparison.groups, comparison.costs, strict=True)
        ],
        "differences": {
            path: dict(zip([group.name for group in comparison.groups], values, strict=True))
            for path, values in differences(comparison.groups).items()
        },
        "warnings": list(comparison.warnings),
    }


def write(folder: Path, comparison: Comparison) -> None:
    """Write ``compare.md``, ``.csv``, ``.json`` and ``.png`` into a folder that is there."""
    file = folder / f"{NAME}.md"
    with replacing(file) as temporary:
        temporary.write_text(markdown(comparison, f"{NAME}.png"))
    _write_csv(file.with_suffix(".csv"), comparison)
    write_json(file.with_suffix(".json"), plain(comparison))
    save_picture(file.with_suffix(".png"), comparison)


def _write_csv(path: Path, comparison: Comparison) -> None:
    """One line per group, output and score, as the runs have them."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "runs", "output", "score", "mean", "spread"])
        for group in comparison.groups:
            for name in group.runs[0].metrics:
                output, _, score = name.partition("/")
                if (value := group.metric(name)) is not None:
                    writer.writerow([group.name, len(group.runs), output, score, value.mean, value.spread])


def _plain(group: Group, cost: Costs) -> dict[str, Any]:
    metrics = {name: value for name in group.runs[0].metrics if (value := group.metric(name)) is not None}
    training = {
        "images_per_second": group.value(lambda run: run.images_per_second),
        "peak_memory_mib": group.value(lambda run: run.peak_memory),
    }
    return {
        "name": group.name,
        "runs": [
            {
                "path": str(run.path),
                "seed": run.recipe.run.seed,
                "step": run.step,
                "total": run.total,
                "trained_on": run.machine,
                "metrics": run.metrics,
            }
            for run in group.runs
        ],
        "metrics": {name: asdict(value) for name, value in metrics.items()},
        "training": {name: None if value is None else asdict(value) for name, value in training.items()},
        "network": asdict(cost),
    }


def _name(group: Group) -> str:
    return group.name if group.finished else f"{group.name} {_UNFINISHED}"


def _text(value: Value | None, decimals: int) -> str:
    if value is None:
        return "-"
    spread = "" if value.spread is None else f" ± {value.spread:.{decimals}f}"
    return f"{value.mean:.{decimals}f}{spread}"


def _markdown(cells: Cells) -> str:
    head, *rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([head, "|---" * len(cells[0]) + "|", *rows])
