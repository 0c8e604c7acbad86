"""Checks of what a call of ``norm_exchange`` is given, in the caller's terms."""

from __future__ import annotations

import torch
from torch import Tensor

from cen_ext.ops import activation as activations
from cen_ext.ops import dispatch
from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.options import NORMS, Options
from cen_ext.ops.norm_exchange.reference import DTYPES, statistics_dtype

CHOICES = {
    "region": ("own", "all"),
    "criterion": ("abs", "signed"),
    "norm": NORMS,
    "activation": activations.NAMES,
    "order": ("modality", "sample"),
}


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


def check_num_groups(num_groups: int, norm: str) -> None:
    """Raise TypeError or ValueError for no number of groups, or for several without group norm."""
    if not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an integer, got {type(num_groups).__name__}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if num_groups > 1 and norm != "group":
        raise ValueError(f"num_groups={num_groups} is for norm 'group', but norm is {norm!r}")


def check_channel_dim(channel_dim: int) -> None:
    """Raise ValueError unless channels are the second dimension or the last."""
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim!r}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless the value is a number."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_order(order: str) -> None:
    """Raise ValueError unless it is an order of rows."""
    if order not in CHOICES["order"]:
        raise _unknown("order", order)


def _unknown(name: str, value: object) -> ValueError:
    return ValueError(f"{name} must be one of {', '.join(map(repr, CHOICES[name]))}, got {value!r}")


def check_is_tensor(name: str, value: object) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raise TypeError or ValueError for tensors of the wrong kind, shape, dtype or device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}; stack_modalities makes one of a list")
    if x.dtype not in DTYPES:
        remedy = "; x.dequantize(), or a DeQuantStub before the layer, makes one" if x.is_quantized else ""
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}{remedy}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor, got one of {x.layout}; x.to_dense() makes one")
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x must be [M*N, C, *spatial] with 0 to 3 spatial dimensions, got {tuple(x.shape)}")
    check_is_tensor("weight", weight)
    assert weight is not None  # for the type checker
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must be [M, C] with M >= 1, got shape {tuple(weight.shape)}")
    check_stacked(x, weight.shape[0])
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
        check_is_tensor("replaced", replaced)
        _check_same("replaced", replaced, shape, torch.bool, (replaced if weight is None else weight).device)
        for name in ("threshold", "region", "criterion"):
            if getattr(options, name) != Options._field_defaults[name]:
                raise ValueError(
                    f"{name} and replaced both say which channels are replaced; give one of them"
                )
    if lender is None:
        return
    check_is_tensor("lender", lender)
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
    check_is_tensor(name, tensor)
    assert tensor is not None  # for the type checker
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as x is, got {tensor.device}")


def check_stacked(x: Tensor, num_modalities: int) -> None:
    """Raise ValueError unless the rows of x divide among the modalities."""
    if num_modalities < 1:
        raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
    if x.dim() == 0 or x.shape[0] % num_modalities != 0:
        rows = x.shape[0] if x.dim() else "no"
        raise ValueError(f"the batch axis of x has {rows} rows, not divisible by {num_modalities} modalities")


def check_enough_values(x: Tensor, num_modalities: int, norm: str) -> None:
    """Raise ValueError if batch or instance norm has a single value per channel."""
    groups = num_modalities if norm == "batch" else x.shape[0]
    if x.numel() // (groups * x.shape[1]) == 1:
        raise ValueError(
            f"more than one value per channel is needed in training, got x of shape {tuple(x.shape)}"
        )
