"""Any network with batch or instance norm, turned into a channel-exchanging one."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from cen_ext.modules import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, ExchangeNorm
from cen_ext.ops.norm_exchange import sync

Where = Callable[[str, nn.Module], bool] | Collection[str]
# (the original norm, whether it exchanges, the activation to fuse) -> the norm of M modalities
MakeNorm = Callable[[Any, bool, str], nn.Module]

_LAYERS: dict[type[Any], type[ExchangeNorm]] = {
    nn.BatchNorm1d: ExchangeBatchNorm2d,
    nn.BatchNorm2d: ExchangeBatchNorm2d,
    nn.BatchNorm3d: ExchangeBatchNorm2d,
    nn.SyncBatchNorm: ExchangeBatchNorm2d,
    nn.InstanceNorm1d: ExchangeInstanceNorm2d,
    nn.InstanceNorm2d: ExchangeInstanceNorm2d,
    nn.InstanceNorm3d: ExchangeInstanceNorm2d,
}
# timm's layers of a norm, ``drop`` and ``act``, known by name: the library needs torch alone.
_NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct")
_FUSED: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
}


def make_multimodal(
    module: nn.Module,
    num_modalities: int,
    threshold: float = 0.02,
    where: Where | None = None,
    *,
    region: str = "own",
    criterion: str = "abs",
    order: str = "modality",
    backend: str | None = None,
) -> nn.Module:
    """A copy of a single-modality network that takes M stacked modalities and exchanges their channels.

    Every BatchNorm1d/2d/3d, SyncBatchNorm and InstanceNorm1d/2d/3d at or below ``module`` becomes M private
    ones that exchange (Wang et al., NeurIPS 2020, section 3.3 and 3.4). All else is shared between the
    modalities and must treat the rows of a batch alike. Feed it ``stack_modalities([x_0, ...])`` and split
    what it returns with ``unstack_modalities``. A network that splits or joins the batch axis, or is split
    along it (microbatches, pipelining, ``torch.nn.DataParallel``), needs ``order="sample"`` in all three.

    The private norms begin as the original one: affine, running statistics and whether it tracks them,
    momentum, eps, device, dtype (float32 with half types), training mode and ``requires_grad``. A norm
    without affine gets ones and zeros that train, as the exchange reads the scale. A norm used at several
    places stays one layer; its hooks are not kept. A SyncBatchNorm stays synchronised where
    torch.distributed is initialised.

    timm's BatchNormAct2d and SyncBatchNormAct, norms that end in ``drop`` and ``act``, are converted too. The
    operator applies ReLU, ReLU6, LeakyReLU and Identity itself; the layer's ``act`` is then an Identity. Any
    other activation, and any after a drop, follows the exchange as the module that it was.

    Norms of each row by itself (LayerNorm, GroupNorm and the like) and frozen batch norms, whose affine and
    statistics are constants, have no exchange version. They stay as they are, shared by the modalities, and a
    UserWarning names them. Layers that take statistics of the batch in ways of their own would mix the
    modalities and are refused. Only layers that keep running statistics can be recognised as such: a layer
    that mixes rows and keeps none (a minibatch standard deviation, say) is the caller's to look out for.

    Args:
        module: the network, left as it is.
        num_modalities: M >= 1.
        threshold, region, criterion: of the layers that exchange, as in ``norm_exchange``.
        where: which layers exchange: ``where(name, norm)`` is true; or the names of the norms or of modules
            that contain them; None for all of them. The others become private norms with threshold 0.
        order: of the rows, as in ``stack_modalities``.
        backend: of all these layers, as in ``norm_exchange``.

    Raises:
        TypeError: module is no module, or where is neither callable nor a collection of names.
        ValueError: there is no norm layer; a name in ``where`` has none at or below it; norms are lazy and
            not initialised, of a class that changes torch's forward, or keep statistics of the batch without
            being torch's (all of them are named); the rest as ``ExchangeNorm``.
    """

    def make_norm(norm: Any, exchanges: bool, activation: str) -> ExchangeNorm:
        kind = _kind(norm)
        assert kind is not None
        return _LAYERS[kind](
            norm.num_features,
            num_modalities,
            threshold=threshold if exchanges else 0.0,
            region=region,
            criterion=criterion,
            activation=activation,
            order=order,
            backend=backend,
            track_running_stats=norm.running_mean is not None,
        )

    return replace_norms(module, make_norm, where)


def replace_norms(module: nn.Module, make_norm: MakeNorm, where: Where | None = None) -> nn.Module:
    """A copy of a network in which ``make_norm`` makes the norms, which begin as the original's.

    This is ``make_multimodal`` with norms of one's own.

    Args:
        module: the network, left as it is.
        make_norm: called as ``make_norm(norm, exchanges, activation)`` for each norm layer that
            ``make_multimodal`` lists: the original, whether ``where`` picks it, and ``"identity"``,
            ``"relu"``, ``"relu6"`` or ``"leaky_relu"``, which the result must apply last. The result takes a
            stacked ``[M*N, C, *spatial]`` and loads a state dict of torch's norm, as ``ExchangeNorm`` does.
            Its device, dtype, training mode, ``eps``, ``momentum`` and ``negative_slope`` are set afterwards,
            and its parameters' ``requires_grad``.
        where: as for ``make_multimodal``.

    Raises:
        TypeError, ValueError: as ``make_multimodal``; make_norm's layer has no running statistics where the
            original has, or the other way round.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    norms = _norm_layers(module)
    exchanging = _picked(norms, where)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(()))
    # deepcopy asks the memo first: wherever a norm is referred to, its replacement comes instead.
    replacements: dict[int, Any] = {}
    names: dict[nn.Module, str] = {}
    for name, norm in norms.items():
        names.setdefault(norm, name)
    for norm, name in names.items():
        replacements[id(norm)] = _replacement(name, norm, make_norm, norm in exchanging, like)
    for norm in filter(_ends_in_act, names):
        _append_act(norm, replacements)
    return copy.deepcopy(module, replacements)


def _norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every norm layer at or below ``module``, under each of its names."""
    norms: dict[str, nn.Module] = {}
    shared: dict[str, str] = {}
    refused = []
    for name, layer in module.named_modules(remove_duplicate=False):
        if reason := _why_not(layer):
            refused.append(f"norm {name!r} {reason}")
        elif _kind(layer) is not None:
            norms[name] = layer
        elif _is_shared_norm(layer):
            shared[name] = type(layer).__name__
    if refused:
        raise ValueError("; ".join(refused))
    if not norms:
        kinds = ", ".join(sorted(set(shared.values())))
        found = f"; those that it has cannot exchange: {kinds}" if kinds else ""
        raise ValueError(f"module has no BatchNorm, SyncBatchNorm or InstanceNorm layer{found}")
    if shared:
        named = ", ".join(f"{name!r} ({kind})" for name, kind in shared.items())
        warnings.warn(
            f"norms without an exchange version stay shared between the modalities: {named}",
            UserWarning,
            stacklevel=4,
        )
    return norms


def _why_not(layer: nn.Module) -> str:
    """Why a layer that takes statistics of the batch cannot be converted, or ""."""
    if isinstance(layer, LazyModuleMixin) and layer.cls_to_become in _LAYERS:
        return "is lazy and has no channels yet: run the network once before"
    kind = _kind(layer)
    own = f"is a {type(layer).__name__}"
    if kind is not None:
        same = _ends_in_act(layer) or type(layer).forward is kind.forward
        return "" if same else f"{own}, whose forward is not that of nn.{kind.__name__}"
    keeps = any(getattr(layer, statistic, None) is not None for statistic in ("running_mean", "running_var"))
    if keeps and not _is_frozen(layer) and not isinstance(layer, ExchangeNorm):
        return f"{own}, whose batch statistics would mix the modalities: use torch.nn.BatchNorm2d instead"
    return ""


def _kind(layer: nn.Module) -> type[Any] | None:
    """Which of torch's norms the layer is. Ours are of these classes, too, and stay as they are."""
    if isinstance(layer, ExchangeNorm):
        return None
    return next((kind for kind in _LAYERS if isinstance(layer, kind)), None)


def _ends_in_act(layer: nn.Module) -> bool:
    """Whether the layer is timm's norm, drop and act in one, with timm's forward."""
    defining = next(c for c in type(layer).__mro__ if "forward" in vars(c))
    known = defining.__name__ in _NORM_ACTS and _kind(layer) is not None
    return known and all(isinstance(getattr(layer, part, None), nn.Module) for part in ("drop", "act"))


def _is_frozen(layer: nn.Module) -> bool:
    """Whether a norm that is not torch's has constants for its affine."""
    return "weight" in layer._buffers


def _is_shared_norm(layer: nn.Module) -> bool:
    """Whether the layer is a norm, of some other kind, with an affine that the modalities will share."""
    named = "norm" in type(layer).__name__.lower() and not isinstance(layer, ExchangeNorm)
    return named and isinstance(getattr(layer, "weight", None), Tensor)


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


def _replacement(name: str, norm: Any, make_norm: MakeNorm, exchanges: bool, like: Tensor) -> Any:
    """Call make_norm, and copy the norm's values; without any, take dtype and device from ``like``."""
    like = next((t for t in (norm.weight, norm.running_mean) if t is not None), like)
    with torch.device(like.device):
        layer: Any = make_norm(norm, exchanges, _fused_activation(norm) or "identity").to(like.dtype)
    layer.eps, layer.momentum = norm.eps, norm.momentum
    layer.track_running_stats = norm.track_running_stats
    if _fused_activation(norm) == "leaky_relu":
        layer.negative_slope = norm.act.negative_slope
    if isinstance(norm, nn.SyncBatchNorm):
        layer.process_group = norm.process_group or sync.default_group()
    own = (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))
    missing, unexpected = layer.load_state_dict(dict(own), strict=False)  # [C] into every modality
    wrong = [*unexpected, *(key for key in missing if key.startswith("running_"))]
    if wrong:
        raise ValueError(
            f"make_norm: its {type(layer).__name__} for norm {name!r} and the original differ in {wrong}"
        )
    for key, parameter in norm.named_parameters(recurse=False):
        getattr(layer, key).requires_grad_(parameter.requires_grad)
    layer.train(norm.training)
    return layer


def _fused_activation(norm: Any) -> str | None:
    """The activation that the operator applies in the place of the layer's own, or None."""
    if not _ends_in_act(norm):
        return "identity"
    return _FUSED.get(type(norm.act)) if type(norm.drop) is nn.Identity else None


def _append_act(norm: Any, replacements: dict[int, Any]) -> None:
    """Give the replacement of a norm that ends in ``drop`` and ``act`` both, and call them where not fused.

    By a hook: whatever class make_norm has chosen, the layer stays the one that its state is named after.
    """
    layer = replacements[id(norm)]
    if _fused_activation(norm) is not None:
        layer.drop, layer.act = nn.Identity(), nn.Identity()
        return
    layer.drop, layer.act = (copy.deepcopy(part, replacements) for part in (norm.drop, norm.act))
    layer.register_forward_hook(_drop_and_act)


def _drop_and_act(layer: Any, inputs: Any, y: Tensor) -> Any:
    return layer.act(layer.drop(y))
