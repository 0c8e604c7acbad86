"""What corrupted inputs cost a trained network: the evaluate command with ``--corrupt``, and its parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from models.data import DataError, SegmentationSet
from models.data.corruption import KINDS, CorruptedSet, Corruption, parse
from models.data.layouts import LABELS
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.evaluate import chosen_images, evaluate, open_checkpoint, report
from models.segmentation.settings import SegmentationRecipe
from models.training.errors import UsageError, writable
from models.training.files import replacing, write_json
from models.visualize import output_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCORE = "mean_iou"  # of the table and the figure
_COLUMNS = 4  # a standard list has as many panels
_LEVELS = {"noise": "σ", "holes": "share of the pixels", "shift": "pixels to the right and down"}


class Measured(NamedTuple):
    """The metrics ``<output>/<score>`` of a network whose inputs are corrupted; with None they are not."""

    corruption: Corruption | None
    metrics: dict[str, float]


def evaluate_corrupted(
    path: Path, corruptions: Sequence[str], overrides: Sequence[str], output: Path | None
) -> list[Measured]:
    """The evaluate command with ``--corrupt``: the command without it, then the cost of each corruption.

    Written are what ``evaluate_checkpoint`` writes; ``corrupted_<checkpoint>.json``, the metrics of all
    outputs without and with each corruption; and ``.png``, their mean IoU against the level.

    Args:
        path: run folder or checkpoint.
        corruptions: as ``models.data.corruption.parse`` takes them.
        overrides: ``field=value`` assignments.
        output: folder to write to; None: that of the checkpoint.

    Returns:
        The inputs as they are, then each corruption.

    Raises:
        UsageError, DataError: as ``evaluate_checkpoint`` and ``plan``, before anything is measured.
    """
    trained, dataset = open_checkpoint(path, overrides)
    recipe = trained.recipe
    planned = plan(dataset, recipe, corruptions)
    file = writable((output or trained.path.parent) / f"corrupted_{trained.path.stem}.json", "--output")
    clean = Measured(None, report(trained, dataset, output))
    rows = [clean, *measure(trained.net, dataset, recipe, planned)]
    write_json(
        file,
        {
            "checkpoint": str(trained.path),
            "images": len(chosen_images(dataset, recipe)),
            "drop_modality": recipe.data.drop_modality,
            "rows": [{"corruption": _name(row), "metrics": row.metrics} for row in rows],
        },
    )
    with replacing(file.with_suffix(".png")) as temporary:
        figure(rows).savefig(temporary, dpi=120)
    print(f"\nmean IoU in per cent with corrupted inputs, and its difference\n{table(rows)}\n")
    noisy = {each.modality for each in planned if each.kind == "noise"}
    for spec in trained.inputs:
        if spec.name in noisy:
            print(f"σ of noise on {spec.name}: its unit is {spec.unit}")
    print(f"trained with data.drop_modality={recipe.data.drop_modality:g}")
    asked = {each.kind for text in corruptions for each in parse(text, dataset.reader)}
    if "missing" in asked and (reason := _why_not_missing(recipe)):
        print(f"note: standard lists are without missing: {reason}")
    print(f"written: {file.with_suffix('')}.json, .png")
    return rows


def plan(dataset: SegmentationSet, recipe: SegmentationRecipe, arguments: Sequence[str]) -> list[Corruption]:
    """The corruptions that arguments of ``--corrupt`` name, each once, if all of them can be measured.

    Where no modality can be missing, standard lists go without.

    Raises:
        UsageError: an argument is wrong (``models.data.corruption.parse``); no image has the modality; it is
            to be missing, but is the only one, or the fusion needs all.
        DataError: a modality is to be missing, but an image has no other; a shift is as large as the first
            image.
    """
    reason = _why_not_missing(recipe)
    kinds = [kind for kind in KINDS if not (reason and kind == "missing")]
    try:
        found = [corruption for text in arguments for corruption in parse(text, dataset.reader, kinds)]
        chosen = chosen_images(dataset, recipe)
        first = dataset.sample(chosen[0])
        for corruption in dict.fromkeys(found):
            if reason and corruption.kind == "missing":
                name = corruption.modality
                raise UsageError(f"--corrupt {corruption}: {reason}; {name}=blank gives it an empty image")
            _check_presence(dataset, chosen, corruption)
            CorruptedSet(dataset, corruption).corrupted(first)
    except (DataError, UsageError):
        raise
    except ValueError as error:
        raise UsageError(f"--corrupt {error}") from None
    return list(dict.fromkeys(found))


def measure(
    net: SegmentationNetwork,
    dataset: SegmentationSet,
    recipe: SegmentationRecipe,
    corruptions: Sequence[Corruption],
) -> list[Measured]:
    """Measure each corruption alone, on the images that ``evaluate`` takes.

    Args:
        net: in any mode, which is restored.
        dataset: the images, not corrupted.
        recipe: how to evaluate, and the outputs' names.
        corruptions: as ``plan`` returns them. There are no metrics of the branch of a missing modality.
    """
    rows = []
    for corruption in tqdm(corruptions, desc="corruptions", leave=False, disable=None):
        here = recipe
        if corruption.kind == "missing":
            without = (*recipe.eval.without, corruption.modality)
            here = replace(recipe, eval=replace(recipe.eval, without=without))
        counts = evaluate(net, CorruptedSet(dataset, corruption), here)
        assert counts is not None  # nothing stops it
        rows.append(Measured(corruption, counts.compute()))
    return rows


def table(rows: Sequence[Measured]) -> str:
    """The mean IoU of every output as aligned text, in per cent, with its difference to the first row's."""
    names, clean = _outputs(rows), rows[0].metrics
    lines = [["", *names]]
    for row in rows:
        cells = [_name(row) or "clean"]
        for key in (f"{name}/{_SCORE}" for name in names):
            value = row.metrics.get(key)
            difference = "" if value is None or row is rows[0] else f" {100 * (value - clean[key]):+6.2f}"
            cells.append("-".rjust(5) + 7 * " " if value is None else f"{100 * value:5.2f}{difference:7}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def figure(rows: Sequence[Measured]) -> Figure:
    """The mean IoU of every output against the level, a panel for each modality and kind of corruption;
    kinds without a level share one."""
    from matplotlib.figure import Figure  # here, as importing it takes longer than all other commands need

    panels: dict[tuple[str, str], list[Measured]] = {}
    for row in rows[1:]:
        assert row.corruption is not None
        kind = row.corruption.kind if row.corruption.level is not None else ""
        panels.setdefault((row.corruption.modality, kind), [rows[0]]).append(row)
    columns = min(len(panels), _COLUMNS)
    lines = -(-len(panels) // columns)
    drawn = Figure(figsize=(2.9 * columns + 0.4, 2.6 * lines + 0.6), layout="constrained")
    grid = list(drawn.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, ((modality, kind), measured) in zip(grid, panels.items(), strict=False):
        _panel(axes, measured, kind)
        axes.set_title(f"{modality}: {kind}".removesuffix(": "), fontsize=9)
    for axes in grid[::columns]:
        axes.set_ylabel("mean IoU, per cent", fontsize=8)
    handles, names = grid[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    return drawn


def _panel(axes: Axes, rows: Sequence[Measured], kind: str) -> None:
    """Lines over levels, of which 0 is the inputs as they are; without levels, dots."""
    levels = [row.corruption.level or 0 if row.corruption else 0 for row in rows]
    order = sorted(range(len(rows)), key=levels.__getitem__) if kind else range(len(rows))
    places = [levels[i] for i in order] if kind else list(order)
    for number, name in enumerate(_outputs(rows)):
        values = [100 * rows[i].metrics.get(f"{name}/{_SCORE}", math.nan) for i in order]
        axes.plot(places, values, ".-" if kind else "o", color=output_color(name, number), label=name)
    if kind:
        axes.set_xlabel(_LEVELS[kind], fontsize=8)
        axes.set_xticks(places, [f"{level:g}" for level in places])
    else:
        axes.set_xticks(places, [row.corruption.kind if row.corruption else "clean" for row in rows])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _outputs(rows: Sequence[Measured]) -> list[str]:
    """The branches, and the ensemble."""
    names = dict.fromkeys(key.partition("/")[0] for key in rows[0].metrics)
    return [name for name in names if name != "constant"]


def _name(row: Measured) -> str:
    return "" if row.corruption is None else str(row.corruption)


def _why_not_missing(recipe: SegmentationRecipe) -> str:
    """Why no modality can be missing, in words; empty where one can."""
    if len(recipe.data.modalities) - len(recipe.eval.without) < 2:
        return "it is the only one"
    try:
        recipe.check_subset()
    except ValueError as error:
        return str(error)
    return ""


def _check_presence(dataset: SegmentationSet, chosen: Sequence[int], corruption: Corruption) -> None:
    """Refuse a corruption of what no image has, or that leaves an image nothing.

    Raises:
        UsageError, DataError: as ``plan``.
    """
    name = corruption.modality
    number = dataset.modalities.index(name)
    absent = {index: {*dataset.reader.absent(dataset.scenes[index])} for index in chosen}
    if all(number in those for those in absent.values()):
        raise UsageError(f"--corrupt {corruption}: none of the images has a file of {name}")
    for index, those in absent.items():
        if corruption.kind == "missing" and len(those | {number}) == len(dataset.modalities):
            raise DataError(
                f"{dataset.scenes[index][LABELS]}: the scene has no other modality than {name}, which"
                f" {corruption} leaves out; data.missing=skip leaves out such scenes"
            )
