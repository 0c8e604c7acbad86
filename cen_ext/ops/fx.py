"""Nodes of torch.fx graphs: its tracers record calls of the layers and functions, and do not enter them.

What they pass is a Proxy, and so is what is returned here for them, whatever the types say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def call_module(layer: nn.Module, x: Any, *args: Any) -> Tensor:
    """Record a call of a layer, as tracers themselves do for those of ``torch.nn``.

    Raises:
        TypeError: the layer is what is being traced, not a part of it.
    """
    if layer is x.tracer.root:
        raise TypeError(
            f"torch.fx records calls of {type(layer).__name__} and cannot trace it by itself: trace a module "
            "that contains it, such as nn.Sequential(layer)"
        )
    y: Tensor
    path = x.tracer.path_of_module(layer)
    if _has_hooks(layer):
        # They are being traced around this call, and must not run again where the node calls the layer.
        itself = x.tracer.create_proxy("get_attr", path, (), {})
        y = x.tracer.create_proxy("call_function", forward, (itself, x, *args), {})
    else:
        y = x.tracer.create_proxy("call_module", path, (x, *args), {})
    return y


def forward(layer: nn.Module, *args: Any) -> Tensor:
    """Call a layer without its hooks."""
    y: Tensor = layer.forward(*args)
    return y


def _has_hooks(layer: nn.Module) -> bool:
    own = layer._forward_pre_hooks or layer._forward_hooks
    return bool(own or nn_module._global_forward_pre_hooks or nn_module._global_forward_hooks)


def call_function(function: Callable[..., Any], x: Any, arguments: dict[str, Any]) -> Tensor:
    """Record a call of a function with all its arguments by name; x is a Proxy among them."""
    y: Tensor = x.tracer.create_proxy("call_function", function, (), arguments)
    return y
