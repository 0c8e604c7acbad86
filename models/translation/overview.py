"""The content of a recipe's views, for the start of a training or evaluation and for the data command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from models.data import LayoutDomain, TranslationSet, differing_inputs
from models.data.contradictions import contradictions, shared_scenes
from models.data.images import read_stored
from models.data.layouts import SPLITS
from models.data.pairs import FARTHEST, LayoutReader
from models.data.survey import SCENES, Overview, Survey, add_files, spread
from models.data.taskonomy import MISSING_DEPTH
from models.data.translation import TaskonomyReader
from models.data.views import File
from models.training.errors import UsageError, writable
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
        UsageError: a modality whose kind nobody tells looks like another one in validation.
    """
    lines: list[str] = []
    warnings: list[str] = []
    for split, dataset in datasets.items():
        if len(dataset) == 0:
            continue
        dataset[0]  # views whose domains differ in size
        found = Survey(split, dataset.source, len(dataset))
        if isinstance(dataset.reader, LayoutReader):
            warnings += _look_at_pairs(found, dataset, dataset.reader)
        else:
            warnings += _look_at_views(found, dataset, dataset.reader)
        lines += found.lines()
    if len(datasets) > 1:
        _check_alike(*datasets.values())
        warnings += shared_scenes(*map(_targets, datasets.values()))
    return Overview(lines, warnings)


def _look_at_views(found: Survey, dataset: TranslationSet, reader: TaskonomyReader) -> list[str]:
    """Survey some views of Taskonomy's layout, and describe what looks wrong."""
    chosen = spread(len(dataset), SCENES)
    found.looked = len(chosen)
    for index in chosen:
        files = dataset.files(index)
        for domain in reader.domains:
            stored = read_stored(files[domain.name])
            image = domain.read(files[domain.name])
            if domain.logarithmic:
                image[stored == MISSING_DEPTH] = 0
            found.add_file(domain.name, File(stored, image), has_holes=domain.logarithmic)
    messages = []
    for name, values in found.values.items():
        if len(values.kinds) > 1:
            messages.append(f"{name}: its files differ in what they hold: {', '.join(values.kinds)}")
        if not values.known:
            messages.append(f"{name}: every pixel looked at is missing")
        elif values.low == values.high:
            messages.append(f"{name}: every pixel looked at is {values.low:g}")
    return [f"{found.split}: {message}" for message in messages]


def _look_at_pairs(found: Survey, dataset: TranslationSet, reader: LayoutReader) -> list[str]:
    """Survey some pairs, and describe what looks unlike their layout or is lost on the network."""
    scenes = [dataset.files(index) for index in spread(len(dataset), SCENES)]
    add_files(found, reader.reader, scenes, range(len(scenes)))
    messages = contradictions(found, reader.layout, dataset.guessed_kinds) + _cut_off(found, reader.domains)
    targets = _targets(dataset)
    if twice := len(targets) - len(set(targets)):
        messages.append(f"{found.split}: {twice} of the {len(targets)} views are listed more than once")
    return messages


def _targets(dataset: TranslationSet) -> list[Path]:
    """Every view's file of the target."""
    return [dataset.files(index)[dataset.domains[-1].name] for index in range(len(dataset))]


def _cut_off(found: Survey, domains: Sequence[LayoutDomain]) -> list[str]:
    """Warn of values that the encoding ends before."""
    messages = []
    for domain in domains:
        values = found.values.get(domain.name)
        if values is None or not values.known:
            continue
        if values.meters and values.distances()[2] > FARTHEST:
            messages.append(f"{domain.name}: distances beyond {FARTHEST:.0f} m are cut off there")
        low, high = sorted(domain.limits or (values.low, values.high))
        if not low <= values.low <= values.high <= high:
            messages.append(
                f"{domain.name}: stored {values.low:g} to {values.high:g} reach beyond its range, and are cut"
                f" off at {low:g} and {high:g}: give a wider range in layout.json"
            )
    return [f"{found.split}: {message}" for message in messages]


def _check_alike(train: TranslationSet, val: TranslationSet) -> None:
    """Refuse sets whose files were taken for different kinds.

    Raises:
        UsageError: they were.
    """
    specs = [[domain.spec() for domain in dataset.domains] for dataset in (train, val)]
    if differences := differing_inputs(*specs):
        raise UsageError(
            f"data.root: validation looks unlike training: {'; '.join(differences)} (in validation): give the"
            " kind in layout.json"
        )


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
