"""The operator in plain PyTorch: the definition that every kernel is tested against.

Channel exchanging after normalisation, Wang et al., "Deep Multimodal Fusion by Channel Exchanging",
NeurIPS 2020, Eq. 5 (normalise), Eq. 6 (exchange), section 3.3 (each modality's own share of the channels).

Shapes: ``x [M*N, C, *spatial]`` holds M modalities stacked modality-major on the batch axis;
``weight, bias [M, C]``; ``mean, var [M, C]`` for batch norm, ``[M*N, C]`` for instance norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cen_ext.ops.activation import ACTIVATIONS
from cen_ext.ops.norm_exchange.options import Options

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of x


def replaced_channels(weight: Tensor, options: Options) -> Tensor:
    """``[M, C]`` bool: which channels of which modality Eq. 6 replaces."""
    if weight.shape[0] == 1 or options.threshold == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    below = weight.abs() < options.threshold if options.criterion == "abs" else weight <= options.threshold
    return below & own_region(weight) if options.region == "own" else below


def own_region(weight: Tensor) -> Tensor:
    """``[M, C]`` bool: modality m's own share of the channels, ``[m*C//M, (m+1)*C//M)``."""
    num_modalities, channels = weight.shape
    m = torch.arange(num_modalities, device=weight.device)[:, None]
    c = torch.arange(channels, device=weight.device)[None, :]
    return (c >= m * channels // num_modalities) & (c < (m + 1) * channels // num_modalities)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics, parameters and reductions are float32 for half types and float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x: Tensor, num_modalities: int, norm: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x: ``[M, C]`` over (N, spatial), or ``[M*N, C]`` over spatial."""
    groups = num_modalities if norm == "batch" else x.shape[0]
    if x.numel() == 0:  # nothing is normalised; zeros keep NaN and torch's warning out
        zeros = x.new_zeros((groups, x.shape[1]), dtype=statistics_dtype(x.dtype))
        return zeros, zeros
    rows = split_rows(x.to(statistics_dtype(x.dtype)), groups)  # [groups, rows, C, *spatial]
    var, mean = torch.var_mean(rows, dim=[1, *range(3, rows.dim())], correction=0)
    return mean, var


def split_rows(x: Tensor, groups: int) -> Tensor:
    """``[groups*rows, ...]`` to ``[groups, rows, ...]``, a view."""
    return x.view(groups, x.shape[0] // max(groups, 1), *x.shape[1:])


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that the output keeps: channels_last where x is laid out so, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.dim(), torch.contiguous_format)
    if not x.is_contiguous() and x.is_contiguous(memory_format=wanted):
        return wanted
    return torch.contiguous_format


def norm_exchange_reference(
    x: Tensor,  # [M*N, C, *spatial]
    weight: Tensor,  # [M, C]
    bias: Tensor,  # [M, C]
    mean: Tensor | None,  # given statistics, or None for those of x
    var: Tensor | None,
    residual: Tensor | None,  # as x
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, exchange, add the residual, activate. Returns y (as x) and the statistics that were used.

    Differentiating this function through autograd is the definition of the backward pass: a replaced
    channel takes no part in it, the channels that took its place do.
    """
    num_modalities, channels = weight.shape
    spatial = (1,) * (x.dim() - 2)

    def per_row(table: Tensor) -> Tensor:  # [M or M*N, C] -> [M, 1 or N, C, 1, ...]
        return table.view(num_modalities, table.shape[0] // num_modalities, channels, *spatial)

    # Converted once, so that the gradients of x's two uses are added before they are rounded to its type.
    rows = split_rows(x.to(statistics_dtype(x.dtype)), num_modalities)  # [M, N, C, *spatial]
    replaced = replaced_channels(weight.detach(), options)
    unread = replaced & (replaced.sum(0) == 1)  # nobody borrows it: it has no gradient, even where it is NaN
    rows = torch.where(per_row(unread), rows.detach(), rows)
    weight, bias = (torch.where(unread, table.detach(), table) for table in (weight, bias))
    if mean is None or var is None:
        mean, var = statistics(rows.flatten(0, 1), num_modalities, options.norm)
    # Divided, not multiplied by the inverse: the derivative of that takes its cube, which overflows.
    xhat = (rows - per_row(mean)) / torch.sqrt(per_row(var) + options.eps)
    z = per_row(weight) * xhat + per_row(bias)
    u = z
    if num_modalities > 1:
        others = torch.stack([torch.cat([z[:m], z[m + 1 :]]).mean(0) for m in range(num_modalities)])
        u = torch.where(per_row(replaced), others, z)
    u = u.flatten(0, 1)
    if residual is not None:
        u = u + residual.to(rows.dtype)
    u = ACTIVATIONS[options.activation].value(u, options.negative_slope)
    return u.to(x.dtype).contiguous(memory_format=memory_format(x)), mean, var
