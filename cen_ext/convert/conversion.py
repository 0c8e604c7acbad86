"""Any network with norms, turned into one of several modalities, which exchanges channels."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm

from cen_ext.convert.example import check_example
from cen_ext.convert.inspection import Found, channel_dim, find_norms, is_of_single_rows, norm_kind
from cen_ext.convert.private import make_private
from cen_ext.convert.replacing import MakeNorm, carry_over, disable_fast_path, replacement, tie
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
from cen_ext.modules.base import ExchangeNorm, Mask
from cen_ext.modules.rows import ExchangeGroupNorm, ExchangeLayerNorm
from cen_ext.modules.running import ExchangeBatchNorm2d, ExchangeInstanceNorm2d
from cen_ext.modules.thresholds import median_threshold, parse_median
from cen_ext.tables import is_sharded

Where = Callable[[str, nn.Module], bool] | Collection[str]

_LAYERS: dict[type[Any], type[ExchangeNorm]] = {
    nn.BatchNorm1d: ExchangeBatchNorm2d,
    nn.BatchNorm2d: ExchangeBatchNorm2d,
    nn.BatchNorm3d: ExchangeBatchNorm2d,
    nn.SyncBatchNorm: ExchangeBatchNorm2d,
    nn.InstanceNorm1d: ExchangeInstanceNorm2d,
    nn.InstanceNorm2d: ExchangeInstanceNorm2d,
    nn.InstanceNorm3d: ExchangeInstanceNorm2d,
    nn.LayerNorm: ExchangeLayerNorm,
    nn.GroupNorm: ExchangeGroupNorm,
}


def _reserved(ours: nn.Module, theirs: nn.Module) -> set[str]:
    """What a layer and its classes define, which a norm that becomes one, and its class, must not."""
    bases = (base for base in type(ours).__mro__ if "cen_ext" in base.__module__)
    return {name for base in bases for name in vars(base)} | (vars(ours).keys() - vars(theirs).keys())


_RESERVED = {kind: _reserved(ExchangeBatchNorm2d(1, 1), nn.SyncBatchNorm(1)) for kind in _LAYERS}
_RESERVED[nn.LayerNorm] = _reserved(ExchangeLayerNorm(1, 1), nn.LayerNorm(1))
_RESERVED[nn.GroupNorm] = _reserved(ExchangeGroupNorm(1, 1, 1), nn.GroupNorm(1, 1))


def make_multimodal(
    module: nn.Module,
    num_modalities: int,
    threshold: float | str | None = None,
    where: Where | None = None,
    *,
    region: str = "own",
    criterion: str = "abs",
    mask: Mask | None = None,
    order: str = "modality",
    shared: Collection[str] = (),
    example: Any = None,
    backend: str | None = None,
) -> nn.Module:
    """A copy of a single-modality network that takes M stacked modalities and exchanges their channels.

    BatchNorm1d/2d/3d, SyncBatchNorm, InstanceNorm1d/2d/3d, LayerNorm of the channels and GroupNorm at or
    below ``module`` become M private norms that exchange (Wang et al., NeurIPS 2020, section 3.3 and 3.4),
    wherever they are: the paper has batch and instance norms alone, and ``where`` can keep to those of a
    network that has others, too. LayerNorm of several dimensions, RMSNorm and timm's relatives, norms of
    each row by itself, become M private ones that do not exchange (``PrivateNorm``). All else is shared
    between the modalities and must treat the rows of a batch alike. Feed the network
    ``stack_modalities([x_0, ...])`` and split what it returns with ``unstack_modalities``. One that splits or
    joins the batch axis, or is split along it (microbatches, pipelining, ``torch.nn.DataParallel``), needs
    ``order="sample"`` in all three; one that folds windows into it needs ``"modality"``.

    The private norms begin as the original one: affine, running statistics and whether it tracks them,
    momentum, eps, device, dtype (float32 with half types where they exchange), training mode,
    ``requires_grad``, hooks, attributes, class where it is a class of one's own. An exchanging norm without
    affine gets ones and zeros that train, as the exchange reads the scale; without bias alone, zeros that do
    not train. A norm used at several places stays one layer, and a parameter that norms share stays one. A
    SyncBatchNorm stays synchronized where torch.distributed is initialized.

    timm's BatchNormAct2d, GroupNormAct and the like, norms that end in ``drop`` and ``act``, exchange, too.
    The operator applies torch's ReLU, ReLU6, LeakyReLU, SiLU, GELU, Hardswish and Identity itself; the
    layer's ``act`` is then an Identity. Any other activation, and any after a drop, follows the exchange as
    the module that it was. A LayerNorm or GroupNorm with a forward of its own (timm's, LayerNorm2d) is run on
    noise and exchanges if it computes what torch's does, over the last dimension or over the second one.

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
        threshold: of the layers that exchange, as in ``norm_exchange``; None for 0.02, or for none with mask.
            ``"0.05*median"`` gives each layer that factor of the median of the original norm's |scales|, as a
            number, its ``threshold``. A state dict does not hold it: convert again from the same weights, or
            set it.
        region, criterion: of the same.
        mask: in place of these three, a function of the scales, as in ``ExchangeNorm``, for the layers that
            exchange; each gets a copy of its own. A ``replaced`` or ``lender`` is given to the layers.
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
            modalities are mixed; a median that is 0, or asked for on the meta device; the rest as
            ``ExchangeNorm``.
    """

    if threshold is None:
        threshold = 0.02 if mask is None else 0.0
    options: dict[str, Any] = {"region": region, "criterion": criterion, "order": order, "backend": backend}
    at_ones = parse_median(threshold) if isinstance(threshold, str) else threshold
    ExchangeBatchNorm2d(1, num_modalities, threshold=at_ones, mask=mask, **options)  # refuses bad arguments
    made: list[ExchangeNorm] = []

    def make_norm(norm: Any, exchanges: bool, activation: str) -> ExchangeNorm:
        layer, channels = layer_for(norm)
        own = dict(options, threshold=at_ones, mask=copy.deepcopy(mask)) if exchanges else options
        if hasattr(norm, "running_mean"):
            own = dict(own, track_running_stats=norm.running_mean is not None)
        new = layer(channels, num_modalities, activation=activation, **own)
        if exchanges:
            made.append(new)
        return new

    converted = _replace(module, make_norm, where, shared, (num_modalities, order))
    if isinstance(threshold, str):
        _set_thresholds(converted, made, at_ones)
    if example is not None:
        check_example(converted, num_modalities, order, example)
    return converted


def _set_thresholds(converted: nn.Module, exchanging: Collection[ExchangeNorm], factor: float) -> None:
    """Set the layers' thresholds to a factor of the median of their scales."""
    names = {layer: name for name, layer in converted.named_modules()}
    for layer in exchanging:
        try:
            layer.threshold = median_threshold(factor, layer.weight)
        except ValueError as error:
            raise ValueError(
                f"threshold={factor:g}*median: norm {names[layer]!r} {error}: give a number"
            ) from None


def replace_norms(module: nn.Module, make_norm: MakeNorm, where: Where | None = None) -> nn.Module:
    """A copy of a network in which ``make_norm`` makes the norms, which begin as the original's.

    This is ``make_multimodal`` with norms of one's own. Norms that do not exchange there stay shared.

    Args:
        module: the network, left as it is.
        make_norm: called as ``make_norm(norm, exchanges, activation)`` for each norm layer that
            ``make_multimodal`` lets exchange: the original, whether ``where`` picks it, and the name of an
            activation of ``norm_exchange``, which the result must apply last. The result takes what the norm
            does, stacked, and loads a state dict of torch's norm, as what ``layer_for`` returns does. Its
            device, dtype, training mode, ``eps``, ``momentum`` and ``negative_slope`` are set afterwards, and
            its parameters' ``requires_grad``.
        where: as for ``make_multimodal``.

    Raises:
        TypeError, ValueError: as ``make_multimodal``; make_norm's layer has no running statistics where the
            original has, or the other way round.
    """
    return _replace(module, make_norm, where, (), None)


def layer_for(norm: Any) -> tuple[Callable[..., ExchangeNorm], int]:
    """What makes the exchanging layer for a norm of torch's, and the norm's channels.

    Returns:
        A class or function, called as ``layer(channels, num_modalities, **options)`` with further arguments
        of ``ExchangeNorm``; and C.

    Raises:
        KeyError: it is no norm that ``make_multimodal`` lets exchange.
    """
    kind = norm_kind(norm)
    layer = _LAYERS[kind]  # type: ignore[index]  # None is no key either
    if kind is nn.LayerNorm:
        last = channel_dim(norm)
        return partial(layer, bias=norm.bias is not None, channel_dim=last), norm.normalized_shape[0]
    if kind is nn.GroupNorm:
        return partial(layer, norm.num_groups, bias=norm.bias is not None), norm.num_channels
    return layer, norm.num_features


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
        replacements[id(layer)] = replacement(norm.names[0], layer, make_norm, layer in exchanging, like)
    tie(converted, replacements)
    for layer in converted:
        carry_over(layer, replacements)
    result = copy.deepcopy(module, replacements)
    if private is not None:
        names = {norm.names[0] for norm in found if norm.outcome == PRIVATE}
        tables: dict[nn.Parameter, nn.Parameter] = {}
        for layer in [layer for name, layer in result.named_modules() if name in names]:
            make_private(layer, *private, tables)
        disable_fast_path(result)
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
        raise ValueError(f"module has no BatchNorm, InstanceNorm, LayerNorm or GroupNorm layer{found}")
    layers = {name: norm.layer for norm in norms for name in norm.names}
    trains = tuple(row for row in shared if any(p.requires_grad for p in layers[row.name].parameters()))
    unasked = tuple(row for row in trains if row.reason != "is listed in shared")
    messages = []
    if private:
        none = "" if converted else ", and the network has none that does"
        messages.append(
            f"norms without an exchange version become private copies that do not exchange{none}: "
            f"{listed(private)}"
        )
    by_row = tuple(row for row in (*private, *converted) if is_of_single_rows(layers[row.name]))
    if by_row and private_rows is not None and private_rows[1] == "sample":
        messages.append(
            "norms of each row by itself must not get windows folded into the batch axis with order='sample' "
            f"(give example to find out): {listed(by_row)}"
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
