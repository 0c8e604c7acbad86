"""Pictures of what is predicted and observed, and of scales in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.analysis.attraction_report import KINDS, SIDES, Attraction
from models.analysis.corollary import Corollary
from models.analysis.dynamics import EDGES, Dynamics

_COLORS = {"below θ": "#c8401f", "above θ": "#2b6cb0"}
_LEAST = 10  # batches of a bin that is drawn
_RUNS = ("#c8401f", "#2b6cb0", "#4a8f4a", "#98a2ac", "#8a5fb0", "#d9a520")


def attraction_figure(results: Sequence[Attraction]) -> Figure:
    """A row for each run: shares of batches by predicted probability, and the shares of each channel."""
    figure = Figure(figsize=(8.4, 3.9 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(rows, results, strict=True):
        _bins(left, result)
        _channels(right, result)
        left.set_title(f"{result.name}, step {result.step}", fontsize=9, loc="left")
    return figure


def _bins(axes: Axes, result: Attraction) -> None:
    axes.plot([0, 1], [0, 1], color="#98a2ac", linewidth=1)
    for side, which in SIDES.items():
        rows = result.chosen(which)
        if not rows.any():
            continue
        bins = [shares for number, shares in result.bins(rows) if number >= _LEAST]
        predicted = [shares.predicted for shares in bins]
        for kind, marker, style in (("observed", "o", "-"), ("shuffled", "x", ":")):
            shares = [getattr(each, kind) for each in bins]
            axes.plot(
                predicted,
                shares,
                style,
                marker=marker,
                markersize=4,
                linewidth=1,
                color=_COLORS[side],
                label=f"{kind}, {side}",
            )
    _finish(
        axes, f"predicted probability, in bins of {_LEAST} batches or more", "share of batches with |d| ≤ λ"
    )
    axes.set_ylim(-0.03, 1.03)


def _channels(axes: Axes, result: Attraction) -> None:
    axes.plot([0, 1], [0, 1], color="#98a2ac", linewidth=1)
    for name, which in KINDS.items():
        shares = [result.shares[row] for row in np.flatnonzero(result.chosen(which))]
        marker = "^" if name.startswith("not") else "o"
        color = next(color for side, color in _COLORS.items() if name.endswith(side))
        places = ([share.predicted for share in shares], [share.observed for share in shares])
        axes.plot(*places, marker, markersize=3, alpha=0.6, color=color, label=name)
    _finish(axes, "predicted probability of a channel", "its observed share")


def dynamics_figure(runs: Sequence[Dynamics]) -> Figure:
    """Shares below the threshold and percentiles by step, survival by records, |γ| / θ at the last record."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    (share, percentile), (survival, histogram) = figure.subplots(2, 2)
    for i, run in enumerate(runs):
        color = _RUNS[i % len(_RUNS)]
        for wanted, style in ((True, "-"), (False, ":")):
            half = run.whole(wanted)
            if half is None:
                continue
            label = f"{run.name}{'' if wanted else ', not penalized'}"
            options = {"color": color, "linestyle": style, "linewidth": 1.2, "label": label}
            share.plot(run.steps, half.share, **options)
            percentile.plot(run.steps, half.percentile, **options)
            places = np.arange(1, len(run.steps) - 1)
            survival.plot(places, [half.survival(int(lag))[1] for lag in places], **options)
            last = half.histogram[-1] / half.histogram[-1].sum()
            histogram.stairs(last, np.arange(len(EDGES)), **options)
    _finish(share, "step", "share of scales with |γ| < θ")
    _finish(percentile, "step", "3rd percentile of γ")
    _finish(survival, "records after it came below θ", "share still below in each")
    histogram.set_xticks(range(len(EDGES)), [f"{edge:g}" for edge in EDGES])
    _finish(histogram, "|γ| / θ at the last record", "share of scales")
    for axes in (share, survival):
        axes.set_ylim(-0.03, 1.03)
    return figure


def corollary_figure(result: Corollary) -> Figure:
    """Losses by step, smoothed, with and without exchange, and the difference of each seed."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    losses, difference = figure.subplots(1, 2)
    for arm, color in (("without", "#98a2ac"), ("with", "#c8401f")):
        for i, values in enumerate(result.losses[arm]):
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.full(width, 1 / width), "valid")
            losses.plot(smooth, color=color, linewidth=1, label=f"{arm} exchange" if i == 0 else None)
    places = range(len(result.seeds))
    difference.bar(places, result.differences, color="#2b6cb0")
    difference.axhline(0, color="black", linewidth=0.8)
    difference.set_xticks(places, [str(seed) for seed in result.seeds])
    _finish(losses, "step", "training loss without penalty")
    _finish(difference, "seed", "final loss with less without exchange")
    return figure


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6.5, frameon=False)
