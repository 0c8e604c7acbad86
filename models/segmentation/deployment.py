"""What leaves the toolkit with a segmentation network: see ``models.deployment``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from models.data import eval_loader, to_plain
from models.data.loading import subset
from models.segmentation.build import open_validation
from models.segmentation.evaluate import example_scenes
from models.segmentation.load import TrainedNetwork


def scenes(trained: TrainedNetwork, count: int) -> list[Tensor]:
    """Inputs ``[M, 3, H, W]`` of validation images, ``count`` of them spread evenly.

    Raises:
        UsageError, DataError: the data set is not there, not whole, or not what the network was trained on.
    """
    dataset = open_validation(trained.recipe)
    trained.check(dataset)
    return [batch.images for batch in eval_loader(subset(dataset, example_scenes(dataset, count)))]


def answering(trained: TrainedNetwork) -> AbstractContextManager[None]:
    """The context in which ``trained.net`` answers as it is to be exported."""
    return nullcontext()


def description(trained: TrainedNetwork) -> dict[str, Any]:
    """What a program needs to know to feed the network and to read its outputs."""
    return {
        "task": "segmentation",
        "inputs": [to_plain(spec) for spec in trained.inputs],
        "layout": to_plain(trained.layout),
        "classes": list(trained.class_names),
        "palette": None if trained.palette is None else trained.palette.tolist(),
        "scales": list(trained.recipe.eval.scales),
        "outputs_are": "logits, to be enlarged (bilinear, align_corners=False) to the image's size",
    }
