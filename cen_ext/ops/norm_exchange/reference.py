"""The operator in plain PyTorch: the definition that every kernel is tested against.

Channel exchanging after normalization, Wang et al., "Deep Multimodal Fusion by Channel Exchanging",
NeurIPS 2020, Eq. 5 (normalize), Eq. 6 (exchange), section 3.3 (each modality's own share of the channels).

Shapes: ``x [M*N, C, *spatial]`` holds M modalities stacked on the batch axis, where sample n of modality m
is row ``m*N + n`` or, in order ``"sample"``, ``n*M + m``; ``weight, bias [M, C]``. A route ``[M, C]`` tells
what each channel becomes: ``OWN``, ``MEAN`` or the modality that lends its channel. mean and var have row
``m*N + n``, or m, in either order:

    batch     ``[M, C]``         over N and spatial
    instance  ``[M*N, C]``       over spatial
    layer     ``[M*N, P]``       over the channels of each of P positions (the product of spatial)
    group     ``[M*N, groups]``  over the channels of a group and spatial
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cen_ext.ops.activation import ACTIVATIONS
from cen_ext.ops.norm_exchange.options import ACROSS_CHANNELS, MEAN, OWN, Options

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # supported dtypes of x


def replaced_channels(weight: Tensor, options: Options) -> Tensor:
    """Mask ``[M, C]`` of the channels of each modality that Eq. 6 replaces."""
    if weight.shape[0] == 1 or options.threshold == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    below = weight.abs() < options.threshold if options.criterion == "abs" else weight <= options.threshold
    return below & own_region(weight) if options.region == "own" else below


def route_of(
    weight: Tensor, options: Options, replaced: Tensor | None, lender: Tensor | None
) -> Tensor | None:
    """Route ``[M, C]`` int32 of a call with its own mask or lenders; None where Eq. 6 alone decides."""
    if weight.shape[0] == 1 or (replaced is None and lender is None):
        return None
    if replaced is None:
        replaced = replaced_channels(weight.detach(), options)
    if lender is None:
        return replaced.to(torch.int32) + OWN  # True is 1, and MEAN is OWN + 1
    num_modalities = lender.shape[0]
    m = torch.arange(num_modalities, device=lender.device)[:, None]
    lent = (lender >= 0) & (lender < num_modalities) & (lender != m)
    return torch.where(replaced, torch.where(lent, lender, MEAN), OWN).to(torch.int32)


def own_region(weight: Tensor) -> Tensor:
    """Mask ``[M, C]`` of each modality's own share of the channels, ``[m*C//M, (m+1)*C//M)``."""
    num_modalities, channels = weight.shape
    m = torch.arange(num_modalities, device=weight.device)[:, None]
    c = torch.arange(channels, device=weight.device)[None, :]
    return (c >= m * channels // num_modalities) & (c < (m + 1) * channels // num_modalities)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics, parameters and reductions: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_shape(x: Tensor, num_modalities: int, options: Options) -> tuple[int, int]:
    """The shape of mean and var of x."""
    if options.norm == "layer":
        return x.shape[0], math.prod(x.shape[2:])
    if options.norm == "group":
        return x.shape[0], options.num_groups
    return num_modalities if options.norm == "batch" else x.shape[0], x.shape[1]


def statistics(rows: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``[M, N, C, *spatial]``."""
    num_modalities, channels = rows.shape[0], rows.shape[2]
    rows = rows.to(statistics_dtype(rows.dtype))
    if rows.numel() == 0:  # zeros avoid NaN and torch's warning; nothing is normalized
        zeros = rows.new_zeros(statistics_shape(rows.flatten(0, 1), num_modalities, options))
        return zeros, zeros
    rows = rows if rows.dim() > 3 else rows.unsqueeze(3)
    if options.norm == "group":
        rows = rows.unflatten(2, (options.num_groups, channels // options.num_groups))
    spatial = range(4 if options.norm == "group" else 3, rows.dim())
    over = {"batch": (1, *spatial), "instance": (*spatial,), "layer": (2,), "group": (3, *spatial)}
    var, mean = torch.var_mean(rows, dim=over[options.norm], correction=0)
    if options.norm == "batch":
        return mean, var
    return mean.flatten(2).flatten(0, 1), var.flatten(2).flatten(0, 1)


def split_rows(x: Tensor, num_modalities: int, order: str = "modality") -> Tensor:
    """View of ``[M*N, ...]`` as ``[M, N, ...]``."""
    samples = x.shape[0] // num_modalities
    if order == "sample":
        return x.view(samples, num_modalities, *x.shape[1:]).transpose(0, 1)
    return x.view(num_modalities, samples, *x.shape[1:])


def join_rows(rows: Tensor, order: str = "modality") -> Tensor:
    """The inverse of ``split_rows``."""
    return (rows.transpose(0, 1) if order == "sample" else rows).flatten(0, 1)


def memory_format(x: Tensor) -> torch.memory_format:
    """Memory format of outputs: channels_last if x has it, else contiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.dim(), torch.contiguous_format)
    # torch.func.vmap knows no format but contiguous.
    if x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=wanted):
        return wanted
    return torch.contiguous_format


def lends(route: Tensor) -> Tensor:
    """Mask ``[M, M, C]``, borrower first, of the modalities whose channels replace a borrower's."""
    num_modalities = route.shape[0]
    m = torch.arange(num_modalities, device=route.device)
    named = (route[:, None] == MEAN) | (route[:, None] == m[:, None])
    return named & (m[:, None] != m)[:, :, None]


def norm_exchange_reference(
    x: Tensor,  # [M*N, C, *spatial]
    weight: Tensor,  # [M, C]
    bias: Tensor,  # [M, C]
    mean: Tensor | None,  # given statistics, or None for those of x
    var: Tensor | None,
    residual: Tensor | None,  # as x
    options: Options,
    route: Tensor | None = None,  # [M, C], in place of threshold, region and criterion
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, exchange, add the residual, activate. Returns y (as x) and the statistics that were used.

    Autograd through this function defines the backward pass: a replaced channel gets no gradient from its own
    place, and the channels that replace it share that gradient.
    """
    num_modalities, channels = weight.shape
    spatial = (1,) * (x.dim() - 2)

    def per_row(table: Tensor) -> Tensor:  # [M or M*N, C] -> [M, 1 or N, C, 1, ...]
        return table.view(num_modalities, table.shape[0] // num_modalities, channels, *spatial)

    def per_value(table: Tensor) -> Tensor:  # of statistics
        if options.norm == "layer":
            return table.view(num_modalities, x.shape[0] // num_modalities, 1, *x.shape[2:])
        if options.norm == "group":
            table = table.repeat_interleave(channels // options.num_groups, 1)
        return per_row(table)

    # Converted once, so that the gradients of both uses of x are summed before rounding to its dtype.
    rows = split_rows(x.to(statistics_dtype(x.dtype)), num_modalities, options.order)  # [M, N, C, *spatial]
    if route is None:
        route = replaced_channels(weight.detach(), options).to(torch.int32) + OWN
        lenders = range(0)
    else:
        lenders = range(num_modalities)
    replaced = route != OWN
    unread = replaced & ~lends(route).any(0)  # no modality borrows it, so it has no gradient, even for NaN
    if options.norm not in ACROSS_CHANNELS:
        rows = torch.where(per_row(unread), rows.detach(), rows)
    weight, bias = (torch.where(unread, table.detach(), table) for table in (weight, bias))
    if mean is None or var is None:
        mean, var = statistics(rows, options)
    # The derivative of a product with 1 / sqrt(var + eps) would contain its cube, which overflows.
    xhat = (rows - per_value(mean)) / torch.sqrt(per_value(var) + options.eps)
    z = per_row(weight) * xhat + per_row(bias)
    u = z
    if num_modalities > 1:
        borrowed = torch.stack([torch.cat([z[:m], z[m + 1 :]]).mean(0) for m in range(num_modalities)])
        for m in lenders:
            borrowed = torch.where(per_row(route == m), z[m], borrowed)
        u = torch.where(per_row(replaced), borrowed, z)
    u = join_rows(u, options.order)
    if residual is not None:
        u = u + residual.to(rows.dtype)
    u = ACTIVATIONS[options.activation].value(u, options.negative_slope)
    return u.to(x.dtype).contiguous(memory_format=memory_format(x)), mean, var
