"""The content of a recipe's data sets, for the start of a training or evaluation and for the data command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.data import DataError, Layout, SegmentationSet, find_layout
from models.data.contradictions import check, shared_scenes
from models.data.layouts import CAMERA
from models.data.survey import Overview, survey
from models.segmentation.build import build_train_loader, open_split, precedence, with_normalization
from models.segmentation.settings import OF_LAYOUT, DataSettings, SegmentationRecipe
from models.segmentation.visualize import contact_sheet, scene_images
from models.training.config import show
from models.training.errors import UsageError, data_root, writable
from models.visualize import Image, save_image


def overview(settings: DataSettings, datasets: Sequence[SegmentationSet]) -> Overview:
    """Describe the sets of a recipe, and what in them looks wrong.

    Args:
        settings: the recipe's.
        datasets: that of training and that of validation, or the latter alone.

    Raises:
        DataError: a file is broken or not what the layout says; nothing is labeled.
        UsageError: a modality whose kind nobody tells looks like another one in validation.
    """
    layout = datasets[0].layout
    values = ", ".join(f"{name} {_text(layout, name)}" for name in OF_LAYOUT)
    _, notes = precedence(settings, find_layout(data_root(settings.root), settings.layout))
    if settings.normalization != DataSettings().normalization:
        values += "".join(
            f", {name} {show(value)}" for name, value in settings.normalization._asdict().items()
        )
    lines, warnings = [f"{datasets[0].root}: layout {layout.name}, {values}", *notes], []
    for dataset in datasets:
        found = survey(dataset)
        lines += [*found.lines(), *dataset.absences.notes()]
        warnings += check(dataset, found)
    if len(datasets) > 1:
        _check_kinds(*datasets)
    without = datasets[-1].absences.without
    train, val = datasets if len(datasets) > 1 else (_training_set(settings, without), datasets[0])
    if train is not None:
        first = next(name for name in val.reader.files() if name != CAMERA)
        files = ([scene[first] for scene in each.scenes if first in scene] for each in (train, val))
        warnings += shared_scenes(*files)
    return Overview(lines, warnings)


def _training_set(settings: DataSettings, without: tuple[str, ...]) -> SegmentationSet | None:
    """The training scenes, where they lie beside those to evaluate on."""
    try:
        return open_split(settings, "train", without)
    except DataError:
        return None


def _check_kinds(train: SegmentationSet, val: SegmentationSet) -> None:
    """Refuse a modality that files without a told kind show as one in training and another in validation.

    Raises:
        UsageError: there is one.
    """
    for name in train.guessed_kinds:
        kinds = [dataset.layout.modality(name).kind for dataset in (train, val)]
        if kinds[0] != kinds[1]:
            raise UsageError(
                f"data.root: {name} looks like {kinds[0]} in training and {kinds[1]} in validation: give its"
                " kind in layout.json"
            )


def show_data(recipe: SegmentationRecipe, output: Path) -> None:
    """The data command: print what the sets hold; write a contact sheet of augmented training samples.

    Args:
        recipe: whose data it is; ``eval.sheet`` says how many samples.
        output: the sheet, a PNG.

    Raises:
        UsageError, DataError: as ``open_split``; a file is broken; the sheet cannot be written.
    """
    recipe = with_normalization(recipe)
    train, val = (open_split(recipe.data, split) for split in ("train", "val"))
    writable(output, "--output")
    overview(recipe.data, (train, val)).show()
    samples = augmented(recipe, recipe.eval.sheet, train.palette)
    if samples:
        save_image(output, contact_sheet(samples, train.class_names, train.palette))
        print(f"written: {output}, {len(samples)} augmented samples")


def augmented(
    recipe: SegmentationRecipe, count: int, palette: NDArray[np.uint8] | None
) -> dict[str, dict[str, Image]]:
    """Samples as training sees them in its first steps: every ``input <modality>``, and the ``target``."""
    data = recipe.data
    samples: dict[str, dict[str, Image]] = {}
    # Order and augmentation of samples do not depend on the batch; a set smaller than one has a sheet, too.
    single = replace(recipe, data=replace(data, batch_size=1), run=replace(recipe.run, workers=0))
    for batch in build_train_loader(single):
        inputs = batch.images.unflatten(0, (len(data.modalities), -1)).transpose(0, 1)
        for name, images, target in zip(batch.names, inputs, batch.target, strict=True):
            if len(samples) == count:
                return samples
            ((present, _),) = batch.by_presence()
            samples[name] = scene_images(images, {"target": target}, data, palette, present)
    return samples


def _text(layout: Layout, name: str) -> str:
    value = getattr(layout, name)
    return show(tuple(value[:4]) if name == "camera" and value else value)
