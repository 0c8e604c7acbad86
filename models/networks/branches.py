"""The input and the outputs of networks of M branches: stacked, split, weighed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cen_ext import present, stack_modalities
from cen_ext.ops.streams import Streams, joined


def stacked_input(x: Tensor | Sequence[Tensor], num_modalities: int, in_channels: int) -> Tensor:
    """A network's input as one checked tensor ``[M*N, in_channels, H, W]``, modality-major.

    Args:
        x: that tensor, or a sequence of M tensors ``[N, in_channels, H, W]``; ``Streams`` stay what they are.
        num_modalities, in_channels: the network's, or the number of modalities that are present.

    Raises:
        ValueError: another number of modalities or channels, or modalities of different shapes.
    """
    if not isinstance(x, Tensor | Streams):
        if len(x) != num_modalities:
            raise ValueError(f"the network has {num_modalities} modalities, but x is a list of {len(x)}")
        x = stack_modalities(x)
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x must be [M*N, {in_channels}, H, W], got {tuple(x.shape)}")
    if x.shape[0] % num_modalities != 0:
        raise ValueError(
            f"x has {x.shape[0]} rows on its batch axis, not divisible by {num_modalities} modalities"
        )
    return x


def running_with(net: nn.Module, modalities: Sequence[int] | None) -> AbstractContextManager[None]:
    """``cen_ext.present``; with None the network runs with all of its modalities."""
    return nullcontext() if modalities is None else present(net, modalities)


def of_all(values: Tensor, modalities: Sequence[int] | None, count: int) -> Tensor:
    """A value for each of ``count`` branches, 0 where the modality is absent, and what stands behind them.

    Args:
        values: one for each of the present ``modalities`` (None: all), and further ones.
    """
    if modalities is None:
        return values
    found = dict(zip(modalities, values, strict=False))
    none = torch.zeros_like(values[0])
    return torch.stack([*(found.get(m, none) for m in range(count)), *values[len(found) :]])


def split_branches(stacked: Tensor | Streams, num_modalities: int) -> Tensor:
    """Stacked ``[M*N, C, H, W]`` to ``[M, N, C, H, W]``, a view; ``Streams`` are stacked so."""
    if isinstance(stacked, Streams) and len(stacked) == num_modalities:
        return torch.stack(stacked.parts)
    branches: Tensor = joined(stacked).unflatten(0, (num_modalities, stacked.shape[0] // num_modalities))
    return branches


def weighted_ensemble(
    branches: Tensor,  # [M, N, C, H, W]
    alpha: Tensor,  # [M], before the softmax
) -> tuple[Tensor, Tensor]:
    """The sum ``[N, C, H, W]`` of the detached branches, weighted by softmax(alpha), and those weights.

    Its loss trains alpha alone (Wang et al. 2020, Eq. 4).
    """
    weights = alpha.softmax(0)
    return (weights[:, None, None, None, None] * branches.detach()).sum(0), weights
