"""CEN's Figure 3 as a picture: feature maps of sets of channels, and what their correlations are.

Every row of maps has one color map from the 1st to the 99th percentile of its values, over all sets: if each
map had its own, it would be hidden that the map of channels with scales near 0 is flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.analysis.channel_sets import Layer
from models.analysis.correlations import Correlation
from models.analysis.feature_maps import FeatureMaps
from models.visualize import Image

DPI = 110

# Quantity and set of each column after the input; nothing of S11 is ever replaced.
_COLUMNS = (
    *(("normalized", name) for name in ("S01", "S10", "S11")),
    *(("z", name) for name in ("S01", "S10", "S11")),
    *(("exchanged", name) for name in ("S01", "S10")),
)
_TITLES = {
    "normalized": r"normalized, $\hat{x}$",
    "z": r"before the exchange, $z=\gamma\hat{x}+\beta$",
    "exchanged": "after the exchange",
}
_COLORS_OF = {"normalized": "normalized", "z": "z", "exchanged": "z"}  # of one unit, so of one scale
_QUANTITIES = {
    "normalized": r"$\hat{x}$",
    "magnitude": r"$|\hat{x}|$",
    "z": "$z$",
    "rectified": "relu($z$)",
}

# In inches.
_MAP = 1.5
_GAP = 0.18
_LEFT, _RIGHT = 0.65, 0.1
_TITLE, _HEAD, _SPACE = 0.3, 0.66, 0.14  # above all, above a pair's maps, between scenes
_ROW, _AROUND = 0.24, 0.95  # of correlations, and what stands around them
_LABEL, _LETTER = 0.75, 0.06  # beside them, of the quantities and of each letter of the sets

_MODALITIES = ("#c8401f", "#2b6cb0")
_RANDOM = "#98a2ac"


class Scene(NamedTuple):
    """A scene to draw.

    Attributes:
        name: its.
        inputs: an image for each modality.
        maps: for N = 1, means over the layer's K sets to draw in place of channels.
    """

    name: str
    inputs: Sequence[Image]
    maps: FeatureMaps


def draw(
    layer: Layer, modalities: Sequence[str], scenes: Sequence[Scene], correlations: Sequence[Correlation]
) -> Figure:
    """The figure: for each pair of modalities and each scene a row for each of the two, correlations below.

    Args:
        layer: whose maps they are.
        modalities: their names.
        scenes: one or more.
        correlations: of all sets; drawn are those of the sets that the modality alone uses.
    """
    rows, columns, _ = scenes[0].inputs[0].shape
    cell = _MAP * min(1.5, rows / columns)
    alone = [each for each in correlations if each.alone and each.size > 0]
    alone.sort(key=lambda each: _place(each, modalities))
    below = _AROUND + _ROW * len(dict.fromkeys(map(_label, alone))) if alone else 0.0
    scene_height = 2 * cell + _SPACE
    height = _TITLE + len(layer.others) * (_HEAD + len(scenes) * scene_height) + below
    widths = _widths()
    width = _LEFT + sum(widths) + _RIGHT
    figure = Figure(figsize=(width, height))
    stage = f", stage {layer.stage}" if layer.stage else ""
    title = f"{layer.name}{stage}, θ = {layer.threshold:.3g}; each map is the mean over a set of channels"
    figure.text(_LEFT / width, 1 - 0.1 / height, title, fontsize=9, va="top")
    sides = {"left": _LEFT / width, "right": 1 - _RIGHT / width}
    top = _TITLE
    for other in layer.others:
        top += _HEAD
        for scene in scenes:
            ends = {"top": 1 - top / height, "bottom": 1 - (top + 2 * cell) / height}
            grid = GridSpec(
                2, len(widths), figure, **sides, **ends, width_ratios=widths, wspace=0.03, hspace=0.03
            )
            axes = [
                [figure.add_subplot(grid[row, i]) for i, each in enumerate(widths) if each == _MAP]
                for row in range(2)
            ]
            _draw_scene(axes, layer, modalities, other, scene)
            if scene is scenes[0]:
                _write_heads(axes[0][1:], layer.sizes(other), (modalities[0], modalities[other]))
            top += scene_height
    if alone:
        ends = {"top": (below - 0.35) / height, "bottom": 0.4 / height}
        beside = _LABEL + _LETTER * max(len(each.of) for each in alone)
        grid = GridSpec(1, 2, figure, left=beside / width, right=sides["right"], **ends, wspace=0.05)
        _draw_correlations(figure, grid, alone, modalities)
    return figure


def _widths() -> list[float]:
    """Of the columns: maps, and gaps before another quantity."""
    widths, before = [_MAP], ""
    for quantity, _ in _COLUMNS:
        widths += [_MAP] if quantity == before else [_GAP, _MAP]
        before = quantity
    return widths


def _draw_scene(
    axes: Sequence[Sequence[Axes]], layer: Layer, modalities: Sequence[str], other: int, scene: Scene
) -> None:
    """Draw the rows of the first modality and another one."""
    for row, m in zip(axes, (0, other), strict=True):
        image = scene.inputs[m]
        maps = [
            _enlarged(getattr(scene.maps, quantity)[m, 0, layer.drawn.index((other, name))], image)
            for quantity, name in _COLUMNS
        ]
        scales = {
            shared: _scale(
                [
                    values
                    for (each, _), values in zip(_COLUMNS, maps, strict=True)
                    if _COLORS_OF[each] == shared
                ]
            )
            for shared in _COLORS_OF.values()
        }
        for cell in row:
            cell.set_xticks([])
            cell.set_yticks([])
        row[0].imshow(image)
        row[0].set_ylabel(modalities[m], fontsize=9, labelpad=3)
        told: set[str] = set()
        for cell, (quantity, _), values in zip(row[1:], _COLUMNS, maps, strict=True):
            if values is None:
                cell.text(0.5, 0.5, "no channels", fontsize=7, ha="center", transform=cell.transAxes)
                continue
            scale = scales[_COLORS_OF[quantity]]
            cell.imshow(values, cmap="viridis", norm=scale)
            if quantity not in told:
                _write_range(cell, scale)
            told.add(quantity)
    _write_beside(axes[1][0], scene.name)


def _enlarged(mean: Tensor, image: Image) -> NDArray[np.float64] | None:
    """A mean ``[h, w]`` of the image's size; None where it is that of no channels, NaN."""
    if mean.isnan().all():
        return None
    enlarged = F.interpolate(mean[None, None], image.shape[:2], mode="bilinear", align_corners=False)
    return np.asarray(enlarged[0, 0].cpu().numpy())


def _scale(maps: Sequence[NDArray[np.float64] | None]) -> Normalize:
    """Colors from the 1st to the 99th percentile."""
    there = [each.ravel() for each in maps if each is not None]
    low, high = np.percentile(np.concatenate(there), (1, 99)) if there else (0.0, 1.0)
    return Normalize(low, high)


def _write_heads(axes: Sequence[Axes], sizes: dict[str, int], names: tuple[str, str]) -> None:
    """Write above the first maps what they are of."""
    used = {"S01": f"{names[1]} alone", "S10": f"{names[0]} alone", "S11": "both"}
    before = ""
    for cell, (quantity, name) in zip(axes, _COLUMNS, strict=True):
        cell.set_title(f"{name}: used by {used[name]}\n{sizes[name]} channels", fontsize=7.5, pad=3)
        if quantity != before:
            _write(cell, _TITLES[quantity], (0, 1), (0, 27), fontsize=9, fontweight="bold")
        before = quantity


def _write_range(cell: Axes, scale: Normalize) -> None:
    """Write into a map's corner the values of the darkest and the brightest color."""
    box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.2}
    _write(cell, f"{scale.vmin:.2g} to {scale.vmax:.2g}", (0, 0), (3, 4), fontsize=6, bbox=box)


def _write_beside(cell: Axes, scene: str) -> None:
    """Write a scene's name to the left of the middle of its two rows."""
    _write(cell, scene, (0, 1), (-28, 0), fontsize=7, rotation=90, ha="center", va="center")


def _write(
    cell: Axes, text: str, at: tuple[float, float], points: tuple[float, float], **options: Any
) -> None:
    """Write some points away from a place ``at`` of a map, whose corners are 0 and 1."""
    cell.annotate(text, at, points, "axes fraction", "offset points", annotation_clip=False, **options)


def _place(each: Correlation, modalities: Sequence[str]) -> tuple[int, int, int]:
    """Where it stands among the rows: those of a modality together."""
    return (
        modalities.index(each.modality),
        max(map(modalities.index, each.pair)),
        list(_QUANTITIES).index(each.quantity),
    )


def _label(each: Correlation) -> str:
    return f"{each.of}, {_QUANTITIES[each.quantity]}"


def _draw_correlations(
    figure: Figure, grid: GridSpec, correlations: Sequence[Correlation], modalities: Sequence[str]
) -> None:
    """Draw a panel for each target: the sets' correlations among those of random sets."""
    rows = list(dict.fromkeys(map(_label, correlations)))
    values = [value for each in correlations for value in (*each.random, each.value or 0.0)]
    limit = 1.08 * max(0.1, *map(abs, values))
    for i, target in enumerate(dict.fromkeys(each.target for each in correlations)):
        axes = figure.add_subplot(grid[0, i])
        for each in (each for each in correlations if each.target == target):
            at = rows.index(_label(each))
            axes.plot(each.random, [at] * len(each.random), "|", color=_RANDOM, markersize=9)
            if each.value is not None:
                color = _MODALITIES[min(modalities.index(each.modality), 1)]
                axes.plot([each.value], [at], "D", color=color, markersize=5)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlim(-limit, limit)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows if i == 0 else [""] * len(rows), fontsize=7.5)
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="x", linewidth=0.3)
        axes.set_title(f"correlation with {target}: the set (diamond) among random ones", fontsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
