"""A comparison as one picture: a panel for each score, bars for the outputs of each group of runs."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.comparison.compare import Comparison
from models.comparison.runs import outputs
from models.training.files import replacing
from models.visualize import output_color

_COLUMNS = 4


def save_picture(path: Path, comparison: Comparison) -> None:
    """Draw means with their spread, and every run as a dot, as a PNG."""
    scores = comparison.scores
    rows = -(-len(scores) // _COLUMNS)
    columns = min(len(scores), _COLUMNS)
    width = max(2.6, 0.5 + 0.7 * len(comparison.groups))
    figure = Figure(figsize=(columns * width + 0.4, 2.9 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, score in zip(panels, scores, strict=False):
        _panel(axes, comparison, score)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _panel(axes: Axes, comparison: Comparison, score: str) -> None:
    branches = dict.fromkeys(name for group in comparison.groups for name in outputs(group.runs[0])[:-1])
    names = [*branches, "ensemble"]
    factor = 100 if comparison.per_cent else 1
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        color = output_color(name, i)
        places = [at + (i - (len(names) - 1) / 2) * width for at in range(len(comparison.groups))]
        values = [comparison.shown(f"{name}/{score}", group) for group in comparison.groups]
        heights = [math.nan if value is None else value.mean for value in values]
        spreads = [value.spread if value is not None and value.spread else math.nan for value in values]
        axes.bar(places, heights, 0.92 * width, yerr=spreads, capsize=2, color=color, label=name)
        for place, group in zip(places, comparison.groups, strict=True):
            dots = [factor * run.metrics.get(f"{name}/{score}", math.nan) for run in group.runs]
            axes.plot([place] * len(dots), dots, ".", color="black", markersize=3)
    axes.set_axis_on()
    axes.set_title(score.replace("_", " ") + (", per cent" if comparison.per_cent else ""), fontsize=9)
    labels = [group.name for group in comparison.groups]
    axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=20, ha="right")
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
