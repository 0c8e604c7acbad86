"""The operator a second time, from the formulas: lists of modalities, masks, a hand-written backward.

Independent of ``cen_ext.reference``, which it checks: forward by torch's own norms and by assignment under a
mask; backward by the equations, without autograd. float64, slow, obvious.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def replaced(weight: Tensor, threshold: float, region: str, criterion: str) -> Tensor:
    """``[M, C]`` bool by a plain loop over modalities and channels."""
    num_modalities, channels = weight.shape
    table = torch.zeros(num_modalities, channels, dtype=torch.bool)
    if num_modalities == 1 or threshold == 0:
        return table
    for m in range(num_modalities):
        for c in range(channels):
            own = m * channels // num_modalities <= c < (m + 1) * channels // num_modalities
            scale = weight[m, c].item()
            below = abs(scale) < threshold if criterion == "abs" else scale <= threshold
            table[m, c] = below and (own or region == "all")
    return table


def shares(
    weight: Tensor,
    threshold: float,
    region: str,
    criterion: str,
    mask: Tensor | None = None,
    lender: Tensor | None = None,
) -> Tensor:
    """``[M, M, C]``: the share of modality k's z in modality m's place, by a plain loop."""
    num_modalities, channels = weight.shape
    table = replaced(weight, threshold, region, criterion) if mask is None else mask
    share = torch.zeros(num_modalities, num_modalities, channels, dtype=torch.float64)
    for m in range(num_modalities):
        for c in range(channels):
            if num_modalities == 1 or not table[m, c]:
                share[m, m, c] = 1
            elif lender is None or lender[m, c] == -1:
                for k in range(num_modalities):
                    share[m, k, c] = 0 if k == m else 1 / (num_modalities - 1)
            else:
                share[m, lender[m, c], c] = 1
    return share


def activated(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation of u."""
    if activation in SMOOTH:
        return u * SMOOTH[activation](u)
    if activation == "relu6":
        return u.clamp(0, 6)
    if activation == "hardswish":
        return u * (u + 3).clamp(0, 6) / 6
    slope = {"identity": 1.0, "relu": 0.0, "leaky_relu": negative_slope}[activation]
    return torch.where(u > 0, u, slope * u)


def derivative(u: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Its derivative at u, one of its one-sided ones at a kink."""
    if activation in SMOOTH:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            return torch.autograd.grad(activated(leaf, activation, negative_slope).sum(), leaf)[0]
    if activation == "hardswish":
        return torch.where(u <= -3, 0.0, torch.where(u < 3, (2 * u + 3) / 6, 1.0))
    above = torch.zeros_like(u) if activation == "relu6" else torch.ones_like(u)
    below = {"leaky_relu": negative_slope, "identity": 1.0}.get(activation, 0.0)
    return torch.where(u <= 0, below, torch.where(u < 6, 1.0, above))


# What u is multiplied by.
SMOOTH = {
    "silu": torch.sigmoid,
    "gelu": torch.special.ndtr,
    "gelu_tanh": lambda u: 0.5 + 0.5 * torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)),
}


class Bend(NamedTuple):
    """How an activation changes errors of its argument."""

    kinks: tuple[float, ...] = ()  # arguments at which the derivative jumps
    steepest: float = 1.0  # the largest |derivative|
    curvature: float = 0.0  # the largest |second derivative|, but at kinks
    own_error: float = 0.0  # that of its value over u, and of its derivative, in rounding units


BENDS = {
    "identity": Bend(),
    "relu": Bend((0.0,)),
    "relu6": Bend((0.0, 6.0)),
    "leaky_relu": Bend((0.0,)),
    "silu": Bend(steepest=1.1, curvature=0.5, own_error=8.0),
    "gelu": Bend(steepest=1.13, curvature=0.8, own_error=8.0),
    "gelu_tanh": Bend(steepest=1.13, curvature=0.81, own_error=8.0),
    "hardswish": Bend((-3.0, 3.0), steepest=1.5, curvature=1 / 3, own_error=4.0),
}


def _normalised(
    x: Tensor, mean: Tensor | None, var: Tensor | None, norm: str, eps: float, num_groups: int = 1
) -> Tensor:
    """xhat of one modality ``[N, C, *spatial]``."""
    if norm == "none":
        return x
    if norm == "layer":
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1)
    if norm == "group":
        return F.group_norm(x, num_groups, eps=eps)
    if norm == "instance" and mean is None:
        return F.instance_norm(x, eps=eps)
    return F.batch_norm(x, mean, var, training=mean is None, eps=eps)


def _average(t: Tensor, norm: str, num_groups: int) -> Tensor:
    """The average of ``[N, C, *spatial]`` over the values that share statistics, in each of their places."""
    if norm == "group":
        grouped = t.reshape(t.shape[0], num_groups, -1)
        return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(t.shape)
    over = {"batch": [0, *range(2, t.dim())], "instance": list(range(2, t.dim())), "layer": [1]}[norm]
    return t.mean(over, keepdim=True)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    *,
    threshold: float = 0.0,
    region: str = "own",
    criterion: str = "abs",
    norm: str = "batch",
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    num_groups: int = 1,
    replaced: Tensor | None = None,
    lender: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and u + residual (the argument of the activation). Given statistics are ``[M, C]``."""
    num_modalities, channels = weight.shape
    column = (1, channels) + (1,) * (x.dim() - 2)
    z = [
        _normalised(part, *((None, None) if mean is None else (mean[m], var[m])), norm, eps, num_groups)
        * weight[m].view(column)
        + bias[m].view(column)
        for m, part in enumerate(x.chunk(num_modalities))
    ]
    share = shares(weight, threshold, region, criterion, replaced, lender)
    u = [sum(share[m, k].view(column) * z[k] for k in range(num_modalities)) for m in range(num_modalities)]
    argument = torch.cat(u) if residual is None else torch.cat(u) + residual
    return activated(argument, activation, negative_slope), argument


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    **options: float | str | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual by the equations of the backward pass."""
    num_modalities, channels = weight.shape
    norm, eps, groups = options.get("norm", "batch"), options.get("eps", 1e-5), options.get("num_groups", 1)
    _, argument = forward(x, weight, bias, mean, var, residual, **options)
    g = dy * derivative(argument, options.get("activation", "identity"), options.get("negative_slope", 0.01))
    share = shares(
        weight,
        options.get("threshold", 0.0),
        options.get("region", "own"),
        options.get("criterion", "abs"),
        options.get("replaced"),
        options.get("lender"),
    )
    column = (1, channels) + (1,) * (x.dim() - 2)
    parts, gs = x.chunk(num_modalities), g.chunk(num_modalities)
    dx, dweight, dbias = [], [], []
    for m, part in enumerate(parts):
        dz = sum(share[k, m].view(column) * gs[k] for k in range(num_modalities))
        given = (None, None) if mean is None else (mean[m], var[m])
        xhat = _normalised(part, *given, norm, eps, groups)
        every = [0, *range(2, x.dim())]
        dbias.append(dz.sum(every))
        dweight.append((dz * xhat).sum(every))
        of_xhat = weight[m].view(column) * dz
        if norm == "none":
            dx.append(of_xhat)
            continue
        if mean is not None:
            dx.append((var[m] + eps).rsqrt().view(column) * of_xhat)
            continue
        centred = part - _average(part, norm, groups)
        invstd = (_average(centred.square(), norm, groups) + eps).rsqrt()
        constant, slope = (_average(t, norm, groups) for t in (of_xhat, of_xhat * xhat))
        dx.append(invstd * (of_xhat - constant - slope * xhat))
    return torch.cat(dx), torch.stack(dweight), torch.stack(dbias), g
