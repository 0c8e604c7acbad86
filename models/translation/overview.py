"""The content of a recipe's views, for the start of a training or evaluation and for the data command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from models.data import TranslationSet
from models.data.contradictions import shared_scenes
from models.data.images import read_stored
from models.data.layouts import SPLITS
from models.data.survey import SCENES, Overview, Survey, spread
from models.data.taskonomy import MISSING_DEPTH
from models.data.views import File
from models.training.errors import writable
from models.translation.build import build_train_loader, open_split
from models.translation.settings import TranslationRecipe
from models.translation.visualize import show
from models.visualize import Image, contact_sheet, save_image


def overview(datasets: Mapping[str, TranslationSet]) -> Overview:
    """Describe the sets of a recipe, and what in them looks wrong.

    Args:
        datasets: by split, of the recipe's.

    Raises:
        DataError: a file is broken, or not what its domain stores.
    """
    lines: list[str] = []
    warnings: list[str] = []
    for split, dataset in datasets.items():
        if len(dataset) == 0:
            continue
        dataset[0]  # views whose domains differ in size
        chosen = spread(len(dataset), SCENES)
        found = Survey(split, str(dataset.root), len(dataset), looked=len(chosen))
        for index in chosen:
            for domain, path in zip(dataset.domains, dataset.files(index), strict=True):
                stored = read_stored(path)
                image = domain.read(path)
                if domain.logarithmic:
                    image[stored == MISSING_DEPTH] = 0
                found.add_file(domain.name, File(stored, image), has_holes=domain.logarithmic)
        lines += found.lines()
        for name, values in found.values.items():
            if len(values.kinds) > 1:
                warnings.append(
                    f"{split}: {name}: its files differ in what they hold: {', '.join(values.kinds)}"
                )
            if not values.known:
                warnings.append(f"{split}: {name}: every pixel looked at is missing")
            elif values.low == values.high:
                warnings.append(f"{split}: {name}: every pixel looked at is {values.low:g}")
    if len(datasets) > 1:
        warnings += shared_scenes(
            *([dataset.files(index)[-1] for index in range(len(dataset))] for dataset in datasets.values())
        )
    return Overview(lines, warnings)


def show_data(recipe: TranslationRecipe, output: Path) -> None:
    """The data command: print what the sets hold; write a contact sheet of augmented training views.

    Args:
        recipe: whose data it is; ``eval.sheet`` says how many views.
        output: the sheet, a PNG.

    Raises:
        UsageError, DataError: as ``open_split``; a file is broken; the sheet cannot be written.
    """
    datasets = {split: open_split(recipe.data, split) for split in SPLITS}
    writable(output, "--output")
    overview(datasets).show()
    views = augmented(recipe, recipe.eval.sheet)
    if views:
        save_image(output, contact_sheet(views))
        print(f"written: {output}, {len(views)} augmented views")


def augmented(recipe: TranslationRecipe, count: int) -> dict[str, dict[str, Image]]:
    """Views as training sees them in its first steps: every ``input <domain>``, and the ``target``."""
    domains = recipe.data.domains
    views: dict[str, dict[str, Image]] = {}
    for batch in build_train_loader(replace(recipe, run=replace(recipe.run, workers=0))):
        inputs = batch.images.unflatten(0, (len(domains), -1)).transpose(0, 1)
        for name, images, target in zip(batch.names, inputs, batch.target, strict=True):
            if len(views) == count:
                return views
            shown = {f"input {domain}": show(image) for domain, image in zip(domains, images, strict=True)}
            views[name] = {**shown, "target": show(target)}
    return views
