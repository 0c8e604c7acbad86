"""Any network with norms, turned into one of several modalities, which exchanges channels."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from cen_ext.convert.example import check_example
from cen_ext.convert.inspection import (
    Found,
    ends_in_act,
    find_norms,
    norm_kind,
    own_class,
)
from cen_ext.convert.private import PrivateNorm, joined_class, make_private
from cen_ext.convert.report import (
    CONVERTED,
    PRIVATE,
    REFUSED,
    SHARED,
    UNKNOWN,
    ConversionReport,
    NormRow,
    listed,
)
from cen_ext.modules.base import ExchangeNorm
from cen_ext.modules.running import ExchangeBatchNorm2d, ExchangeInstanceNorm2d
from cen_ext.ops.norm_exchange import sync
from cen_ext.tables import is_sharded

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
# What the layers define, which a norm that becomes one of them, and its class, must not.
_RESERVED = {name for base in ExchangeNorm.__mro__ if "cen_ext" in base.__module__ for name in vars(base)}
_RESERVED |= vars(ExchangeBatchNorm2d(1, 1)).keys() - vars(nn.SyncBatchNorm(1)).keys()
_FUSED: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_FUSED_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # by nn.GELU's ``approximate``
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def make_multimodal(
    module: nn.Module,
    num_modalities: int,
    threshold: float = 0.02,
    where: Where | None = None,
    *,
    region: str = "own",
    criterion: str = "abs",
    order: str = "modality",
    shared: Collection[str] = (),
    example: Any = None,
    backend: str | None = None,
) -> nn.Module:
    """A copy of a single-modality network that takes M stacked modalities and exchanges their channels.

    BatchNorm1d/2d/3d, SyncBatchNorm and InstanceNorm1d/2d/3d at or below ``module`` become M private norms
    that exchange (Wang et al., NeurIPS 2020, section 3.3 and 3.4). LayerNorm, GroupNorm, RMSNorm and timm's
    relatives, norms of each row by itself, become M private ones that do not (``PrivateNorm``). All else is
    shared between the modalities and must treat the rows of a batch alike. Feed the network
    ``stack_modalities([x_0, ...])`` and split what it returns with ``unstack_modalities``. One that splits or
    joins the batch axis, or is split along it (microbatches, pipelining, ``torch.nn.DataParallel``), needs
    ``order="sample"`` in all three; one that folds windows into it needs ``"modality"``.

    The private norms begin as the original one: affine, running statistics and whether it tracks them,
    momentum, eps, device, dtype (float32 with half types where they exchange), training mode,
    ``requires_grad``, hooks, attributes, class where it is a class of one's own. An exchanging norm without
    affine gets ones and zeros that train, as the exchange reads the scale; without bias alone, zeros that do
    not train. A norm used at several places stays one layer, and a parameter that norms share stays one. A
    SyncBatchNorm stays synchronized where torch.distributed is initialized.

    timm's BatchNormAct2d and SyncBatchNormAct, norms that end in ``drop`` and ``act``, exchange, too. The
    operator applies torch's ReLU, ReLU6, LeakyReLU, SiLU, GELU, Hardswish and Identity itself; the layer's
    ``act`` is then an Identity. Any other activation, and any after a drop, follows the exchange as the
    module that it was.

    Any other layer that is called a norm, keeps running statistics or calls a function of batch norm is run
    on noise. If it mixes the rows of a batch, it is refused. If not, it stays shared: a frozen batch norm, a
    convolution that standardizes its weights, a norm of single rows of another make. One that cannot be run
    by itself is refused if it has running statistics or calls batch norm. UserWarnings name the norms that
    are private without exchange, those shared that train and those of which nothing is known;
    ``conversion_report`` lists all. What mixes rows and shows no sign of it (a minibatch standard deviation,
    attention over the batch) is found with ``example`` alone.

    Args:
        module: the network, left as it is.
        num_modalities: M >= 1.
        threshold, region, criterion: of the layers that exchange, as in ``norm_exchange``.
        where: which layers exchange: ``where(name, norm)`` is true; or the names of the norms or of modules
            that contain them; None for all of them. The others become private norms with threshold 0.
        order: of the rows, as in ``stack_modalities``.
        shared: names of layers, or of modules that contain them, that stay as they are, whatever they do.
        example: an input of the original network, ``[N, ...]``, or a tuple of its arguments. Copies of the
            new network are run on it and on noise, in training and in eval mode, to see that each modality's
            results depend on its own rows and private norms alone where nothing is exchanged.
        backend: of the layers that exchange, as in ``norm_exchange``.

    Raises:
        TypeError: module is no module, ``where`` is neither callable nor a collection of names, or ``shared``
            is no such collection.
        ValueError: there is no norm layer; a name in ``where`` or ``shared`` has none at or below it; norms
            that cannot be converted (all of them are named, with the reason); ``example`` shows that
            modalities are mixed; the rest as ``ExchangeNorm``.
    """

    options: dict[str, Any] = {"region": region, "criterion": criterion, "order": order, "backend": backend}
    ExchangeBatchNorm2d(1, num_modalities, threshold=threshold, **options)  # refuses bad arguments

    def make_norm(norm: Any, exchanges: bool, activation: str) -> ExchangeNorm:
        kind = norm_kind(norm)
        assert kind is not None
        return _LAYERS[kind](
            norm.num_features,
            num_modalities,
            threshold=threshold if exchanges else 0.0,
            activation=activation,
            track_running_stats=norm.running_mean is not None,
            **options,
        )

    converted = _replace(module, make_norm, where, shared, (num_modalities, order))
    if example is not None:
        check_example(converted, num_modalities, order, example)
    return converted


def replace_norms(module: nn.Module, make_norm: MakeNorm, where: Where | None = None) -> nn.Module:
    """A copy of a network in which ``make_norm`` makes the norms, which begin as the original's.

    This is ``make_multimodal`` with norms of one's own. Norms of single rows stay shared.

    Args:
        module: the network, left as it is.
        make_norm: called as ``make_norm(norm, exchanges, activation)`` for each norm layer that
            ``make_multimodal`` lets exchange: the original, whether ``where`` picks it, and the name of an
            activation of ``norm_exchange``, which the result must apply last. The result takes a stacked
            ``[M*N, C, *spatial]`` and loads a state dict of torch's norm, as ``ExchangeNorm`` does. Its
            device, dtype, training mode, ``eps``, ``momentum`` and ``negative_slope`` are set afterwards, and
            its parameters' ``requires_grad``.
        where: as for ``make_multimodal``.

    Raises:
        TypeError, ValueError: as ``make_multimodal``; make_norm's layer has no running statistics where the
            original has, or the other way round.
    """
    return _replace(module, make_norm, where, (), None)


def conversion_report(module: nn.Module, *, shared: Collection[str] = ()) -> ConversionReport:
    """What ``make_multimodal`` does with each norm of a network, without doing it.

    Args:
        module, shared: as for ``make_multimodal``.

    Returns:
        A row for every layer that is a norm, is called one or computes one; printed, a table.

    Raises:
        TypeError, ValueError: module is no module; what ``shared`` is or has is not as ``make_multimodal``
            takes it.
    """
    return _report(_norms(module, shared, privately=True))


def _norms(module: nn.Module, shared: Collection[str], privately: bool) -> list[Found]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(shared, str) or not _is_collection_of_names(shared):
        raise TypeError(f"shared must be a collection of module names, got {shared!r}")
    layers = dict(module.named_modules(remove_duplicate=False))
    return find_norms(module, _at_or_below(layers, shared, "shared: no layer"), privately, _RESERVED)


def _report(norms: Iterable[Found]) -> ConversionReport:
    return ConversionReport(
        tuple(
            NormRow(name, type(found.layer).__name__, found.outcome, found.reason)
            for found in norms
            for name in found.names
        )
    )


def _replace(
    module: nn.Module,
    make_norm: MakeNorm,
    where: Where | None,
    shared: Collection[str],
    private: tuple[int, str] | None,
) -> nn.Module:
    """``make_multimodal`` and ``replace_norms``.

    Args:
        private: how many modalities the norms without exchange are of, and the order of their rows; None
            lets these be shared.
    """
    found = _norms(module, shared, privately=private is not None)
    _refuse_and_warn(found, private)
    _check_can_be_copied(module)
    converted = {norm.layer: norm for norm in found if norm.outcome == CONVERTED}
    exchanging = _picked({name: norm.layer for norm in converted.values() for name in norm.names}, where)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(()))
    # deepcopy asks the memo first: wherever a norm is referred to, its replacement comes instead.
    replacements: dict[int, Any] = {}
    for layer, norm in converted.items():
        replacements[id(layer)] = _replacement(norm.names[0], layer, make_norm, layer in exchanging, like)
    _tie(converted, replacements)
    for layer in converted:
        _carry_over(layer, replacements)
    result = copy.deepcopy(module, replacements)
    if private is not None:
        names = {norm.names[0] for norm in found if norm.outcome == PRIVATE}
        tables: dict[nn.Parameter, nn.Parameter] = {}
        for layer in [layer for name, layer in result.named_modules() if name in names]:
            make_private(layer, *private, tables)
        _disable_fast_path(result)
    return result


def _refuse_and_warn(norms: list[Found], private_rows: tuple[int, str] | None) -> None:
    """Raise ValueError for norms that are refused, all at once, and warn of those that do not exchange."""
    report = _report(norms)
    if refused := report.of(REFUSED):
        raise ValueError("; ".join(f"norm {row.name!r} {row.reason}" for row in refused))
    converted, private, shared = (report.of(outcome) for outcome in (CONVERTED, PRIVATE, SHARED))
    if not converted and not private:
        kinds = ", ".join(sorted({row.kind for row in shared}))
        found = f"; those that it has cannot exchange: {kinds}" if kinds else ""
        raise ValueError(f"module has no BatchNorm, SyncBatchNorm or InstanceNorm layer{found}")
    layers = {name: norm.layer for norm in norms for name in norm.names}
    trains = tuple(row for row in shared if any(p.requires_grad for p in layers[row.name].parameters()))
    unasked = tuple(row for row in trains if row.reason != "is listed in shared")
    messages = []
    if private:
        none = "" if converted else ", and the network has none that does"
        folded = ""
        if private_rows is not None and private_rows[1] == "sample":
            folded = (
                "; with order='sample' they must not get windows folded into the batch axis (give example)"
            )
        messages.append(
            f"norms without an exchange version become private copies that do not exchange{none}: "
            f"{listed(private)}{folded}"
        )
    if unasked:
        messages.append(
            f"norms without an exchange version stay shared between the modalities: {listed(unasked)}"
        )
    if unknown := report.of(UNKNOWN):
        messages.append(
            "norms stay shared between the modalities, and whether they mix them is unknown (give example to "
            f"find out): {listed(unknown)}"
        )
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=4)


def _check_can_be_copied(module: nn.Module) -> None:
    """Raise ValueError for what deepcopy refuses, naming it."""
    for name, layer in module.named_modules():
        if any(isinstance(hook, WeightNorm) for hook in layer._forward_pre_hooks.values()):
            raise ValueError(
                f"{name!r} cannot be copied with torch.nn.utils.weight_norm: use "
                "torch.nn.utils.parametrizations.weight_norm, or call remove_weight_norm before"
            )
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name!r} is sharded (DTensor): convert before fully_shard or distribute_module"
            )


def _picked(norms: dict[str, nn.Module], where: Where | None) -> set[nn.Module]:
    """The norms that exchange."""
    if where is None:
        return set(norms.values())
    if callable(where):
        return {norm for name, norm in norms.items() if where(name, norm)}
    if isinstance(where, str) or not _is_collection_of_names(where):
        raise TypeError(f"where must be a callable or a collection of module names, got {where!r}")
    return _at_or_below(norms, where, "where: no norm layer")


def _is_collection_of_names(names: object) -> bool:
    return isinstance(names, Collection) and all(isinstance(name, str) for name in names)


def _at_or_below(layers: dict[str, nn.Module], names: Collection[str], none: str) -> set[nn.Module]:
    """The layers of these names and those that they contain; ``none`` begins the refusal of other names."""
    picked = set()
    for wanted in names:
        below = {layer for name, layer in layers.items() if name == wanted or name.startswith(f"{wanted}.")}
        if not below:
            close = ", ".join(map(repr, difflib.get_close_matches(wanted, layers))) or "none"
            raise ValueError(f"{none} at or below {wanted!r}; close names: {close}")
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
    parameters = dict(layer.named_parameters(recurse=False))
    for key, parameter in norm.named_parameters(recurse=False):
        parameters[key].requires_grad_(parameter.requires_grad)
    if norm.bias is None and norm.weight is not None and "bias" in parameters:
        parameters["bias"].requires_grad_(False)
    if (cls := own_class(norm)) is not None and isinstance(layer, ExchangeNorm):
        layer.__class__ = joined_class(type(layer), cls)
    layer.train(norm.training)
    return layer


def _fused_activation(norm: Any) -> str | None:
    """The activation that the operator applies in the place of the layer's own, or None."""
    if not ends_in_act(norm):
        return "identity"
    if type(norm.drop) is not nn.Identity:
        return None
    if type(norm.act) is nn.GELU:
        return _FUSED_GELU.get(norm.act.approximate)
    return _FUSED.get(type(norm.act))


def _tie(converted: Iterable[Any], replacements: dict[int, Any]) -> None:
    """Let the replacements of norms that share parameters or buffers share theirs."""
    first: dict[Tensor, Tensor] = {}
    for norm in converted:
        layer = replacements[id(norm)]
        for kind in ("_parameters", "_buffers"):
            ours, theirs = getattr(layer, kind), getattr(norm, kind)
            for key in ours.keys() & theirs.keys():
                if theirs[key] is not None:
                    ours[key] = first.setdefault(theirs[key], ours[key])


def _carry_over(norm: Any, replacements: dict[int, Any]) -> None:
    """Give the replacement of a norm what else it has: drop and act, hooks, attributes, modules.

    Drop and act, where they are not fused, are called by a hook: whatever class make_norm has chosen, the
    layer stays the one that its state is named after.
    """
    layer = replacements[id(norm)]
    left = vars(norm).keys() - vars(nn.BatchNorm2d(1)).keys() - vars(layer).keys()
    for name in left - {"process_group"}:
        layer.__dict__[name] = copy.deepcopy(vars(norm)[name], replacements)
    for name, child in norm.named_children():
        layer.add_module(name, copy.deepcopy(child, replacements))
    if ends_in_act(norm):
        if _fused_activation(norm) is not None:
            layer.drop, layer.act = nn.Identity(), nn.Identity()
        else:
            layer.register_forward_hook(_drop_and_act)
    for name in _HOOKS:
        getattr(layer, name).update(copy.deepcopy(vars(norm)[name], replacements))
    layer._is_full_backward_hook = norm._is_full_backward_hook


def _drop_and_act(layer: Any, inputs: Any, y: Tensor) -> Any:
    return layer.act(layer.drop(y))


def _disable_fast_path(module: nn.Module) -> None:
    """Keep torch's transformer layers from handing the tables of private norms to one kernel."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and isinstance(layer.norm1, PrivateNorm):
            layer.activation_relu_or_gelu = 0  # by which it tells that it has no such kernel
