"""Public functions: the operator, its mask, and modalities stacked and taken apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.fx import Proxy

from cen_ext.ops import dispatch, fx
from cen_ext.ops.norm_exchange import paths, reference, sync
from cen_ext.ops.norm_exchange.checks import (
    check_channel_dim,
    check_enough_values,
    check_is_tensor,
    check_num_groups,
    check_number,
    check_options,
    check_order,
    check_route,
    check_stacked,
    check_tensors,
)
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.reference import statistics_dtype
from cen_ext.ops.streams import joined


def norm_exchange(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    threshold: float = 0.0,
    region: str = "own",
    criterion: str = "abs",
    replaced: Tensor | None = None,
    lender: Tensor | None = None,
    norm: str = "batch",
    num_groups: int = 1,
    channel_dim: int = 1,
    order: str = "modality",
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalize each modality with its own affine, exchange channels, add the residual, activate.

    Channels whose scale falls below the threshold are replaced by the mean of the other modalities'
    channels (Wang et al., NeurIPS 2020, Eq. 5 and 6). A replaced channel is detached from its own input;
    the gradient flows through the channels that replace it.

    Args:
        x: ``[M*N, C, *spatial]``, M modalities stacked on the batch axis (``stack_modalities``); spatial has
            0 to 3 dimensions. float16, bfloat16, float32 or float64, contiguous or channels_last; other
            strides are accepted. With ``channel_dim=-1`` it is ``[M*N, ..., C]``.
        weight, bias: ``[M, C]``, the private affine; float32, or float64 for float64 x. For norm ``"none"``
            either or both may be None, for ones and zeros.
        running_mean, running_var: ``[M, C]``, with the dtype of weight, for batch and instance norm alone.
            Updated in place with ``training=True``, used as the statistics with ``training=False``, where
            batch norm requires them and instance norm without them uses the statistics of x.
        residual: added before the activation; shape and device of x. One of another floating type is cast
            to that of x.
        threshold: exchange threshold θ >= 0 on the scale; 0 disables the exchange.
        region: ``"own"`` replaces channels of modality m only in its share ``[m*C//M, (m+1)*C//M)``
            (section 3.3), ``"all"`` everywhere.
        criterion: ``"abs"`` replaces where ``|weight| < threshold``, ``"signed"`` where
            ``weight <= threshold`` (Eq. 6 as printed).
        replaced: ``[M, C]`` bool, the channels to replace, in place of threshold, region and criterion.
            Ignored if M is 1.
        lender: ``[M, C]`` int32 or int64, read only where a channel is replaced: -1 for the mean of the other
            modalities, as without lender, or the modality that alone replaces it. On a GPU, and by
            compilers, its values are not checked: those that name no other modality give the mean.
        norm: ``"batch"`` (statistics over N and spatial), ``"instance"`` (over spatial), ``"layer"`` (over
            the C channels of each position), ``"group"`` (over spatial and the ``C // num_groups`` channels
            of each group) or ``"none"``, without statistics: weight and bias only scale and shift.
        num_groups: of norm ``"group"``, a divisor of C.
        channel_dim: 1, or -1 where x, residual and result are ``[M*N, ..., C]``, the result contiguous.
        order: of the rows of x, residual and result: ``"modality"``, where sample n of modality m is row
            ``m*N + n``, or ``"sample"``, where it is row ``n*M + m``.
        training: use the statistics of x (True) or the running ones (False); of no effect on norms that
            have no running ones.
        momentum: weight of the new statistics in the running ones; a number or a 0-d tensor.
        eps: added to the variance.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` with ``negative_slope``,
            ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"hardswish"``, each as in ``torch.nn.functional``.
        process_group: compute batch statistics over x of all its processes, at the cost of one collective
            forward and one backward, which every process must join; x may be empty. None, the default, uses
            this process alone. No effect with ``training=False``.
        backend: a name from ``available_backends()``; None for that of ``use_backend``, or else the best that
            can run. While PyTorch traces (``torch.jit.trace``), exports to ONNX, transforms (``torch.func``)
            or differentiates in forward mode, that is the reference.

    Returns:
        A tensor with the shape, dtype and memory format of x.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype; process_group is no process group.
        ValueError: wrong shape, device or value; statistics missing, or given to a norm without any; one
            value per channel in training; process_group with another norm than batch norm; replaced beside
            threshold, region or criterion; a lender that is the borrower itself or no modality; num_groups
            that is no divisor of C, or given to another norm than group norm.
        RuntimeError: the requested backend cannot run this call; or, in the backward pass, it is
            differentiated again, which only the reference can be.
    """
    if isinstance(x, Proxy):
        return fx.call_function(norm_exchange, x, locals())
    x, residual = joined(x), joined(residual)
    options = Options(threshold, region, criterion, norm, eps, activation, negative_slope, order, num_groups)
    check_options(options)
    check_num_groups(num_groups, norm)
    if not isinstance(momentum, Tensor):
        check_number("momentum", momentum)
    elif momentum.dim() != 0:
        raise ValueError(f"momentum must be a number or a 0-d tensor, got shape {tuple(momentum.shape)}")
    sync.check_process_group(process_group, norm)
    check_channel_dim(channel_dim)
    last = x
    if channel_dim == -1:
        x, residual = _channels_second(x, residual)
    if norm == "none":
        weight, bias = _ones_and_zeros(x, weight, bias, replaced, lender, threshold)
    check_tensors(x, weight, bias, running_mean, running_var, residual)
    assert weight is not None  # for the type checker
    assert bias is not None
    if x.shape[1] % num_groups:
        raise ValueError(f"num_groups must divide the {x.shape[1]} channels of x, got {num_groups}")
    route = None
    if replaced is not None or lender is not None:
        check_route(tuple(weight.shape), options, replaced, lender, weight)
        route = reference.route_of(weight, options, replaced, lender)
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    if norm not in ("batch", "instance"):
        if running is not None:
            raise ValueError(f"running_mean and running_var are of no use to norm {norm!r}, which has none")
    elif running is None and not training:
        if norm == "batch":
            raise ValueError("running_mean and running_var are required with training=False")
        training = True
    alone = process_group is None or process_group.size() == 1
    if training and alone and x.numel() > 0 and norm in ("batch", "instance"):
        check_enough_values(x, weight.shape[0], norm)
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    chosen = dispatch.choose("norm_exchange", backend, x, options)
    call = paths.Call(chosen, x, weight, bias, residual, options, route)
    if norm == "none":
        y = paths.evaluate(paths.without_norm(call), torch.zeros_like(weight), torch.ones_like(weight))
    elif running is not None and not training:
        y = paths.evaluate(call, *running)
    elif process_group is not None and training:
        y = sync.train(call, running, momentum, process_group)
    else:
        y = paths.train(call, running, momentum)
    return y if channel_dim == 1 else y.movedim(1, -1).reshape(last.shape)


def replaced_channels(
    weight: Tensor, threshold: float, region: str = "own", criterion: str = "abs"
) -> Tensor:
    """Mask of the channels that the exchange replaces (Eq. 6; section 3.3 for the region).

    Args:
        weight: ``[M, C]`` scales of the private norms.
        threshold, region, criterion: as in ``norm_exchange``.

    Returns:
        ``[M, C]`` bool on the device of weight; all False if M is 1 or the threshold 0.

    Raises:
        TypeError, ValueError: as ``norm_exchange``.
    """
    options = Options(threshold, region, criterion)
    check_options(options)
    check_is_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [M, C], got shape {tuple(weight.shape)}")
    return reference.replaced_channels(weight.detach(), options)


def stack_modalities(modalities: Sequence[Tensor], *, order: str = "modality") -> Tensor:
    """Stack M tensors ``[N, C, *spatial]`` into one ``[M*N, C, *spatial]``.

    Sample n of modality m becomes row ``m*N + n`` or, in order ``"sample"``, row ``n*M + m``. A network that
    treats all rows alike may have either, the same in all of its layers. One that splits or joins the batch
    axis must have ``"sample"``, in which whole samples, multiples of M rows, stay together: microbatches and
    pipelines, ``torch.nn.DataParallel``, siamese networks that concatenate two stacked batches.

    Raises:
        TypeError: not a sequence of tensors.
        ValueError: no tensors, or tensors of different shape, dtype or device; an unknown order.
    """
    check_order(order)
    if not isinstance(modalities, Sequence):
        raise TypeError(f"modalities must be a sequence of tensors, got {type(modalities).__name__}")
    if len(modalities) == 0:
        raise ValueError("modalities must not be empty: one tensor per modality")
    first = modalities[0]
    if isinstance(first, Proxy):
        return fx.call_function(stack_modalities, first, {"modalities": modalities, "order": order})
    for m, other in enumerate(modalities):
        check_is_tensor(f"modality {m}", other)
        if (other.shape, other.dtype, other.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"modality {m} is {_describe(other)}, but modality 0 is {_describe(first)}; "
                "all modalities must agree in shape, dtype and device"
            )
    if order == "modality":
        return torch.cat(list(modalities))
    if reference.memory_format(first) == torch.contiguous_format:
        return torch.stack(list(modalities), 1).flatten(0, 1)
    return torch.stack([x.movedim(1, -1) for x in modalities], 1).flatten(0, 1).movedim(-1, 1)


def unstack_modalities(x: Tensor, num_modalities: int, *, order: str = "modality") -> list[Tensor]:
    """Split a stacked ``[M*N, ...]`` tensor, with its rows in the given order, into M views ``[N, ...]``.

    Raises:
        TypeError: x is not a tensor.
        ValueError: the batch axis is not divisible by num_modalities; an unknown order.
    """
    check_order(order)
    if isinstance(x, Proxy):
        parts = fx.call_function(unstack_modalities, x, locals())
        return [parts[m] for m in range(num_modalities)]
    check_is_tensor("x", x)
    check_stacked(x, num_modalities)
    return list(reference.split_rows(x, num_modalities, order).unbind())


def _channels_second(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``[M*N, ..., C]`` as ``[M*N, C, 1, positions]``, channels_last; views of what is contiguous."""
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is None and name == "residual":
            continue
        check_is_tensor(name, tensor)
        assert tensor is not None  # for the type checker
        if tensor.dim() < 2 or tensor.shape != x.shape:
            expected = "[M*N, ..., C]" if name == "x" else f"of shape {tuple(x.shape)}"
            raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}")

    def view(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2:
            return tensor
        return tensor.contiguous().flatten(1, -2).unsqueeze(1).movedim(-1, 1)

    return view(x), None if residual is None else view(residual)


def _ones_and_zeros(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    replaced: Tensor | None,
    lender: Tensor | None,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, with ones and zeros in place of those that are None."""
    if weight is not None and bias is not None:
        return weight, bias
    if weight is None and threshold > 0:
        raise ValueError(f"threshold={threshold} compares weight, which is None: give replaced")
    table = next((t for t in (weight, bias, replaced, lender) if isinstance(t, Tensor)), None)
    if table is None or not isinstance(x, Tensor):
        raise ValueError("weight, bias, replaced or lender must tell M: all of them are None")
    shape, dtype = tuple(table.shape), statistics_dtype(x.dtype)
    ones = x.new_ones(shape, dtype=dtype) if weight is None else weight
    return ones, x.new_zeros(shape, dtype=dtype) if bias is None else bias


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"
