"""Plot of the operator's benchmark: each provider's share of copy speed, shape by shape."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.harness.report import MODES, Row, label
from bench.harness.shapes import GROUPS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Ours stand out in red; the baselines go from the strongest to the weakest in blues and fading grays; what
# does less than the operator is of another color.
COLORS = {
    "cen_ext": "#c8401f",
    "cuda": "#e07b5f",
    "triton": "#efb09c",
    "compile_max": "#1c4a7d",
    "compile": "#2b6cb0",
    "compile_reference": "#7fb0de",
    "where": "#5f6b76",
    "straightforward": "#98a2ac",
    "reference": "#ccd2d8",
    "norm": "#d9c27a",
}
TITLES = {
    "resnet": "ResNet, exchanging",
    "wide": "ResNet, residual and relu",
    "unet": "U-Net, instance norm",
    "transformer": "Transformer, layer norm",
}


def plot(rows: Sequence[Row]) -> dict[str, bytes]:
    """One PNG per layout; none, with a message, without matplotlib.

    Of the first type and number of modalities, and of the last mode: on a GPU, the kernels alone.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib", file=sys.stderr)
        return {}
    mode = [mode for mode in MODES if any(r.mode == mode for r in rows)][-1]
    kind = (rows[0].dtype, rows[0].modalities, mode)
    shown = [r for r in rows if (r.dtype, r.modalities, r.mode) == kind]
    layouts = dict.fromkeys(r.layout for r in shown)
    return {layout: _draw([r for r in shown if r.layout == layout]) for layout in layouts}


def _draw(rows: Sequence[Row]) -> bytes:
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((r.group, r.statistics) for r in rows))
    figure = Figure(figsize=(13, 0.9 + 2.1 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 2, sharey="row", squeeze=False)
    for (group, statistics), pair in zip(kinds, axes, strict=True):
        for phase, ax in zip(("forward", "backward"), pair, strict=True):
            members = [r for r in rows if (r.group, r.statistics, r.phase) == (group, statistics, phase)]
            _bars(ax, members)
            kind = f", {statistics} statistics" if len(GROUPS[group].statistics) > 1 else ""
            ax.set_title(f"{TITLES[group]}{kind}: {phase}", fontsize=10, loc="left")
        pair[0].set_ylabel("share of copy speed", fontsize=9)
    legend: dict[str, Artist] = {}
    for ax in axes.flat:
        handles, names = ax.get_legend_handles_labels()
        legend.update(zip(names, handles, strict=True))
    figure.legend(
        legend.values(), legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9
    )
    first = rows[0]
    parts = [first.layout, first.dtype, f"{first.modalities} modalities"]
    if first.mode != "eager":
        parts.append(MODES[first.mode])
    figure.suptitle(", ".join(parts), fontsize=10, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _bars(ax: Axes, rows: Sequence[Row]) -> None:
    sizes = list(dict.fromkeys(r.size for r in rows))
    names = [name for name in COLORS if any(r.provider == name for r in rows)]
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        shares = {r.size: r.share_of_copy for r in rows if r.provider == name}
        places = [at + (i - (len(names) - 1) / 2) * width for at in range(len(sizes))]
        heights = [shares.get(size, math.nan) for size in sizes]
        ax.bar(places, heights, 0.92 * width, color=COLORS[name], label=label(name))
    ax.axhline(1, color="black", linewidth=0.8, label="copy")
    labels = [size.replace("x", "×") for size in sizes]
    ax.set_xticks(range(len(sizes)), labels, fontsize=8, rotation=20 if len(sizes) > 6 else 0)
    ax.tick_params(axis="y", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
