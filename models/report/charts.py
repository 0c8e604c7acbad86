"""Line charts and heat maps as SVG that takes the page's colors, light or dark.

Matplotlib draws them, in colors that stand for the page's: the SVG names CSS variables in their place.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from models.report.blocks import Chart

COLORS = 8  # of ``--c0`` to ``--c7``; more series begin anew
PREFIX = "drawing-"  # of the names in a drawing, which a page numbers: no two drawings may share a name
_INK, _LINE = "#010203", "#040506"
_VARIABLES = {_INK: "var(--ink)", _LINE: "var(--line)"} | {
    f"#0a0b{number:02x}": f"var(--c{number})" for number in range(COLORS)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.formatter.useoffset": False,
}
_SIZE = (4.6, 2.8)  # inches of 72 units: a phone shows letters of 10 pixels
_LOG_FROM = 30.0  # ratio of the largest to the smallest value above which the axis is logarithmic
# One hue whose lightness alone rises, so that it reads the same for all eyes and in print.
_SHARES = LinearSegmentedColormap.from_list("shares", ["#f2f0e6", "#9cc3d9", "#2f7fb0", "#0b3c5d"])


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        x, y: of its points.
        color: a number below ``COLORS``, or above to begin anew.
        thin: one of several that a bold line is the mean of.
        dash: None for a solid line.
    """

    x: Sequence[float]
    y: Sequence[float]
    color: int
    thin: bool = False
    dash: tuple[float, ...] | None = None
    opacity: float = 1.0
    steps: bool = False


def line_chart(
    title: str,
    alt: str,
    series: Sequence[Series],
    *,
    xlabel: str = "step",
    logarithmic: bool | None = None,
    marks: Mapping[str, float] | None = None,
    log_x: bool = False,
) -> Chart:
    """Draw lines over a common axis.

    Args:
        title, alt: the chart's.
        series: the lines; values that are not finite leave gaps.
        xlabel: below the axis.
        logarithmic: the vertical axis; None: where values are positive and span a wide range.
        marks: vertical lines by what they are called.
        log_x: the horizontal axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for each in series:
            _draw(axes, each)
        values = [value for each in series for value in each.y if math.isfinite(value)]
        if logarithmic is None:
            logarithmic = bool(values) and min(values) > 0 and max(values) > _LOG_FROM * min(values)
        for which in ["y"] * logarithmic + ["x"] * log_x:
            _make_logarithmic(axes, which)
        for name, place in (marks or {}).items():
            axes.axvline(place, color=_INK, linewidth=1, dashes=(2, 2))
            axes.annotate(
                name, (place, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                va="top",
            )  # fmt: skip
        axes.set_xlabel(xlabel)
        axes.grid(axis="y")
        axes.spines[["top", "right", "left"]].set_visible(False)
        return Chart(title, _svg(figure), alt)


def heat_map(
    title: str,
    alt: str,
    values: NDArray[np.float64],
    columns: Sequence[str],
    ylabel: str,
    *,
    xlabel: str = "step",
) -> Chart:
    """Draw shares ``[rows, columns]`` from 0 to 1 as colors, the first row on top."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, cmap=_SHARES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        most = 6
        shown = sorted({round(at) for at in np.linspace(0, len(columns) - 1, most)})
        axes.set_xticks(shown, [columns[at] for at in shown])
        rows = sorted({round(at) for at in np.linspace(0, len(values) - 1, most)})
        axes.set_yticks(rows, [str(row + 1) for row in rows])
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(
            image, ax=axes, ticks=[0, 0.5, 1], format=lambda share, _: f"{100 * share:.0f} %"
        )
        bar.outline.set_visible(False)
        return Chart(title, _svg(figure), alt)


def _make_logarithmic(axes: Axes, which: str) -> None:
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=7))
    axis.set_major_formatter(lambda value, _: _short(value))
    axis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    """A number, small and large ones as powers of ten."""
    power = round(math.log10(value))
    if -4 < power < 5:
        return f"{value:g}"
    return f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _draw(axes: Axes, series: Series) -> None:
    axes.plot(
        series.x,
        series.y,
        color=f"#0a0b{series.color % COLORS:02x}",
        linewidth=0.8 if series.thin else 2,
        alpha=0.55 if series.thin else series.opacity,
        dashes=series.dash or (None, None),
        drawstyle="steps-mid" if series.steps else "default",
        marker="o" if len(series.x) == 1 else "",
        markersize=5,
        solid_capstyle="round",
    )


def _svg(figure: Figure) -> str:
    """The drawing, scaled by the page, its names behind ``PREFIX``."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"/>', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)(?:inherit|sans-serif)", r"\1var(--sans)", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"(base64,)\s+", r"\1", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{PREFIX}", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()
