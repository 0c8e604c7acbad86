"""Makers of masks ``[M, C]``: which channels the exchange replaces, other than by Eq. 6.

Each returns a bool tensor for ``replaced=`` of ``norm_exchange`` and, with ``functools.partial`` for its
options, a function of the scales for ``mask=`` of the layers, which call it in every step. All stay on the
device of the scales: none copies to the host, and no gradient flows. A ``region`` is ``"own"`` (each
modality's share of the channels, section 3.3 of the paper), ``"all"``, or a bool tensor ``[M, C]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.checks import check_number, check_options
from cen_ext.ops.norm_exchange.options import Options

Region = str | Tensor


def threshold(
    weight: Tensor, theta: float | Tensor, region: Region = "own", criterion: str = "abs"
) -> Tensor:
    """The channels that Eq. 6 replaces, with a threshold that may differ between modalities or channels.

    Args:
        weight: ``[M, C]`` scales.
        theta: θ, a number, ``[M]`` or ``[M, C]``. Unlike the operator's, one of 0 is compared as any other.
        criterion: ``"abs"``: ``|weight| < θ``; ``"signed"``: ``weight <= θ``.

    Raises:
        TypeError, ValueError: theta of another shape, or no number; an unknown region or criterion.
    """
    allowed = _allowed(weight, region)
    check_options(Options(criterion=criterion))
    if isinstance(theta, Tensor):
        if theta.shape not in ((), weight.shape[:1], weight.shape):
            raise ValueError(
                f"theta must be a number, [M] or [M, C] with weight {tuple(weight.shape)}, got "
                f"{tuple(theta.shape)}"
            )
        theta = theta.detach()
        theta = theta[:, None] if theta.dim() == 1 else theta
    else:
        check_number("theta", theta)
    scales = weight.detach()
    return allowed & (scales.abs() < theta if criterion == "abs" else scales <= theta)


def quantile(weight: Tensor, q: float, region: Region = "own") -> Tensor:
    """Channels whose |γ| is below the q-quantile of their modality's in this layer, in the region.

    Args:
        weight: ``[M, C]`` scales.
        q: from 0, which replaces nothing, to 1. Quantiles are interpolated linearly between the scales.

    Raises:
        TypeError, ValueError: q is no number in [0, 1]; an unknown region.
    """
    _check_share("q", q)
    scales = weight.detach().abs()
    return threshold(scales, torch.quantile(scales, q, dim=1), region)


def valley(weight: Tensor, bins: int, region: Region = "own") -> Tensor:
    """Channels on the near side of the first valley of the histogram of their modality's |γ| in this layer.

    The histogram has equal bins from the smallest |γ| to the largest. Its first valley is the first bin that
    is lower than one before it and than the one after it; θ is the bin's middle. Without a valley nothing is
    replaced. A polarizing penalty makes one (``cen_ext.sparsity_penalty``, kind ``"polarization"``).

    Args:
        weight: ``[M, C]`` scales.
        bins: at least 3. CMIPNet (TGRS 2024) has C of them.

    Raises:
        TypeError, ValueError: bins is no such integer; an unknown region.
    """
    _check_count("bins", bins, 3)
    scales = weight.detach().abs()
    lowest, highest = scales.aminmax(dim=1, keepdim=True)
    edges = lowest + (highest - lowest) * torch.linspace(
        0, 1, bins + 1, dtype=scales.dtype, device=scales.device
    )
    # Counted by searching in sorted scales: a histogram of its own would add up with atomics.
    below = torch.searchsorted(scales.sort(dim=1).values, edges[:, 1:-1].contiguous())
    counts = torch.diff(torch.nn.functional.pad(below, (1, 0)), dim=1)
    counts = torch.cat([counts, scales.shape[1] - below[:, -1:]], 1)
    fallen = counts < counts.cummax(dim=1).values
    rises = counts[:, 1:] > counts[:, :-1]
    is_valley = fallen[:, :-1] & rises
    first = is_valley.int().argmax(dim=1, keepdim=True)
    middle = (edges.gather(1, first) + edges.gather(1, first + 1)) / 2
    found = is_valley.any(dim=1, keepdim=True)
    return threshold(scales, torch.where(found, middle, 0.0).squeeze(1), region)


def smallest(weight: Tensor, k: int, region: Region = "own") -> Tensor:
    """The k channels of each modality with the smallest |γ| in the region; all of it where it has fewer.

    Args:
        weight: ``[M, C]`` scales.
        k: from 0 to C. Of equal scales, which ones are taken is the sort's to say, the same in every run.

    Raises:
        TypeError, ValueError: k is no such integer; an unknown region.
    """
    _check_count("k", k, 0)
    allowed = _allowed(weight, region)
    if k > weight.shape[1]:
        raise ValueError(f"k must be at most the number of channels {weight.shape[1]}, got {k}")
    scales = weight.detach().abs().masked_fill(~allowed, torch.inf)
    chosen = scales.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(allowed).scatter(1, chosen, True) & allowed


def strided(
    num_modalities: int, channels: int, stride: int, *, device: torch.device | str | None = None
) -> Tensor:
    """Every ``stride``-th channel of every modality, from the first: ``c % stride == 0`` (Changer, with 2).

    Raises:
        TypeError, ValueError: a number below 1, or none.
    """
    for name, value in (("num_modalities", num_modalities), ("channels", channels), ("stride", stride)):
        _check_count(name, value, 1)
    return (torch.arange(channels, device=device) % stride == 0).repeat(num_modalities, 1)


def tail(
    num_modalities: int, channels: int, share: float, *, device: torch.device | str | None = None
) -> Tensor:
    """The last ``round(share * channels)`` channels of every modality, as AsymFusion swaps them.

    Raises:
        TypeError, ValueError: a number below 1, or none; a share outside [0, 1].
    """
    for name, value in (("num_modalities", num_modalities), ("channels", channels)):
        _check_count(name, value, 1)
    _check_share("share", share)
    kept = channels - round(share * channels)
    return (torch.arange(channels, device=device) >= kept).repeat(num_modalities, 1)


def _allowed(weight: Tensor, region: Region) -> Tensor:
    """The region as a bool tensor ``[M, C]``."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [M, C], got shape {tuple(weight.shape)}")
    if isinstance(region, Tensor):
        if region.dtype != torch.bool or region.shape != weight.shape:
            raise ValueError(
                f"a region must be {torch.bool} {tuple(weight.shape)} as weight is, got {region.dtype} "
                f"{tuple(region.shape)}"
            )
        return region
    check_options(Options(region=region))
    return reference.own_region(weight) if region == "own" else torch.ones_like(weight, dtype=torch.bool)


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_share(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1 or math.isnan(value):
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
