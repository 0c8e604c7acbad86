"""The gradient that is registered for an op ``max_pool_same``; ``functional`` describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what the gradient that is registered for an op needs."""
    _, ctx.size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def gradient(backward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, None]]:
    """The gradient that is registered for an op."""

    def run(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
        return None if dy is None else backward(dy, *ctx.saved_tensors, ctx.size), None

    return run


def refuse_second_gradient(ctx: Any, *_: Tensor) -> None:
    """Refuse; registered as the gradient of the backward pass."""
    raise RuntimeError(
        "max_pool_same cannot be differentiated twice by the compiled backends; use backend='reference'"
    )
