"""The activations of ``ops/activation.py`` and their derivatives in Triton."""

# The language is Triton, whose parameters have no type annotations.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# The activations whose derivative is 0 or 1, so that dy times the derivative is exact in any dtype.
SELECTS = frozenset({"identity", "relu", "relu6"})


def constants_of(activation: str, negative_slope: float) -> dict[str, str | float]:
    """Constants of the kernels. Slopes 0 and 1 need no product, and 0 times -inf would be NaN."""
    if activation == "leaky_relu":
        activation = {0.0: "relu", 1.0: "identity"}.get(float(negative_slope), activation)
    slope = float(negative_slope) if activation == "leaky_relu" else 0.0
    return dict(ACTIVATION=activation, SLOPE=slope)


@triton.jit
def _logistic(v):
    """``1 / (1 + exp(-v))``, without overflow."""
    e = tl.exp(tl.where(v < 0.0, v, -v))
    return tl.where(v < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _distribution(u):
    """The standard normal distribution at u."""
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _twice_w(u):
    """``0.5 (1 + tanh(w))`` is the logistic function of ``2w``, ``w = sqrt(2 / pi) (u + 0.044715 u^3)``."""
    return u * (1.0 + u * u * 0.044715) * 1.5957691216057308


@triton.jit
def _within(u, most: tl.constexpr):
    """u in [-most, most]: what multiplies a density there is 0 beyond, where the product could be 0 * inf."""
    return tl.where(u < -most, -most, tl.where(u > most, most, u))


@triton.jit
def activate(u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Activation of u; NaN stays NaN."""
    if ACTIVATION == "identity":
        return u
    elif ACTIVATION == "relu":
        return tl.where(u < 0.0, 0.0, u)
    elif ACTIVATION == "relu6":
        return tl.where(u < 0.0, 0.0, tl.where(u > 6.0, 6.0, u))
    elif ACTIVATION == "silu":
        return u * _logistic(u)
    elif ACTIVATION == "gelu":
        return u * _distribution(u)
    elif ACTIVATION == "gelu_tanh":
        return u * _logistic(_twice_w(u))
    elif ACTIVATION == "hardswish":
        return tl.where(u < -3.0, u * 0.0, tl.where(u > 3.0, u, u * (u + 3.0) / 6.0))
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        return tl.where(u < 0.0, u * tl.full((), SLOPE, u.dtype), u)


@triton.jit
def activate_backward(dy, u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Product of dy and the activation's derivative at u."""
    if ACTIVATION == "identity":
        return dy
    elif ACTIVATION == "relu":
        return tl.where(u > 0.0, dy, 0.0)
    elif ACTIVATION == "relu6":
        return tl.where((u > 0.0) & (u < 6.0), dy, 0.0)
    elif ACTIVATION == "silu":
        s = _logistic(u)
        return dy * (s + _within(u, 100.0) * s * (1.0 - s))
    elif ACTIVATION == "gelu":
        c = _within(u, 20.0)
        return dy * (_distribution(u) + c * tl.exp(-0.5 * c * c) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        c = _within(u, 20.0)
        s = _logistic(_twice_w(c))
        return dy * (s + c * s * (1.0 - s) * 1.5957691216057308 * (1.0 + c * c * 0.134145))
    elif ACTIVATION == "hardswish":
        return tl.where(u <= -3.0, 0.0, tl.where(u < 3.0, dy * (u / 3.0 + 0.5), dy))
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        return tl.where(u > 0.0, dy, dy * tl.full((), SLOPE, dy.dtype))
