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
def activate(u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Activation of u; NaN stays NaN."""
    if ACTIVATION == "identity":
        return u
    elif ACTIVATION == "relu":
        return tl.where(u < 0.0, 0.0, u)
    elif ACTIVATION == "relu6":
        return tl.where(u < 0.0, 0.0, tl.where(u > 6.0, 6.0, u))
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
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        return tl.where(u > 0.0, dy, dy * tl.full((), SLOPE, dy.dtype))
