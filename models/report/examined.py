"""What a trained network makes of validation images, one by one: scores, confusions, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.data import DataError, eval_loader
from models.data.loading import subset
from models.data.survey import spread
from models.networks.branches import running_with
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.build import evaluated, open_validation, output_names
from models.segmentation.evaluate import evaluating
from models.segmentation.inference import predict_labels
from models.segmentation.load import TrainedNetwork
from models.segmentation.metrics import ClassRows, SegmentationMetrics, class_rows, image_iou
from models.segmentation.settings import SegmentationRecipe
from models.segmentation.visualize import scene_images
from models.translation import build as translation
from models.translation.evaluate import evaluate as evaluate_views
from models.translation.evaluate import example_images
from models.translation.load import TrainedGenerator
from models.visualize import Image

ERRORS = "errors"  # the name of the picture of pixels that the ensemble got wrong
_MOST = 3  # scenes of either end


@dataclass(frozen=True)
class ScoredScene:
    """An image and how the outputs did on it.

    Attributes:
        index: in the validation set.
        scores: by output; where less is better, as the examination says.
    """

    index: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """A scene's pictures by what they show: ``input <modality>``, ``target``, outputs, errors of labels."""

    name: str
    scores: dict[str, float]
    images: dict[str, Image]


@dataclass(frozen=True)
class Examined:
    """The answers of a network to validation images.

    Attributes:
        score: of which ``scenes`` have values, in words.
        count, total: of the images looked at and of the set.
        scenes: best first, as the ensemble has it.
        worst, best: some of them, drawn; the worst and the best first.
        classes: IoU by class and output; None in translation.
        confusion: ``[K, K]`` pixels of each true class (rows) that the ensemble took for each class.
        palette: ``[K, 3]`` the classes' colors where the data set has its own.
    """

    score: str
    count: int
    total: int
    scenes: Sequence[ScoredScene]
    worst: Sequence[Drawn]
    best: Sequence[Drawn]
    classes: ClassRows | None = None
    confusion: NDArray[np.int64] | None = None
    palette: NDArray[np.uint8] | None = None


def examine(trained: Any, limit: int | None, *, draw: bool = True) -> Examined:
    """Run a network on the validation images of its settings.

    Args:
        trained: what a system's ``load`` returns.
        limit: the number of images, spread evenly; None: ``eval.limit``, or all.
        draw: whether pictures are wanted.

    Raises:
        UsageError, DataError: as opening the data set; it has no images, or is not what the network takes.
    """
    if isinstance(trained, TrainedNetwork):
        return _segmented(trained, limit, draw)
    return _translated(trained, limit, draw)


def _segmented(trained: TrainedNetwork, limit: int | None, draw: bool) -> Examined:
    recipe, net = trained.recipe, trained.net
    dataset = open_validation(recipe)
    trained.check(dataset)
    chosen = _chosen(dataset, limit or recipe.eval.limit, recipe)
    names = output_names(recipe, evaluated(recipe))
    total = _counts(names, recipe)
    scenes = []
    answers = _answers(net, dataset, chosen, recipe)
    for index, (batch, _, found) in zip(chosen, _progress(answers, len(chosen)), strict=True):
        one = _counts(names, recipe)
        for counts in (one, total):
            counts.update([labels.cpu() for labels in found.values()], batch.target, tuple(found))
        values = dict(zip(names, image_iou(one.confusion[:, None])[:, 0].tolist(), strict=True))
        if int(one.confusion[-1].sum()):  # an image without labels has no score
            scenes.append(ScoredScene(index, {name: values[name] for name in found}))

    def drawn(scenes: Sequence[ScoredScene]) -> list[Drawn]:
        pictures = []
        answers = _answers(net, dataset, [scene.index for scene in scenes], recipe)
        for scene, (batch, present, found) in zip(scenes, answers, strict=True):
            maps = {"target": batch.target[0], **{name: labels[0] for name, labels in found.items()}}
            images = scene_images(batch.images, maps, recipe.data, trained.palette, present)
            target = batch.target[0].numpy()
            images[ERRORS] = _errors(found["ensemble"][0].cpu().numpy(), target, recipe.data.ignore_index)
            pictures.append(Drawn(batch.names[0], scene.scores, images))
        return pictures

    scenes.sort(key=lambda scene: -scene.scores["ensemble"])
    worst, best = _ends(scenes, drawn) if draw else ([], [])
    return Examined(
        "mean IoU of the image",
        len(chosen),
        len(dataset),
        scenes,
        worst,
        best,
        class_rows(total, dataset.class_names),
        total.confusion[-1].numpy(),
        trained.palette,
    )


def _counts(names: tuple[str, ...], recipe: SegmentationRecipe) -> SegmentationMetrics:
    return SegmentationMetrics(names, recipe.data.num_classes, recipe.data.ignore_index)


def _answers(
    net: SegmentationNetwork, dataset: Any, indices: Sequence[int], recipe: SegmentationRecipe
) -> Iterator[tuple[Any, tuple[int, ...] | None, dict[str, Tensor]]]:
    """Each image's batch, the modalities that are there, and labels ``[1, H, W]`` by output."""
    without = [recipe.data.modalities.index(name) for name in recipe.eval.without]
    device = next(net.parameters()).device
    with evaluating(net):
        for batch in eval_loader(subset(dataset, indices)):
            ((present, part),) = batch.by_presence(without)
            with running_with(net, present):
                size = part.target.shape[-2:]
                labels = predict_labels(net, part.images.to(device), size, recipe, part.kinds)
            yield batch, present, dict(zip(output_names(recipe, present), labels, strict=True))


def _errors(found: NDArray[np.int64], target: NDArray[np.int64], ignored: int) -> Image:
    """Wrong pixels dark, right ones light, those that do not count in between."""
    shades = np.where(target == ignored, 190, np.where(found == target, 244, 30)).astype(np.uint8)
    return np.repeat(shades[..., None], 3, axis=2)


def _translated(trained: TrainedGenerator, limit: int | None, draw: bool) -> Examined:
    recipe, net = trained.recipe, trained.net
    dataset = translation.open_split(recipe.data, "val")
    trained.check(dataset)
    chosen = _chosen(dataset, limit or recipe.eval.limit, recipe)
    # A view at a time; FID is of many.
    alone = replace(recipe, eval=replace(recipe.eval, fid=type(recipe.eval.fid)()))
    names = translation.output_names(recipe, translation.evaluated(recipe))
    scenes = []
    for index in _progress(chosen, len(chosen)):
        scores = evaluate_views(net, subset(dataset, [index]), alone, trained.target)
        assert scores is not None  # nothing stops it
        found = scores.compute()
        scenes.append(ScoredScene(index, {name: found[f"{name}/l1"] for name in names}))

    def drawn(scenes: Sequence[ScoredScene]) -> list[Drawn]:
        seen = subset(dataset, [scene.index for scene in scenes])
        images = example_images(net, seen, recipe, len(scenes))
        return [
            Drawn(name, scene.scores, each)
            for (name, each), scene in zip(images.items(), scenes, strict=True)
        ]

    scenes.sort(key=lambda scene: scene.scores["ensemble"])
    worst, best = _ends(scenes, drawn) if draw else ([], [])
    return Examined("L1 on [-1, 1]", len(chosen), len(dataset), scenes, worst, best)


def _chosen(dataset: Any, limit: int | None, recipe: Any) -> list[int]:
    if len(dataset) == 0:
        raise DataError(f"{recipe.data.root}: there are no validation images")
    return spread(len(dataset), limit or len(dataset))


def _progress(steps: Any, count: int) -> Any:
    return tqdm(steps, desc="evaluate", total=count, leave=False, disable=None)


def _ends(
    scenes: Sequence[ScoredScene], drawn: Callable[[Sequence[ScoredScene]], list[Drawn]]
) -> tuple[list[Drawn], list[Drawn]]:
    """The worst and the best scenes, none of them both."""
    best = list(scenes[: min(_MOST, -(-len(scenes) // 2))])
    worst = list(scenes[len(best) :])[-_MOST:][::-1]
    return drawn(worst), drawn(best)
