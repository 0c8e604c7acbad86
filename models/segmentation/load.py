"""Trained networks from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.segmentation.build import build_network
from models.segmentation.network import SegmentationNetwork
from models.segmentation.settings import SegmentationRecipe
from models.training import checkpoint, config
from models.training.devices import device_of
from models.training.errors import UsageError


def load_network(
    path: Path, overrides: Sequence[str] = ()
) -> tuple[SegmentationNetwork, SegmentationRecipe, Path]:
    """The network of a run's best checkpoint, or of the checkpoint given.

    Returns:
        The network in evaluation mode on the recipe's device, the recipe with the overrides applied, and the
        checkpoint's path.

    Raises:
        UsageError: no checkpoint there; an override is wrong or does not fit the weights.
    """
    path, contents = checkpoint.load(path, checkpoint.BEST)
    recipe = config.override(checkpoint.settings(contents), overrides)
    net = build_network(recipe)
    try:
        net.load_state_dict(contents["task"]["net"])
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit these settings: {error}") from None
    return net.to(device_of(recipe.run.device)).eval(), recipe, path
