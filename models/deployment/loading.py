"""Trained networks, pruned as they are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from models.deployment.interface import multiple_of
from models.deployment.pruning import prune
from models.training.errors import UsageError
from models.training.registry import System

_SIDE = 64  # of the noise that a network is run on; what it is pruned to does not depend on it


def pruned(system: System, trained: Any) -> Any:
    """What a system's ``load`` returned, with its network pruned.

    Raises:
        UsageError: the network cannot be pruned.
    """
    multiple = multiple_of(trained.net)
    side = max(_SIDE // multiple, 1) * multiple
    device = next(trained.net.parameters()).device
    noise = torch.randn(len(trained.inputs), 3, side, side, generator=torch.Generator().manual_seed(0))
    with system.answering(trained):
        try:
            return replace(trained, net=prune(trained.net, noise.to(device)).net)
        except RuntimeError as error:
            raise UsageError(f"{trained.path}: {error}") from error
