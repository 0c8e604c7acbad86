"""Trained networks from files, for use in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load(path: str | Path, overrides: Sequence[str] = (), *, prune: bool = False) -> Any:
    """The network of a run, a checkpoint or an exported file, with what it is to be fed.

    Args:
        path: run folder (its best checkpoint), or file.
        overrides: ``field=value`` assignments, such as ``run.device=cpu``; without that one it is ``auto``,
            wherever the network was trained.
        prune: leave out of the network what its exchange discards (``models.deployment.prune``): its outputs
            are the same to rounding, for evaluation with all modalities.

    Returns:
        A ``models.segmentation.load.TrainedNetwork`` or ``models.translation.load.TrainedGenerator``: ``net``
        in evaluation mode, ``recipe``, ``inputs``; ``predict``, label maps or images of image files or
        arrays; and ``read``, which makes the network's input of them.

    Raises:
        UsageError: no such file, or a wrong override; the network cannot be pruned.
    """
    import models.recipes  # noqa: F401 - here and below, so that the networks need torch alone
    from models.deployment import loading
    from models.training import checkpoint

    system = checkpoint.system(Path(path))
    trained = system.load(Path(path), overrides)
    return loading.pruned(system, trained) if prune else trained
