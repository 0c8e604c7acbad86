"""Layers that take a norm's place: its values, hooks, attributes and activation, and what it is tied to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cen_ext.convert.inspection import ends_in_act, own_class
from cen_ext.convert.joining import joined_class
from cen_ext.modules.base import ExchangeNorm
from cen_ext.ops.norm_exchange import sync
from cen_ext.tables import PrivateTables

# (the original norm, whether it exchanges, the activation to fuse) -> the norm of M modalities
MakeNorm = Callable[[Any, bool, str], nn.Module]

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


def replacement(name: str, norm: Any, make_norm: MakeNorm, exchanges: bool, like: Tensor) -> Any:
    """Call make_norm, and copy the norm's values; without any, take dtype and device from ``like``."""
    like = next((t for t in (norm.weight, getattr(norm, "running_mean", None)) if t is not None), like)
    with torch.device(like.device):
        layer: Any = make_norm(norm, exchanges, _fused_activation(norm) or "identity").to(like.dtype)
    layer.eps = norm.eps
    if hasattr(norm, "track_running_stats"):
        layer.momentum, layer.track_running_stats = norm.momentum, norm.track_running_stats
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


def tie(converted: Iterable[Any], replacements: dict[int, Any]) -> None:
    """Let the replacements of norms that share parameters or buffers share theirs."""
    first: dict[Tensor, Tensor] = {}
    for norm in converted:
        layer = replacements[id(norm)]
        for kind in ("_parameters", "_buffers"):
            ours, theirs = getattr(layer, kind), getattr(norm, kind)
            for key in ours.keys() & theirs.keys():
                if theirs[key] is not None:
                    ours[key] = first.setdefault(theirs[key], ours[key])


def carry_over(norm: Any, replacements: dict[int, Any]) -> None:
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


def disable_fast_path(module: nn.Module) -> None:
    """Keep torch's transformers from handing the tables of private norms to one kernel, and padding to it."""
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and _has_tables(layer.norm1, layer.norm2):
            layer.activation_relu_or_gelu = 0  # by which it tells that it has no such kernel
        elif isinstance(layer, nn.TransformerEncoder):
            norms = (norm for part in layer.layers for norm in (part.norm1, part.norm2))
            layer.use_nested_tensor = layer.use_nested_tensor and not _has_tables(*norms)


def _has_tables(*norms: Any) -> bool:
    return any(isinstance(norm, PrivateTables) for norm in norms)
