"""Functions on all the exchanging layers of a network."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cen_ext.modules.base import ExchangeNorm
from cen_ext.modules.running import ExchangeBatchNorm2d
from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.sync import check_process_group, default_group

Module = TypeVar("Module", bound=nn.Module)


def exchanging_layers(module: nn.Module) -> dict[str, ExchangeNorm]:
    """Layers of ``module`` that exchange channels, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, ExchangeNorm) and layer.exchanges
    }


def sparsity_penalty(
    module: nn.Module, kind: str = "l1", region: str | None = None, *, t: float = 1.0
) -> Tensor:
    """Penalty on the scales γ of every exchanging layer below ``module``, without λ.

    Layers that exchange by a tensor ``replaced`` of the caller's, not by their scales, are left out.

    Args:
        kind: ``"l1"``: Σ|γ| (Eq. 4). ``"polarization"``: ``t Σ|γ| - Σ|γ - mean γ|``, with the mean of each
            modality in each layer, which drives scales apart (Zhuang et al., NeurIPS 2020, Eq. 2).
        region: the channels that it sums over: ``"own"``, each modality's share of them, or ``"all"``; None
            for ``"own"``, as in Eq. 4.
        t: of the polarization.

    Returns:
        A 0-d differentiable tensor; 0 if no layer exchanges.

    Raises:
        ValueError: an unknown kind or region.
    """
    for name, value, known in (
        ("kind", kind, ("l1", "polarization")),
        ("region", region, (None, "own", "all")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    layers = (layer for layer in exchanging_layers(module).values() if layer.replaced_mask is None)
    penalties = [_penalty(layer, kind, region != "all", t) for layer in layers]
    return torch.stack(penalties).sum() if penalties else torch.zeros(())


def _penalty(layer: ExchangeNorm, kind: str, own: bool, t: float) -> Tensor:
    weight = layer.whole_table("weight")
    assert weight is not None  # a layer that exchanges by its scales has some
    # Masked rather than indexed, because data-dependent shapes would synchronize host and device.
    region = reference.own_region(weight) if own else torch.ones_like(weight)
    size = (weight.abs() * region).sum()
    if kind == "l1":
        return size
    mean = (weight * region).sum(1, keepdim=True) / region.sum(1, keepdim=True).clamp(min=1)
    return t * size - ((weight - mean).abs() * region).sum()


def synchronize_statistics(module: Module, process_group: dist.ProcessGroup | None = None) -> Module:
    """Make every ``ExchangeBatchNorm2d`` of ``module`` compute its batch statistics over all processes.

    Training under ``DistributedDataParallel`` then equals training in one process with the whole batch. Call
    it before wrapping the network, with the same network in every process. It costs one collective per layer
    forward and one backward, and nothing in eval mode or for instance norm. These layers refuse
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``; torch's own layers in ``module`` still need it.

    Args:
        process_group: the processes that train together; None for the default group.

    Returns:
        ``module``, changed in place.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: process_group is no process group.
    """
    process_group = process_group or default_group()
    if process_group is None:
        raise RuntimeError("synchronize_statistics: call torch.distributed.init_process_group first")
    check_process_group(process_group, ExchangeBatchNorm2d.norm)
    for layer in module.modules():
        if isinstance(layer, ExchangeBatchNorm2d):
            layer.process_group = process_group
    return module


synchronise_statistics = synchronize_statistics  # the old spelling
