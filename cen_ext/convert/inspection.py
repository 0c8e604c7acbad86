"""Every norm of a network, and what can become of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.jit import ScriptModule
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from cen_ext.convert.code import calls_batch_norm
from cen_ext.convert.probing import mixes_rows, normalized_dim
from cen_ext.convert.report import CONVERTED, KEPT, PRIVATE, REFUSED, SHARED, UNKNOWN
from cen_ext.tables import PrivateTables, is_sharded

_KINDS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_ROW_KINDS = (nn.LayerNorm, nn.GroupNorm)
# The attributes that torch gives them.
_TORCHS: dict[type[Any], Collection[str]] = {kind: vars(kind(1)).keys() for kind in (*_KINDS, nn.LayerNorm)}
_TORCHS[nn.GroupNorm] = vars(nn.GroupNorm(1, 1)).keys()
# timm's layers are known by name: the library needs torch alone. Those of a norm, ``drop`` and ``act``:
_NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct")
_OF_SINGLE_ROWS = (*_ROW_KINDS, nn.RMSNorm)
_OF_SINGLE_ROWS_BY_NAME = re.compile("(Rms|Simple)Norm(Act)?(2d)?(Fp32)?")
_TABLES = frozenset({"weight", "bias"})
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# What every class defines, or may define without changing what its layers do.
_HARMLESS = {"__annotations__", "__doc__", "__init__", "__module__", "extra_repr"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__"}  # of Python 3.13

Reserved = Mapping[type[Any], Collection[str]]  # by kind of norm


@dataclass(frozen=True)
class Found:
    """A norm of a network: the layer, all its names, and what becomes of it."""

    layer: nn.Module
    names: tuple[str, ...]
    outcome: str
    reason: str


def find_norms(
    module: nn.Module, shared: Collection[nn.Module], privately: bool, reserved: Reserved
) -> list[Found]:
    """Every layer at or below ``module`` that is a norm, looks like one, or computes one.

    Args:
        shared: layers that stay as they are, whatever they do.
        privately: whether norms of single rows that do not exchange become private copies, not shared.
        reserved: names that norms of a kind, and their classes, must not define, as the exchanging norms do.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        names.setdefault(layer, []).append(name)
    rows_first = not any(getattr(layer, "batch_first", None) is False for layer in names)
    seen = _Network(rows_first, privately, reserved, {}, {})
    norms = []
    for layer, own_names in names.items():
        if verdict := seen.verdict(layer, layer in shared):
            norms.append(Found(layer, tuple(own_names), *verdict))
    return _with_ties(module, norms)


def norm_kind(layer: nn.Module) -> type[Any] | None:
    """Which of torch's norms that can exchange the layer is. Ours are of these classes, too: None."""
    if isinstance(layer, PrivateTables):
        return None
    return next((kind for kind in (*_KINDS, *_ROW_KINDS) if isinstance(layer, kind)), None)


def is_of_single_rows(layer: nn.Module) -> bool:
    """Whether the layer is a LayerNorm, GroupNorm, RMSNorm or one of timm's relatives."""
    named = _OF_SINGLE_ROWS_BY_NAME.fullmatch(_forward_class(layer).__name__)
    return isinstance(layer, _OF_SINGLE_ROWS) or named is not None


def channel_dim(norm: Any) -> int | None:
    """The dimension of the channels, 1 or -1, of a LayerNorm or GroupNorm that computes what torch's does.

    None if it computes anything else, or has statistics over several dimensions of its input.
    """
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        return None
    if _has_torchs_forward(norm):
        return -1 if isinstance(norm, nn.LayerNorm) else 1
    if len(inspect.signature(type(norm).forward).parameters) != 2 or _is_container(norm):  # self and x
        return None
    return normalized_dim(norm, ("drop", "act") if ends_in_act(norm) else ())


def ends_in_act(layer: nn.Module) -> bool:
    """Whether the layer is a norm, drop and act in one, as timm has them."""
    kind = norm_kind(layer)
    known = kind in _ROW_KINDS and not _has_torchs_forward(layer)
    if kind in _KINDS:
        known = _forward_class(layer).__name__ in _NORM_ACTS
    return known and all(isinstance(getattr(layer, part, None), nn.Module) for part in ("drop", "act"))


def own_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class of a norm, if it is not torch's, nor timm's of batch norms with drop and act."""
    kind = norm_kind(layer)
    plain = _forward_class(layer) if kind in _KINDS and ends_in_act(layer) else kind
    return None if type(layer) is plain else type(layer)


@dataclass(frozen=True)
class _Network:
    """What verdicts on the layers of a network depend on besides them."""

    rows_first: bool  # for all one knows, dimension 0 of what its layers take is the batch axis
    privately: bool
    reserved: Reserved
    calls: dict[type[Any], bool]  # of classes seen so far
    mixes: dict[type[Any], bool | None]

    def verdict(self, layer: nn.Module, shared: bool) -> tuple[str, str] | None:
        """The outcome and its reason, or None for what is no norm."""
        if isinstance(layer, PrivateTables):
            return KEPT, "is a layer of cen_ext"
        if isinstance(layer, LazyModuleMixin) and getattr(layer, "cls_to_become", None) in _KINDS:
            return REFUSED, "is lazy and has no channels yet: run the network once before"
        of_single_rows = is_of_single_rows(layer)
        kind = None if of_single_rows else norm_kind(layer)
        functional = kind is None and not of_single_rows and self._calls_batch_norm(layer)
        if kind is None and not of_single_rows and not functional and not _looks_like_a_norm(layer):
            return None
        if shared:
            return SHARED, "is listed in shared"
        if any(map(is_sharded, layer.parameters(recurse=False))):
            return REFUSED, "is sharded (DTensor): convert before fully_shard or distribute_module"
        if kind is not None:
            return _verdict_on_kind(layer, kind, self.reserved[kind])
        if of_single_rows and "forward" not in vars(layer):
            return self._verdict_on_single_rows(layer)
        return _verdict_on_unknown(layer, functional)

    def _calls_batch_norm(self, layer: nn.Module) -> bool:
        kind = type(layer)
        if "forward" in vars(layer) or isinstance(layer, GraphModule | ScriptModule):
            return calls_batch_norm(layer)
        if kind.__module__.startswith("torch."):
            return False
        if kind not in self.calls:
            self.calls[kind] = calls_batch_norm(layer)
        return self.calls[kind]

    def _verdict_on_single_rows(self, layer: nn.Module) -> tuple[str, str]:
        """On a LayerNorm, GroupNorm, RMSNorm or one of timm's relatives."""
        if not _has_torchs_forward(layer):
            if type(layer) not in self.mixes:
                self.mixes[type(layer)] = mixes_rows(layer)
            if (mixes := self.mixes[type(layer)]) is not False:
                unknown = "has a forward of its own, and whether that mixes the modalities cannot be told"
                return (REFUSED, _mixing(layer)) if mixes else (UNKNOWN, unknown)
        own = _own_tensors(layer).keys()
        if parametrize.is_parametrized(layer) or not own <= _TABLES:
            return SHARED, "is parametrized; it treats each row by itself"
        if not own:
            return SHARED, "has no parameters, and treats each row by itself"
        if not self.rows_first:
            return SHARED, "the network has layers with batch_first=False; it treats each row by itself"
        kind = norm_kind(layer)
        if kind is None:
            reason = "has no exchange version"
        elif channel_dim(layer) is None:
            reason = (
                f"computes another norm than nn.{kind.__name__} of the channels, without exchange version"
            )
        elif clash := _clash(layer, kind, self.reserved[kind]):
            reason = f"{clash[0]}: no exchange version keeps that"
        else:
            return CONVERTED, f"is a {kind.__name__}"
        return PRIVATE if self.privately else SHARED, f"treats each row by itself and {reason}"


def _verdict_on_kind(layer: nn.Module, kind: type[Any], reserved: Collection[str]) -> tuple[str, str]:
    """On one of torch's batch and instance norms, or what derives from them."""
    own = f"is a {type(layer).__name__}"
    if parametrize.is_parametrized(layer):
        return REFUSED, "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations before"
    if strange := sorted(_own_tensors(layer).keys() - {*_TABLES, *_STATISTICS}):
        return REFUSED, f"{own} with {', '.join(strange)}, which the private norms would lose"
    if "forward" in vars(layer) or not (ends_in_act(layer) or type(layer).forward is kind.forward):
        if mixes_rows(layer) is False:
            return SHARED, "has a forward of its own, which treats each row by itself"
        return REFUSED, f"{own}, whose forward is not that of nn.{kind.__name__}"
    if clash := _clash(layer, kind, reserved):
        return REFUSED, "".join(clash)
    return CONVERTED, f"is a {kind.__name__}"


def _clash(layer: nn.Module, kind: type[Any], reserved: Collection[str]) -> tuple[str, str] | None:
    """What an exchanging layer of this kind would take from the norm, and the remedy; None for nothing."""
    own = f"is a {type(layer).__name__}"
    own_attributes = vars(layer).keys() - _TORCHS[kind]
    if clashing := sorted(own_attributes.intersection(reserved)):
        return f"{own} with {', '.join(clashing)}, which the private norms have, too", ": rename these"
    if cls := own_class(layer):
        added = {name for base in _bases_before(cls, kind) for name in vars(base)} - _HARMLESS
        if kind in _ROW_KINDS:
            added -= {"forward"}  # which computes the same
        if changed := sorted(added.intersection(reserved)):
            return f"{own}, whose {', '.join(changed)} would be lost", f": use nn.{kind.__name__}"
    return None


def _verdict_on_unknown(layer: nn.Module, functional: bool) -> tuple[str, str]:
    """On what is none of torch's norms."""
    mixes = None if _is_container(layer) else mixes_rows(layer)
    if mixes is False:
        if not list(layer.parameters(recurse=False)) and any(True for _ in layer.buffers(recurse=False)):
            return SHARED, "has constants for affine and statistics"
        return SHARED, "treats each row by itself" + (": it normalizes its weights" if functional else "")
    statistics = any(getattr(layer, name, None) is not None for name in _STATISTICS[:2])
    if mixes or statistics:
        return REFUSED, _mixing(layer)
    if functional:
        return REFUSED, (
            f"is a {type(layer).__name__}, whose forward calls a function of batch or instance norm, which "
            "would mix the modalities: use a layer of torch.nn, or list it in shared if it does not"
        )
    return UNKNOWN, "cannot be run by itself to see whether it mixes the modalities"


def _mixing(layer: nn.Module) -> str:
    kind = type(layer).__name__
    return f"is a {kind}, whose batch statistics would mix the modalities: use torch.nn.BatchNorm2d instead"


def _forward_class(layer: nn.Module) -> type[Any]:
    return next(base for base in type(layer).__mro__ if "forward" in vars(base))


def _bases_before(cls: type[Any], kind: type[Any]) -> list[type[Any]]:
    """The classes that a class adds to one that it derives from, timm's left out."""
    return [base for base in cls.__mro__ if not issubclass(kind, base) and base.__name__ not in _NORM_ACTS]


def _has_torchs_forward(layer: nn.Module) -> bool:
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in _OF_SINGLE_ROWS)


def _looks_like_a_norm(layer: nn.Module) -> bool:
    """Whether the layer keeps running statistics, or is called a norm and contains no other layers."""
    if any(isinstance(getattr(layer, name, None), Tensor) for name in _STATISTICS[:2]):
        return True
    name = type(layer).__name__
    called = "norm" in name.lower() or "ABN" in name or "Abn" in name
    return called and not _is_container(layer) and not type(layer).__module__.startswith("torch.nn.utils")


def _is_container(layer: nn.Module) -> bool:
    """Whether modules other than an activation and a dropout are below the layer."""
    return any(name not in ("act", "drop") for name, _ in layer.named_children())


def _with_ties(module: nn.Module, norms: list[Found]) -> list[Found]:
    """Refuse norms that are to get tables of their own but share a tensor with a layer that is not."""
    becomes = {found.layer: found.outcome for found in norms if found.outcome in (CONVERTED, PRIVATE)}
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, layer in module.named_modules():
        for tensor in _own_tensors(layer).values():
            holders.setdefault(id(tensor), []).append((name, layer))

    def tied(layer: nn.Module) -> str | None:
        others = (other for tensor in _own_tensors(layer).values() for other in holders[id(tensor)])
        return next((name for name, other in others if becomes.get(other) != becomes[layer]), None)

    for index, found in enumerate(norms):
        if found.layer in becomes and (other := tied(found.layer)) is not None:
            reason = f"shares a tensor with {other!r}, which stays as it is: untie them before"
            norms[index] = replace(found, outcome=REFUSED, reason=reason)
    return norms


def _own_tensors(layer: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers by their names in the layer."""
    own = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}
