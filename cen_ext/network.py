"""Functions on all the exchanging layers of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cen_ext.modules.base import ExchangeNorm
from cen_ext.modules.running import ExchangeBatchNorm2d
from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.sync import check_process_group, default_group
from cen_ext.tables import PerModality

Module = TypeVar("Module", bound=nn.Module)


def exchanging_layers(module: nn.Module) -> dict[str, ExchangeNorm]:
    """Layers of ``module`` that exchange channels, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, ExchangeNorm) and layer.exchanges
    }


@contextmanager
def present(module: nn.Module, modalities: Sequence[int]) -> Iterator[None]:
    """Context in which a network takes some of its M modalities alone; for sensors that fail, or dropout.

    Its layers then take the M' present modalities stacked, ``[M'*N, ...]``, with their rows of scales, shifts
    and running statistics, of which training updates these alone. Each modality gives up the channels that
    it would give up in the whole network, and takes them from the other present ones: the mean of these, or
    the ``lender`` if present. One alone exchanges nothing. No channel comes from a modality that is absent,
    as nothing is computed of it. The network's own code must do with any number of modalities, as those of
    ``models`` and of ``make_multimodal`` do.

    The layers are told, whichever thread runs them, and told again on leaving. What recomputes activations in
    the backward pass (``torch.utils.checkpoint``) needs that within the context, too.

    Args:
        module: the network.
        modalities: the present ones, ascending numbers below M. All of them change nothing.

    Raises:
        TypeError, ValueError: they are no such numbers; no layer below ``module`` knows modalities, or layers
            know different numbers of them; a part of it needs all modalities.
        ValueError: in the forward pass, in training with ``momentum=None``.
    """
    parts = [part for part in module.modules() if isinstance(part, PerModality)]
    several = [part for part in parts if _modalities_of(part) > 1]  # the others take any rows
    counts = sorted({_modalities_of(part) for part in several or parts})
    if len(counts) != 1:
        found = "none" if not counts else f"layers of {' and '.join(map(str, counts))} modalities"
        raise ValueError(f"module must have layers of one number of modalities, got {found}")
    chosen = _checked_modalities(modalities, counts[0])
    some = None if len(chosen) == counts[0] else chosen
    for part in several if some else ():
        part.check_subset()
    before = [(part, part.__dict__.get("present")) for part in several]
    try:
        for part in several:
            part.present = some
        yield
    finally:
        for part, value in before:
            part.__dict__.pop("present")
            if value is not None:
                part.present = value


def _modalities_of(part: PerModality) -> int:
    count: int = part.num_modalities  # type: ignore[attr-defined]  # a property of some, set by others
    return count


def _checked_modalities(modalities: Sequence[int], count: int) -> tuple[int, ...]:
    """The modalities as a tuple.

    Raises:
        TypeError, ValueError: they are no ascending numbers below ``count``, or none.
    """
    if not isinstance(modalities, Sequence) or not all(isinstance(m, Integral) for m in modalities):
        raise TypeError(f"modalities must be a sequence of integers, got {modalities!r}")
    chosen = tuple(map(int, modalities))
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"modalities must be some of 0 to {count - 1}, ascending, got {list(chosen)}")
    return chosen


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
