"""Autograd formula of the ops ``norm_exchange``, by way of their ops ``norm_exchange_backward``.

    norm_exchange(x, weight, bias, mean?, var?, residual?, *options, route?) -> (y, mean, var)
    norm_exchange_backward(dy, x, weight, bias, mean, var, residual?, batch_statistics, *options, route?)
        -> (dx, dweight, dbias, dresidual)

The returned mean and var are those of x, or empty if statistics were given; dresidual is empty without a
residual. The backward op recomputes the activation's argument, so only inputs and statistics are saved.
A missing route is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from cen_ext.ops.dispatch import REMEDY
from cen_ext.ops.norm_exchange.options import Options


def split(arguments: Sequence[Any]) -> tuple[Options, Tensor | None]:
    """Parse options and route among an op's last arguments, ignoring extras such as plan."""
    count = len(Options._fields)
    return Options(*arguments[:count]), arguments[count] if len(arguments) > count else None


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save inputs, statistics and options for the backward pass."""
    x, weight, bias, mean, var, residual, *rest = inputs
    options, route = split(rest)
    _, batch_mean, batch_var = output
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.set_materialize_grads(False)
    ctx.rest = len(rest)
    ctx.options = options
    ctx.batch_statistics = mean is None
    ctx.has_residual = residual is not None
    # Without an activation the gradient of the residual is dy, and the residual itself is not needed.
    kept = residual if options.activation != "identity" else None
    statistics = (batch_mean, batch_var) if mean is None else (mean, var)
    ctx.save_for_backward(x, weight, bias, *statistics, kept, route)


def gradient(norm_exchange_backward: Callable[..., Any]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Autograd formula of an op, given a callable with the signature of ``norm_exchange_backward``."""

    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * ctx.rest
        if dy is None:  # nothing depends on y
            return None, None, None, None, None, None, *none
        x, weight, bias, mean, var, residual, route = ctx.saved_tensors
        dx, dweight, dbias, dresidual = norm_exchange_backward(
            dy, x, weight, bias, mean, var, residual, ctx.batch_statistics, *ctx.options, route
        )
        grad_residual = None
        if ctx.has_residual:
            grad_residual = dy if residual is None else dresidual
        return dx, dweight, dbias, None, None, grad_residual, *none

    return backward


def refuse_second_gradient(ctx: Any, *_: Tensor) -> None:
    """Raise RuntimeError; registered as the autograd formula of the backward op."""
    raise RuntimeError(f"norm_exchange cannot be differentiated twice by the compiled backends; use {REMEDY}")
