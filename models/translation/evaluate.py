"""Scores of a generator on the validation views, and images of what it makes of them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from models.data import AnyDomain, DataError, collate_translation
from models.data.loading import SampleSet, subset
from models.data.survey import spread
from models.networks.branches import running_with
from models.networks.messages import first_line
from models.networks.systems.unet import UNet
from models.training.absence import check_without
from models.training.errors import UsageError, writable
from models.training.files import replacing, write_json
from models.translation.build import build_eval_loader, eval_transform, evaluated, open_split, output_names
from models.translation.holes import measured
from models.translation.inference import translate, translate_views, translating
from models.translation.load import load
from models.translation.metrics import TranslationMetrics, table
from models.translation.metrics.fid import feature_scores
from models.translation.overview import overview
from models.translation.settings import TranslationRecipe
from models.translation.visualize import view_images
from models.visualize import Image, contact_sheet, save_image

MEAN_IMAGE = "mean image"


def evaluate(
    net: UNet,
    dataset: SampleSet,
    recipe: TranslationRecipe,
    target: AnyDomain,
    stop: Callable[[], bool] = lambda: False,
    *,
    total: int | None = None,
    constant: Tensor | None = None,
) -> TranslationMetrics | None:
    """Compare the outputs with the target, over a data set.

    Args:
        net: in any mode, which is restored.
        dataset: the views; or one process's part of them, after which ``TranslationMetrics.reduce`` joins the
            parts.
        recipe: how to evaluate, and the outputs' names; the domains of ``eval.without`` are left out.
        target: the domain of what the net makes.
        stop: asked after every batch.
        total: the number of views of all processes; None: those of ``dataset``.
        constant: an image ``[C', H, W]`` that is scored as an output as well, as ``MEAN_IMAGE``.

    Returns:
        The scores so far, to be computed; or None once ``stop()`` was true.

    Raises:
        UsageError: FID's weights cannot be loaded; too few views for FID or KID.
    """
    device = next(net.parameters()).device
    present = evaluated(recipe)
    names = output_names(recipe, present) + (() if constant is None else (MEAN_IMAGE,))
    features = feature_scores(recipe.eval.fid, len(names), len(dataset) if total is None else total, device)
    metrics = TranslationMetrics(names, value_range(recipe, target), features, device, target.hole)
    loader = tqdm(build_eval_loader(dataset, recipe), desc="evaluate", leave=False, disable=None)
    with translating(net, recipe.eval.dropout), running_with(net, present):
        for batch in loader:
            batch = batch.of(present).to(device, non_blocking=True)
            outputs = translate_views(net, batch.images, batch.names, recipe)
            if constant is not None:
                outputs.append(constant.to(device).expand_as(batch.target))
            metrics.update(outputs, batch.target)
            if stop():
                return None
    return metrics


def value_range(recipe: TranslationRecipe, target: AnyDomain) -> tuple[float, float]:
    """The meaning of -1 and 1 in MAE, MSE and RMSE: ``eval.value_range``, or the target's own."""
    return recipe.eval.value_range or target.value_range


def check_scores(recipe: TranslationRecipe, views: int) -> None:
    """Refuse scores that so many views, or these settings, cannot give; to be asked before work starts.

    FID's weights are loaded and let go: an evaluation loads them again, training does not hold them.

    Raises:
        UsageError: they cannot.
    """
    settings = recipe.eval
    check_without(recipe, recipe.data.domains, settings.without)
    if settings.best in ("fid", "kid") and settings.fid.weights is None:
        raise UsageError(f"eval.best={settings.best} needs eval.fid.weights")
    if settings.best == "kid" and not settings.fid.kid_subsets:
        raise UsageError("eval.best=kid needs eval.fid.kid_subsets of 1 or more")
    if settings.fid.weights is not None:
        settings.fid.check_images(views)
        settings.fid.load()


def chosen_views(dataset: SampleSet, recipe: TranslationRecipe) -> list[int]:
    """The indices of the views that evaluation looks at: ``eval.limit`` of them, spread evenly; or all.

    Raises:
        DataError: there are none.
    """
    if len(dataset) == 0:
        raise DataError(f"{recipe.data.root}: there are no validation views")
    return spread(len(dataset), recipe.eval.limit or len(dataset))


def mean_target(recipe: TranslationRecipe) -> Tensor:
    """The mean ``[C', H, W]`` of the training views' targets, in squares as evaluation sees them.

    Raises:
        UsageError, DataError: as ``open_split``.
    """
    dataset = open_split(recipe.data, "train")
    target, side = dataset.domains[-1], recipe.data.crop
    total = torch.zeros(target.channels, side, side, dtype=torch.float64)
    count = torch.zeros(1, side, side, dtype=torch.float64)
    for batch in tqdm(build_eval_loader(dataset, recipe), desc=MEAN_IMAGE, leave=False, disable=None):
        known = measured(batch.target, target.hole)
        total += torch.where(known, batch.target.double(), 0).sum(0)
        count += known.sum(0)
    return (total / count.clamp(min=1)).float()


def example_images(
    net: UNet, dataset: SampleSet, recipe: TranslationRecipe, count: int | None = None
) -> dict[str, dict[str, Image]]:
    """Draw a few views: every ``input <domain>``, what every output makes of them, and the ``target``.

    Domains of ``eval.without`` are left out.

    Args:
        net: in any mode, which is restored.
        dataset: the views; those chosen are spread evenly.
        recipe: how to evaluate, and the outputs' names.
        count: how many; None: ``eval.pictures``.
    """
    device = next(net.parameters()).device
    count = min(recipe.eval.pictures if count is None else count, len(dataset))
    chosen = torch.linspace(0, len(dataset) - 1, count).long().tolist()
    present = evaluated(recipe)
    images, names = {}, output_names(recipe, present)
    with translating(net, recipe.eval.dropout), running_with(net, present):
        for index in chosen:
            batch = collate_translation([eval_transform(recipe)(dataset[index])]).of(present)
            (name,) = batch.names
            outputs = [each[0] for each in translate(net, batch.images.to(device), name, recipe)]
            images[name] = view_images(batch.images, outputs, names, batch.target[0])
    return images


def evaluate_checkpoint(path: Path, overrides: Sequence[str], output: Path | None) -> dict[str, float]:
    """The evaluate command: write the scores of every output and of the training targets' mean; print them.

    The mean is left out, and that is said, where there is no training split to be read. Settings that
    were others in training are printed and written as well.

    Written are ``evaluation_<checkpoint>.json``, all of it and how it was found; ``.csv``, a row per output;
    and ``.png``, the contact sheet of ``eval.sheet`` views.

    Args:
        path: run folder or checkpoint.
        overrides: ``field=value`` assignments.
        output: folder to write to; None: that of the checkpoint.

    Raises:
        UsageError, DataError: as ``load``, ``open_split`` of the validation views, and ``check_scores``;
            ``output`` cannot be written.
    """
    trained = load(path, overrides)
    net, recipe, path = trained.net, trained.recipe, trained.path
    views = chosen_views(dataset := open_split(recipe.data, "val"), recipe)
    trained.check(dataset)
    check_scores(recipe, len(views))
    file = writable((output or path.parent) / f"evaluation_{path.stem}.json", "--output")
    overview({"val": dataset}).show(sys.stderr)
    seen = subset(dataset, views)
    constant, baseline = _baseline(recipe)
    scores = evaluate(net, seen, recipe, trained.target, constant=constant)
    assert scores is not None  # nothing stops it
    metrics = scores.compute()
    with running_with(net, present := evaluated(recipe)):
        alpha = dict(zip(output_names(recipe, present), net.branch_weights(), strict=False))
    how = {
        "dropout": recipe.eval.dropout,
        "precision": recipe.run.precision,
        "size": recipe.data.crop if recipe.eval.size == "square" else "full",
        "value_range": value_range(recipe, trained.target),
        "without": list(recipe.eval.without),
        MEAN_IMAGE: baseline,
    }
    found = {"views": len(views), "inference": how, "alpha": alpha, "metrics": metrics}
    write_json(file, {"checkpoint": str(path), "changed": trained.changed, **found})
    _write_csv(file.with_suffix(".csv"), metrics)
    if recipe.eval.sheet:
        examples = example_images(net, seen, recipe, recipe.eval.sheet)
        save_image(file.with_suffix(".png"), contact_sheet(examples))
    # Only now: whoever reads along may stop, as head does.
    spread_over = f" spread over {len(dataset)}" if len(views) < len(dataset) else ""
    seen_of = f"{len(views)} views{spread_over}"
    read = [name for name in recipe.data.domains if name not in recipe.eval.without]
    print(f"{path}, {seen_of}, {' + '.join(read)} to {recipe.data.target}")
    if recipe.eval.without:
        print(f"note: without {', '.join(recipe.eval.without)}")
    for change in trained.changed:
        print(f"other than in training: {change}")
    print(f"{table(metrics)}\n\n{MEAN_IMAGE}: {baseline}")
    print("ensemble of " + ", ".join(f"{weight:.2f} {name}" for name, weight in alpha.items()))
    print(f"written: {file.with_suffix('')}.json, .csv" + ", .png" * (recipe.eval.sheet > 0))
    return metrics


def evaluate_corrupted(
    path: Path, corruptions: Sequence[str], overrides: Sequence[str], output: Path | None
) -> NoReturn:
    """Refuse the evaluate command's ``--corrupt``, which segmentation alone has.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"--corrupt measures segmentation networks, and {path} translates images; eval.without=DOMAIN"
        " evaluates it without one of its domains"
    )


def _baseline(recipe: TranslationRecipe) -> tuple[Tensor | None, str]:
    """The mean image to compare with, or None, and in words what it is or why there is none."""
    if recipe.eval.size != "square":
        return None, "left out, as images of any size have none (eval.size=square)"
    try:
        return mean_target(recipe), "mean target of the training views"
    except DataError as error:
        return None, f"left out, for want of training views ({first_line(error)})"


def _write_csv(path: Path, metrics: dict[str, float]) -> None:
    """Write ``<output>/<score>`` as one line per output."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        name, _, score = key.partition("/")
        rows.setdefault(name, {})[score] = value
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["output", *next(iter(rows.values()))])
        writer.writeheader()
        writer.writerows({"output": name, **scores} for name, scores in rows.items())
