"""The precision that networks compute in: autocast, loss scaling, TF32."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Outputs = TypeVar("Outputs", bound=NamedTuple)

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context that a network's forward pass runs in; the loss belongs outside.

    Args:
        precision: ``"fp32"``, which changes nothing, ``"bf16"`` or ``"fp16"``.
        device: where the network is.
    """
    dtype = DTYPES[precision]
    on = dtype is not None
    # No cache: no weight is used twice in a pass, and in a recorded graph a cached copy would go stale.
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=on, cache_enabled=False)


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses so that small gradients do not vanish in fp16; does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def at_least_float32(outputs: Outputs) -> Outputs:
    """The tensors of a network's output in float32, or as they are if of float64."""
    return type(outputs)._make(tree_map_only(Tensor, _at_least_float32, tuple(outputs)))


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def set_tf32(enabled: bool) -> None:
    """Whether GPUs round the inputs of float32 convolutions and matrix products to TF32."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled
