"""What leaves the toolkit with a generator: see ``models.deployment``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from models.data import to_plain
from models.data.loading import subset
from models.segmentation.evaluate import example_scenes
from models.translation.build import build_eval_loader, open_split
from models.translation.inference import translating
from models.translation.load import TrainedGenerator


def scenes(trained: TrainedGenerator, count: int) -> list[Tensor]:
    """Inputs ``[M, 3, H, W]`` of validation views, ``count`` of them spread evenly.

    Raises:
        UsageError, DataError: the data set is not there, not whole, or not what the network was trained on.
    """
    dataset = open_split(trained.recipe.data, "val")
    trained.check(dataset)
    chosen = subset(dataset, example_scenes(dataset, count))
    return [
        images
        for batch in build_eval_loader(chosen, trained.recipe)
        for images in batch.images.unflatten(0, (len(trained.inputs), -1)).unbind(1)
    ]


def answering(trained: TrainedGenerator) -> AbstractContextManager[None]:
    """The context in which ``trained.net`` answers as it is to be exported: without dropout."""
    return translating(trained.net, dropout=False)


def description(trained: TrainedGenerator) -> dict[str, Any]:
    """What a program needs to know to feed the generator and to read its outputs."""
    return {
        "task": "translation",
        "inputs": [to_plain(spec) for spec in trained.inputs],
        "target": to_plain(trained.target.spec()),
        "outputs_are": "images of the target's domain in [-1, 1]",
    }
