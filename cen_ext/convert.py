"""Any network with batch or instance norm, turned into a channel-exchanging one."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from cen_ext.modules import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, ExchangeNorm
from cen_ext.ops.norm_exchange import sync

Where = Callable[[str, nn.Module], bool] | Collection[str]

_LAYERS: dict[type[Any], type[ExchangeNorm]] = {
    nn.BatchNorm1d: ExchangeBatchNorm2d,
    nn.BatchNorm2d: ExchangeBatchNorm2d,
    nn.BatchNorm3d: ExchangeBatchNorm2d,
    nn.SyncBatchNorm: ExchangeBatchNorm2d,
    nn.InstanceNorm1d: ExchangeInstanceNorm2d,
    nn.InstanceNorm2d: ExchangeInstanceNorm2d,
    nn.InstanceNorm3d: ExchangeInstanceNorm2d,
}


def make_multimodal(
    module: nn.Module,
    num_modalities: int,
    threshold: float = 0.02,
    where: Where | None = None,
    *,
    region: str = "own",
    criterion: str = "abs",
) -> nn.Module:
    """A copy of a single-modality network that takes M stacked modalities and exchanges their channels.

    Every BatchNorm1d/2d/3d, SyncBatchNorm and InstanceNorm1d/2d/3d at or below ``module`` becomes M private
    ones that exchange (Wang et al., NeurIPS 2020, section 3.3 and 3.4). All else is shared between the
    modalities and must treat the rows of a batch alike. Feed it ``stack_modalities([x_0, ...])`` and split
    what it returns with ``unstack_modalities``.

    The private norms begin as the original one: affine, running statistics, momentum, eps, device, dtype
    (float32 with half types), training mode and ``requires_grad``. A norm without affine gets ones and zeros
    that train, as the exchange reads the scale. A norm used at several places stays one layer; its hooks are
    not kept. A SyncBatchNorm stays synchronised where torch.distributed is initialised.

    Args:
        module: the network, left as it is.
        num_modalities: M >= 1.
        threshold, region, criterion: of the layers that exchange, as in ``norm_exchange``.
        where: which layers exchange: ``where(name, norm)`` is true; or the names of the norms or of modules
            that contain them; None for all of them. The others become private norms with threshold 0.

    Raises:
        TypeError: module is no module, or where is neither callable nor a collection of names.
        ValueError: there is no norm layer; a name in ``where`` has none at or below it; a norm is lazy and
            not initialised, or of a class that changes torch's forward; the rest as ``ExchangeNorm``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    norms = _norm_layers(module)
    exchanging = _picked(norms, where)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(()))
    # deepcopy asks the memo first: wherever a norm is referred to, its replacement comes instead.
    replacements: dict[int, Any] = {}
    for norm in dict.fromkeys(norms.values()):
        options = dict(threshold=threshold if norm in exchanging else 0.0, region=region, criterion=criterion)
        replacements[id(norm)] = _private(norm, num_modalities, like, options)
    return copy.deepcopy(module, replacements)


def _norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every norm layer at or below ``module``, under each of its names."""
    norms: dict[str, nn.Module] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, LazyModuleMixin) and layer.cls_to_become in _LAYERS:
            raise ValueError(f"norm {name!r} is lazy and has no channels yet: run the network once before")
        kind = _kind(layer)
        if kind is None:
            continue
        if type(layer).forward is not kind.forward:
            raise ValueError(
                f"norm {name!r} is a {type(layer).__name__}, whose forward is not that of nn.{kind.__name__}"
            )
        norms[name] = layer
    if not norms:
        raise ValueError("module has no BatchNorm, SyncBatchNorm or InstanceNorm layer")
    return norms


def _kind(layer: nn.Module) -> type[Any] | None:
    """Which of torch's norms the layer is."""
    return next((kind for kind in _LAYERS if isinstance(layer, kind)), None)


def _picked(norms: dict[str, nn.Module], where: Where | None) -> set[nn.Module]:
    """The norms that exchange."""
    if where is None:
        return set(norms.values())
    if callable(where):
        return {norm for name, norm in norms.items() if where(name, norm)}
    named = isinstance(where, Collection) and all(isinstance(name, str) for name in where)
    if isinstance(where, str) or not named:
        raise TypeError(f"where must be a callable or a collection of module names, got {where!r}")
    picked = set()
    for wanted in where:
        below = {norm for name, norm in norms.items() if name == wanted or name.startswith(f"{wanted}.")}
        if not below:
            close = ", ".join(map(repr, difflib.get_close_matches(wanted, norms))) or "none"
            raise ValueError(f"where: no norm layer at or below {wanted!r}; close names: {close}")
        picked |= below
    return picked


def _private(norm: Any, num_modalities: int, like: Tensor, options: dict[str, Any]) -> ExchangeNorm:
    """The layer of M private norms that begin as ``norm``, of dtype and device of ``like`` if it has none."""
    like = next((t for t in (norm.weight, norm.running_mean) if t is not None), like)
    kind = _kind(norm)
    assert kind is not None
    layer = _LAYERS[kind](
        norm.num_features,
        num_modalities,
        momentum=norm.momentum,
        eps=norm.eps,
        track_running_stats=norm.running_mean is not None,
        device=like.device,
        dtype=like.dtype,
        **options,
    )
    if isinstance(norm, nn.SyncBatchNorm):
        layer.process_group = norm.process_group or sync.default_group()
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        original = getattr(norm, name)
        if original is not None:
            getattr(layer, name).data.copy_(original)  # [C] into every modality
            getattr(layer, name).requires_grad_(original.requires_grad)
    return layer.train(norm.training)
