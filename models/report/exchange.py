"""What is exchanged where, when and with whom: shares, scales γ, and the ensemble's weights α."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from models.comparison.groups import Group
from models.comparison.runs import outputs
from models.report.blocks import NOTHING, Block, Cell, Chart, Charts, Section, Table
from models.report.charts import Series, heat_map, line_chart
from models.report.curves import colors, group_lines
from models.report.gathered import Gathered, over_seeds
from models.report.layers import Layer
from models.report.subject import Subject

_BINS = 48
_DASHES = (None, (4.0, 2.0))  # lines of the same values are both to be seen
_TIMES = 5  # histograms over time in one chart
_SMALLEST = 1e-5  # |γ| in histograms; all below is counted there


def exchange(gathered: Gathered) -> Section:
    """Shares over time and by layer, histograms of γ, who lends to whom, and α."""
    blocks: list[Block] = []
    if share := _share_chart(gathered):
        blocks.append(share)
    blocks += _alpha(gathered)
    for group in gathered.groups:
        subject = gathered.first(group)
        if not subject.layers:
            continue
        blocks.append(_scales(group, subject))
        if any(layer.replaced.any() for layer in subject.layers):
            blocks.append(_by_layer(group, subject))
    lead = (
        "Which share of the channels is replaced by other branches' channels, and how the scales γ that "
        "decide it are spread."
    )
    if not any(layer.replaced.any() for each in gathered.subjects.values() for layer in each.layers):
        lead += " In these checkpoints no channel is exchanged."
    return Section("exchange", "Exchange", lead, blocks)


def _share_chart(gathered: Gathered) -> Charts | None:
    lines = group_lines(gathered, lambda subject: subject.losses, "exchanged", 100)
    if not lines or not any(value for line in lines for value in line.y):
        return None
    names = {number: name for name, number in colors(gathered).items()}
    ends = "; ".join(f"{names[line.color]} {line.y[-1]:.1f} % at the end" for line in lines if not line.thin)
    chart = line_chart(
        "exchanged channels, per cent",
        f"Share of exchanged channels over steps: {ends}.",
        lines,
        logarithmic=False,
    )
    return Charts(
        "Share of the channels that are replaced, over all modalities and all layers that exchange.",
        [chart],
        colors(gathered),
    )


def _alpha(gathered: Gathered) -> list[Block]:
    shown = [group for group in gathered.groups if gathered.first(group).alpha]
    if not shown:
        return []
    names = dict.fromkeys(name for group in shown for name in outputs(group.runs[0])[:-1])
    rows = []
    for group in shown:
        weights = [over_seeds(gathered.of(group), _weight_of(name)) for name in names]
        rows.append([group.name, *(gathered.text(weight, 3) for weight in weights)])
    return [Table("α: the weight of each branch in the ensemble.", ["", *names], rows)]


def _weight_of(branch: str) -> Callable[[Subject], float | None]:
    return lambda subject: subject.alpha.get(branch)


def _scales(group: Group, subject: Subject) -> Charts:
    """Histograms of |γ| and shares by layer, of the checkpoint and, where there are records, over time."""
    layers, names = subject.layers, subject.modalities
    scales = {
        name: torch.cat([layer.scales[m].abs() for layer in layers if m < len(layer.scales)])
        for m, name in enumerate(names)
        if any(m < len(layer.scales) for layer in layers)
    }
    if len(scales) < len(names):  # norms that all modalities share
        scales = {"all modalities": next(iter(scales.values()))}
    medians = "; ".join(f"{name} {values.median():.3g}" for name, values in scales.items())
    thresholds = {layer.threshold for layer in layers if layer.threshold is not None}
    below = f" {_below(subject)}" if thresholds else ""
    charts = [_histogram(scales, thresholds, f"Medians: {medians}.{below}")]
    if any(layer.replaced.any() for layer in layers):
        charts.append(_shares(subject))
    times = len(subject.history)
    if times > 1:
        charts += _over_time(subject)
    text = f"{group.name}: scales of all {len(layers)} layers that exchange or might, of {subject.scales_of}"
    text += f", and over time, of {times} records of γ" * (times > 1)
    return Charts(
        f"{text}. Medians of |γ|: {medians}.{below}", charts, {name: m for m, name in enumerate(scales)}
    )


def _histogram(scales: Mapping[str, torch.Tensor], thresholds: Collection[float], summary: str) -> Chart:
    edges = _edges(list(scales.values()))
    lines = [
        Series(_middles(edges), _counts([values], edges), m, steps=True)
        for m, values in enumerate(scales.values())
    ]
    return line_chart(
        "number of channels by |γ|",
        f"Histogram of |γ|. {summary}",
        lines,
        xlabel="|γ|",
        logarithmic=False,
        marks={"θ": max(thresholds)} if len(thresholds) == 1 else {},
        log_x=True,
    )


def _shares(subject: Subject) -> Chart:
    """Shares that are replaced, by layer."""
    numbers = list(range(1, len(subject.layers) + 1))
    lines = [
        Series(numbers, [100 * _share(layer, m) for layer in subject.layers], m, dash=_DASHES[m % 2])
        for m in range(len(subject.modalities))
    ]
    shares = [100 * float(layer.replaced.mean()) for layer in subject.layers]
    return line_chart(
        "exchanged channels by layer, per cent",
        f"Share of replaced channels by layer: from {min(shares):.1f} to {max(shares):.1f} %.",
        lines,
        xlabel="layer, from the input on",
        logarithmic=False,
    )


def _below(subject: Subject) -> str:
    shares = [
        (layer.scales.abs() < layer.threshold).float().flatten()
        for layer in subject.layers
        if layer.threshold is not None
    ]
    share = torch.cat(shares).mean().item()
    return f"{100 * share:.1f} % of all |γ| are below their layer's θ."


def _over_time(subject: Subject) -> list[Chart]:
    """Shares by layer, and histograms, at the records."""
    modalities = subject.modalities
    steps = [step for step, _ in subject.history]
    charts: list[Chart] = []
    if any(layer.replaced.any() for _, layers in subject.history for layer in layers):
        for m, name in enumerate(modalities):
            shares = np.array([[_share(layer, m) for layer in layers] for _, layers in subject.history]).T
            low, high = 100 * np.nanmin(shares[:, -1]), 100 * np.nanmax(shares[:, -1])
            alt = f"Share of {name}'s channels that are replaced, by layer and step; at the end from "
            charts.append(
                heat_map(
                    f"{name}: exchanged channels by layer",
                    f"{alt}{low:.0f} to {high:.0f} %.",
                    shares,
                    [str(step) for step in steps],
                    "layer",
                )
            )
    chosen = sorted({round(at) for at in np.linspace(0, len(steps) - 1, _TIMES)})
    edges = _edges([layer.scales.abs() for at in chosen for layer in subject.history[at][1]])
    for m, name in enumerate(modalities):
        lines = []
        for place, at in enumerate(chosen):
            rows = [layer.scales[m].abs() for layer in subject.history[at][1] if m < len(layer.scales)]
            opacity = 0.25 + 0.75 * place / max(len(chosen) - 1, 1)
            lines.append(Series(_middles(edges), _counts(rows, edges), m, opacity=opacity, steps=True))
        if any(sum(line.y) for line in lines):
            at = ", ".join(str(steps[each]) for each in chosen)
            charts.append(
                line_chart(
                    f"{name}: number of channels by |γ|",
                    f"Histograms of {name}'s |γ| at steps {at}.",
                    lines,
                    xlabel=f"|γ| at steps {at}, pale to bold",
                    logarithmic=False,
                    log_x=True,
                )
            )
    return charts


def _share(layer: Layer, modality: int) -> float:
    return float(layer.replaced[modality]) if modality < len(layer.replaced) else math.nan


def _by_layer(group: Group, subject: Subject) -> Table:
    """Who takes which share of whose channels in each layer."""
    names = subject.modalities
    pairs = [
        (taker, lender) for taker in range(len(names)) for lender in range(len(names)) if taker != lender
    ]
    lends = any(layer.lent.any() for layer in subject.layers)
    head = ["layer", "channels"]
    if lends:
        head += [f"{names[lender]} lends to {names[taker]}" for taker, lender in pairs]
    else:
        head += [f"{name} gives up" for name in names]
    head += [f"median |γ|, {name}" for name in names] + ["θ"]
    rows: list[list[Cell | str]] = []
    for number, layer in enumerate(subject.layers, 1):
        if len(layer.replaced) != len(names):
            continue
        shares = (
            [float(layer.lent[pair]) for pair in pairs]
            if lends
            else [float(share) for share in layer.replaced]
        )
        rows.append(
            [
                f"{number} {layer.name}",
                str(layer.scales.shape[1]),
                *(Cell(f"{100 * share:.1f} %", bar=share) for share in shares),
                *(f"{value:.3g}" for value in layer.scales.abs().median(1).values.tolist()),
                NOTHING if layer.threshold is None else f"{layer.threshold:.3g}",
            ]
        )
    shared = " Where a channel becomes the mean of several others, each of them lends an equal part."
    return Table(
        f"{group.name}: the share of a modality's channels that it takes from another one, by layer, of "
        f"{subject.scales_of}.{shared if len(names) > 2 else ''}",
        head,
        rows,
        folded=len(rows) > 12,
    )


def _edges(tables: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """Edges of bins from the smallest to the largest |γ|, evenly in their logarithms."""
    values = torch.cat([table.flatten() for table in tables]).double()
    low = max(float(values.min()), _SMALLEST)
    high = max(float(values.max()), 2 * low)
    return np.geomspace(low * 0.999, high * 1.001, _BINS + 1)


def _middles(edges: NDArray[np.float64]) -> list[float]:
    middles: list[float] = np.sqrt(edges[:-1] * edges[1:]).tolist()
    return middles


def _counts(rows: Sequence[torch.Tensor], edges: NDArray[np.float64]) -> list[float]:
    if not rows:
        return [0.0] * (len(edges) - 1)
    values = torch.cat(list(rows)).double().clamp(min=edges[0]).numpy()
    counts: list[float] = np.histogram(values, edges)[0].astype(float).tolist()
    return counts
