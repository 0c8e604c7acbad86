"""Autograd formula of the ops ``pixel_shift``, which ``functional`` describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward pass needs: no tensor."""
    _, base, *ctx.rest = inputs
    ctx.has_base = base is not None


def gradient(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Autograd formula of an op ``pixel_shift``, which is the op itself."""

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        num_modalities, group, adjoint = ctx.rest
        dx = op(dy, None, num_modalities, group, not adjoint)
        return dx, dy if ctx.has_base else None, None, None, None

    return backward
