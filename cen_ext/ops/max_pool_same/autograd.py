"""Autograd formula of the ops ``max_pool_same``, which ``functional`` describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cen_ext.ops.dispatch import REMEDY


def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    """Save the winners and the window size for the backward pass."""
    _, ctx.size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def gradient(backward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, None]]:
    """Autograd formula of an op, given its op ``max_pool_same_backward``."""

    def run(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
        return None if dy is None else backward(dy, *ctx.saved_tensors, ctx.size), None

    return run


def refuse_second_gradient(ctx: Any, *_: Tensor) -> None:
    """Raise RuntimeError; registered as the autograd formula of the backward op."""
    raise RuntimeError(f"max_pool_same cannot be differentiated twice by the compiled backends; use {REMEDY}")
