"""README's figure, from committed results alone: ``python -m bench.summary``.

Speed of a training step, and mean IoU of the fusions' table. Writes docs/images/summary.png.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.fusion.budgets import BUDGETS
from bench.fusion.plans import SCORE
from bench.harness.files import RESULTS, write

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "summary.png"
OURS, OTHERS = "#c8401f", "#8794a1"
# Rows of a training's benchmark, by the names that the figure gives them.
TRAINING = {
    "straightforward, contiguous": "PyTorch",
    "straightforward, compile": "torch.compile",
    "ours": "cen_ext",
    "straightforward, bf16": "PyTorch, bf16",
    "straightforward, bf16, compile": "torch.compile, bf16",
    "ours, bf16": "cen_ext, bf16",
}
# Methods of the fusions' table, in words that need no table.
METHODS = {
    "rgb": "RGB alone",
    "depth": "depth alone",
    "none": "both, no fusion but the ensemble",
    "concat_all_shared": "concat after every stage",
    "align_middle_shared": "align after stage 3",
    "self_attention_middle_shared": "self-attention after stage 3",
    "asymfusion": "AsymFusion",
    "cen_code": "CEN, the code's λ",
    "cen_paper": "CEN, the paper's λ",
    "ssma": "SSMA, from two AdapNet++",
    "fusenet": "FuseNet, from random weights",
}


def training_speeds(results: Path) -> dict[str, float]:
    """Images per second of RefineNet-50's training steps, by ``TRAINING``'s names."""
    kept = json.loads((results / "training_refinenet_resnet50.json").read_text())
    batch = kept["settings"]["batch"]
    return {title: batch / median(kept["results"][name]["steps"]) for name, title in TRAINING.items()}


def scores(results: Path) -> dict[str, list[float]]:
    """Mean IoU of the ensemble in per cent, one value a seed, by title of the method; the best last."""
    found: dict[str, list[float]] = {}
    for method, title in METHODS.items():
        for file in sorted((results / "fusion" / "cpu" / "table").glob(f"{method}_seed?.json")):
            score = 100 * json.loads(file.read_text())["metrics"][SCORE]
            found.setdefault(title, []).append(score)
    return dict(sorted(found.items(), key=lambda item: mean(item[1])))


def draw(speeds: dict[str, float], found: dict[str, list[float]]) -> bytes:
    """Both as bars, a point for each seed, as a PNG file's content."""
    figure = Figure(figsize=(11, 0.9 + 0.27 * max(len(speeds), len(found))), layout="constrained")
    left, right = figure.subplots(1, 2)
    speeds = dict(reversed(speeds.items()))
    _bars(left, list(speeds), list(speeds.values()), [name.startswith("cen_ext") for name in speeds])
    _numbers(left, list(speeds.values()), "{:.2f}")
    left.set_title("RefineNet-50, RGB-D, two CPU cores: images/s in training", loc="left", fontsize=10)
    means = [mean(values) for values in found.values()]
    _bars(right, list(found), means, [name.startswith("CEN") for name in found])
    for at, values in enumerate(found.values()):
        right.plot(values, [at] * len(values), ".", color="black", markersize=4)
    _numbers(right, [max(values) for values in found.values()], "{:.1f}", means)
    right.set_title(f"NYUDv2, {BUDGETS['cpu'].steps} steps each: mean IoU, %", loc="left", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], ours: Sequence[bool]) -> None:
    axes.barh(range(len(names)), values, 0.75, color=[OURS if mine else OTHERS for mine in ours])
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.02)


def _numbers(axes: Axes, places: Sequence[float], form: str, values: Sequence[float] = ()) -> None:
    """Write values, the places themselves if there are no others, beside the ends of bars."""
    for at, (place, value) in enumerate(zip(places, values or places, strict=True)):
        text = form.format(value)
        axes.annotate(text, (place, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)


if __name__ == "__main__":
    write(FIGURE, draw(training_speeds(RESULTS), scores(RESULTS)))
    print(FIGURE)
