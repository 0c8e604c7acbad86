"""Public functions: argument checks, dispatch to backends, running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.fx import Proxy

from cen_ext.ops import activation as activations
from cen_ext.ops import dispatch, fx
from cen_ext.ops.norm_exchange import paths, reference, sync
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.reference import DTYPES, statistics_dtype

CHOICES = {
    "region": ("own", "all"),
    "criterion": ("abs", "signed"),
    "norm": ("batch", "instance"),
    "activation": activations.NAMES,
    "order": ("modality", "sample"),
}


def norm_exchange(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
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
            strides are accepted.
        weight, bias: ``[M, C]``, the private affine; float32, or float64 for float64 x.
        running_mean, running_var: ``[M, C]``, with the dtype of weight. Updated in place with
            ``training=True``, required and used as the statistics with ``training=False``.
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
        norm: ``"batch"`` (statistics over N and spatial) or ``"instance"`` (over spatial).
        order: of the rows of x, residual and result: ``"modality"``, where sample n of modality m is row
            ``m*N + n``, or ``"sample"``, where it is row ``n*M + m``.
        training: use the statistics of x (True) or the running ones (False).
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
        ValueError: wrong shape, device or value; statistics missing; one value per channel in training;
            process_group with instance norm; replaced beside threshold, region or criterion; a lender that is
            the borrower itself or no modality.
        RuntimeError: the requested backend cannot run this call; or, in the backward pass, it is
            differentiated again, which only the reference can be.
    """
    if isinstance(x, Proxy):
        return fx.call_function(norm_exchange, x, locals())
    options = Options(threshold, region, criterion, norm, eps, activation, negative_slope, order)
    check_options(options)
    if not isinstance(momentum, Tensor):
        check_number("momentum", momentum)
    elif momentum.dim() != 0:
        raise ValueError(f"momentum must be a number or a 0-d tensor, got shape {tuple(momentum.shape)}")
    sync.check_process_group(process_group, norm)
    _check_tensors(x, weight, bias, running_mean, running_var, residual)
    route = None
    if replaced is not None or lender is not None:
        check_route(tuple(weight.shape), options, replaced, lender, weight)
        route = reference.route_of(weight, options, replaced, lender)
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    if not training and running is None:
        raise ValueError("running_mean and running_var are required with training=False")
    alone = process_group is None or process_group.size() == 1
    if training and alone and x.numel() > 0:
        _check_enough_values(x, weight.shape[0], norm)
    if residual is not None and residual.dtype != x.dtype:
        residual = residual.to(x.dtype)
    chosen = dispatch.choose("norm_exchange", backend, x, options)
    call = paths.Call(chosen, x, weight, bias, residual, options, route)
    if running is not None and not training:
        return paths.evaluate(call, *running)
    if process_group is not None:
        return sync.train(call, running, momentum, process_group)
    return paths.train(call, running, momentum)


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
    _check_is_tensor("weight", weight)
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
    _check_order(order)
    if not isinstance(modalities, Sequence):
        raise TypeError(f"modalities must be a sequence of tensors, got {type(modalities).__name__}")
    if len(modalities) == 0:
        raise ValueError("modalities must not be empty: one tensor per modality")
    first = modalities[0]
    if isinstance(first, Proxy):
        return fx.call_function(stack_modalities, first, {"modalities": modalities, "order": order})
    for m, other in enumerate(modalities):
        _check_is_tensor(f"modality {m}", other)
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
    _check_order(order)
    if isinstance(x, Proxy):
        parts = fx.call_function(unstack_modalities, x, locals())
        return [parts[m] for m in range(num_modalities)]
    _check_is_tensor("x", x)
    _check_stacked(x, num_modalities)
    return list(reference.split_rows(x, num_modalities, order).unbind())


def check_options(options: Options) -> None:
    """Raise ValueError or TypeError for an option that is no known choice or no number in its range."""
    for name, choices in CHOICES.items():
        value = getattr(options, name)
        if value not in choices:
            raise _unknown(name, value)
    check_number("negative_slope", options.negative_slope)
    for name in ("threshold", "eps"):
        value = getattr(options, name)
        check_number(name, value)
        if not value >= 0:  # NaN fails too
            raise ValueError(f"{name} must not be negative, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless the value is a number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_order(order: str) -> None:
    if order not in CHOICES["order"]:
        raise _unknown("order", order)


def _unknown(name: str, value: object) -> ValueError:
    return ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")


def _check_is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; stack_modalities makes one of a list")
    if x.dtype not in DTYPES:
        remedy = "; x.dequantize(), or a DeQuantStub before the layer, makes one" if x.is_quantized else ""
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}{remedy}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got one of {x.layout}; x.to_dense() makes one")
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x must be [M*N, C, *spatial] with 0 to 3 spatial dimensions, got {tuple(x.shape)}")
    _check_is_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be [M, C] with M >= 1, got shape {tuple(weight.shape)}")
    _check_stacked(x, weight.shape[0])
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has {weight.shape[1]} channels, but x has {x.shape[1]}")
    shape, dtype, device = weight.shape, statistics_dtype(x.dtype), x.device
    for name, table in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if table is None and name != "bias":
            continue
        # Every call comes by four times, and messages take longer to prepare than to compare.
        if not (
            isinstance(table, Tensor)
            and table.shape == shape
            and table.dtype == dtype
            and table.device == device
        ):
            _check_same(name, table, tuple(shape), dtype, device)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if residual is not None:
        floating = isinstance(residual, Tensor) and residual.is_floating_point()  # any such type is cast
        _check_same("residual", residual, tuple(x.shape), residual.dtype if floating else x.dtype, x.device)


def check_route(
    shape: tuple[int, ...],  # M, C
    options: Options,
    replaced: Tensor | None,
    lender: Tensor | None,
    weight: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError for a mask or lenders that do not fit a layer or, with weight, a call."""
    if replaced is not None:
        _check_is_tensor("replaced", replaced)
        _check_same("replaced", replaced, shape, torch.bool, (replaced if weight is None else weight).device)
        for name in ("threshold", "region", "criterion"):
            if getattr(options, name) != Options._field_defaults[name]:
                raise ValueError(
                    f"{name} and replaced both say which channels are replaced; give one of them"
                )
    if lender is None:
        return
    _check_is_tensor("lender", lender)
    if lender.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lender must be torch.int32 or torch.int64, got {lender.dtype}")
    _check_same("lender", lender, shape, lender.dtype, (lender if weight is None else weight).device)
    # Looking at values would make the host wait for a GPU, and compilers, tracers and transforms cannot.
    if lender.device.type != "cpu" or type(lender) is not Tensor or torch.compiler.is_compiling():
        return
    if dispatch.why_only_reference() is not None:
        return
    if replaced is None and weight is not None:
        replaced = reference.replaced_channels(weight.detach(), options)
    if replaced is not None and shape[0] > 1:
        _check_lenders(lender, replaced)


def _check_lenders(lender: Tensor, replaced: Tensor) -> None:
    num_modalities = lender.shape[0]
    m = torch.arange(num_modalities, device=lender.device)[:, None]
    wrong = replaced & ((lender < -1) | (lender >= num_modalities) | (lender == m))
    if wrong.any():
        borrower, channel = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"lender of channel {channel} of modality {borrower} must be another modality below "
            f"{num_modalities}, or -1 for the mean of the others, got {int(lender[borrower, channel])}"
        )


def _check_same(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    _check_is_tensor(name, tensor)
    assert tensor is not None  # for the type checker
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as x is, got {tensor.device}")


def _check_stacked(x: Tensor, num_modalities: int) -> None:
    if num_modalities < 1:
        raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
    if x.dim() == 0 or x.shape[0] % num_modalities != 0:
        rows = x.shape[0] if x.dim() else "no"
        raise ValueError(f"the batch axis of x has {rows} rows, not divisible by {num_modalities} modalities")


def _check_enough_values(x: Tensor, num_modalities: int, norm: str) -> None:
    groups = num_modalities if norm == "batch" else x.shape[0]
    if x.numel() // (groups * x.shape[1]) == 1:
        raise ValueError(
            f"more than one value per channel is needed in training, got x of shape {tuple(x.shape)}"
        )


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"
