"""Layers of channel-exchanging networks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase

from cen_ext.functional import norm_exchange, replaced_channels
from cen_ext.ops import dispatch, fx
from cen_ext.ops.norm_exchange.checks import check_number, check_options, check_route
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.reference import statistics_dtype
from cen_ext.ops.norm_exchange.sync import check_process_group
from cen_ext.ops.refusals import refuse_data_parallel, refuse_rebuilding
from cen_ext.tables import PrivateTables, stacked

Mask = Callable[[Tensor], Tensor]  # scales [M, C] to the channels that are replaced, bool [M, C]


class ExchangeNorm(PrivateTables, _NormBase):
    """Base of ``ExchangeBatchNorm2d`` and ``ExchangeInstanceNorm2d``: all but the kind of norm.

    Takes the stacked ``[M*N, C, *spatial]`` that a convolution shared between the modalities returns.
    State names are those of torch's layer. ``parameters()`` and the state have the scales and shifts of all
    modalities one-dimensional, ``[M*C]``, so that nothing takes them for matrices; ``weight`` and ``bias``
    are tables ``[M, C]`` that write through (``cen_ext.tables.Table``); running statistics are ``[M, C]``.
    State of either shape loads, and a ``[C]`` entry of a single-modality checkpoint into every modality.
    Parameters and statistics stay float32 when the network is converted to half precision (``half()``,
    ``bfloat16()``, ``to(dtype)``), as the operator requires.

    ``stack_modalities`` says which ``order`` of the rows a network needs. ``torch.nn.DataParallel``, which
    splits the batch axis, needs ``"sample"`` and gets a RuntimeError from layers of the other one.

    The layers are torch's norms to all that looks for these by class: ``torch.optim.swa_utils.update_bn``,
    ``torch.func.replace_all_batch_norm_modules_``, loops that freeze norms or exempt them from weight decay.
    ``reset_parameters``, ``reset_running_stats``, ``affine`` and ``track_running_stats`` mean what they do
    there. Functions that would make a layer of one modality of one (``convert_sync_batchnorm``,
    ``fuse_conv_bn_eval``, ``to_mkldnn``, timm's ``freeze_batch_norm_2d`` and ``convert_splitbn_model``) get a
    TypeError.

    Args:
        num_features: channels C.
        num_modalities: M >= 1.
        threshold: exchange threshold θ (Eq. 6); 0, the default, disables the exchange.
        region, criterion, activation, negative_slope, eps, order: as in ``norm_exchange``.
        replaced, lender: as in ``norm_exchange``, with values, so not on the meta device. The layer keeps
            copies, which move with it and are no part of its state.
        mask: in place of replaced, a function of the scales ``[M, C]`` that returns it, called in every
            forward pass; ``cen_ext.masks`` has some. A module is one, too, and becomes a part of the layer.
            What copies to the host makes a GPU wait.
        momentum: weight of a batch in the running statistics; None for their cumulative average.
        affine: False for private norms without scale and shift, which exchange by a mask alone.
        track_running_stats: False uses the statistics of x in training and in eval. The default is that of
            torch's layer: True for batch norm, False for instance norm. Set to False on a layer that has
            running statistics, it keeps them as they are; instance norm then uses those of x in eval, too.
        process_group: as in ``norm_exchange``, in training mode; ``synchronize_statistics`` sets it. Deep
            copies keep it; pickling drops it.
        backend: as in ``norm_exchange``; it takes precedence over ``use_backend``.
        device: device of the parameters and statistics.
        dtype: dtype of the network; with a half type the parameters and statistics are float32.

    Raises:
        TypeError, ValueError: num_features or num_modalities below 1; a threshold or mask without affine; a
            mask beside what else says which channels are replaced; the rest as ``norm_exchange``.
    """

    norm: ClassVar[str]
    tracks_by_default: ClassVar[bool]
    # Of layers that were pickled before they had one.
    backend: str | None = None
    order: str = "modality"
    mask: Mask | None  # no default: it would hide one that is a module
    replaced_mask: Tensor | None
    lender: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_modalities: int,
        *,
        threshold: float = 0.0,
        region: str = "own",
        criterion: str = "abs",
        replaced: Tensor | None = None,
        mask: Mask | None = None,
        lender: Tensor | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool | None = None,
        order: str = "modality",
        process_group: dist.ProcessGroup | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("num_features", num_features), ("num_modalities", num_modalities)):
            if not isinstance(value, Integral):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        options = Options(threshold, region, criterion, self.norm, eps, activation, negative_slope, order)
        check_options(options)
        if momentum is not None:
            check_number("momentum", momentum)
        check_process_group(process_group, self.norm)
        dispatch.check_name(backend, dispatch.BACKENDS["norm_exchange"])
        # Without tables, which torch's would be [C].
        super().__init__(num_features, eps, momentum, affine=False, track_running_stats=False)
        self.num_modalities = num_modalities
        self.threshold = threshold
        self.region = region
        self.criterion = criterion
        self.activation = activation
        self.negative_slope = negative_slope
        self.order = order
        self.process_group = process_group
        self.backend = backend
        self.affine = affine
        if track_running_stats is None:
            track_running_stats = self.tracks_by_default
        self.track_running_stats = track_running_stats
        shape = (num_modalities, num_features)
        check_route(shape, options, replaced, lender)
        _check_mask(mask, options, replaced, affine)
        self.mask = mask
        ones = torch.ones(shape, device=device, dtype=statistics_dtype(dtype or torch.get_default_dtype()))
        # The values stay on the CPU: a layer that is built on the meta device gets its own from there.
        self._route = {"replaced_mask": _copied("replaced", replaced), "lender": _copied("lender", lender)}
        for name, table in self._route.items():
            self.register_buffer(
                name, None if table is None else table.to(ones.device, copy=True), persistent=False
            )
        if affine:
            self.weight = nn.Parameter(ones.flatten())
            self.bias = nn.Parameter(torch.zeros_like(ones).flatten())
        else:
            self._check_has_scales()
        if track_running_stats:
            self.running_mean = torch.zeros_like(ones)
            self.running_var = torch.ones_like(ones)
            self.num_batches_tracked = torch.zeros((), device=ones.device, dtype=torch.long)

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        if not torch.compiler.is_compiling():
            refuse_rebuilding(self, sys._getframe(1))
        return self.__dict__["eps"]  # type: ignore[no-any-return]

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    @property
    def exchanges(self) -> bool:
        """Whether this layer can replace channels: M > 1, and a positive threshold or a mask."""
        masked = self.mask is not None or self.replaced_mask is not None
        return self.num_modalities > 1 and (self.threshold > 0 or masked)

    def table_shape(self) -> tuple[int, int]:
        """``(M, C)``."""
        return self.num_modalities, self.num_features

    def replaced(self) -> Tensor:
        """Mask ``[M, C]`` of the channels that the next forward pass replaces."""
        if self.replaced_mask is not None:
            return self.replaced_mask & (self.num_modalities > 1)
        weight = self.whole_table("weight")
        if weight is None:
            self._check_has_scales()
            return torch.zeros(self.num_modalities, self.num_features, dtype=torch.bool)
        if self.mask is not None:
            return self.mask(weight.detach()) & (self.num_modalities > 1)
        return replaced_channels(weight, self.threshold, self.region, self.criterion)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply ``norm_exchange`` to ``[M*N, C, *spatial]``; the residual is added before the activation."""
        if isinstance(x, Proxy):
            return fx.call_module(self, x, *(() if residual is None else (residual,)))
        weight, bias = self.table("weight"), self.table("bias")
        if weight is None or bias is None:  # affine=False
            self._check_has_scales()
            like = x if isinstance(x, Tensor) else torch.empty(())  # the operator refuses all else
            shape = (self.num_modalities, self.num_features)
            weight = like.new_ones(shape, dtype=statistics_dtype(like.dtype))
            bias = torch.zeros_like(weight)
        elif (dtype := statistics_dtype(weight.dtype)) != weight.dtype:  # FSDP's policies bypass _apply
            weight, bias = weight.to(dtype), bias.to(dtype)
        return self.normalize(x, weight, bias, residual)

    def normalize(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        """Do the same with scales and shifts ``[M, C]`` in place of the layer's own."""
        training, tracks = self.training, self.track_running_stats
        running_mean, running_var = self.running_mean, self.running_var
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and self.num_batches_tracked is not None:
            momentum = (self.num_batches_tracked + 1).to(weight.dtype).reciprocal()
        process_group = self.process_group if training else None
        # As in torch: in eval mode, batch norm reads what it has, and instance norm what it tracks.
        of_x = training or running_mean is None or not (tracks or self.norm == "batch")
        if of_x and not tracks:
            running_mean = running_var = None
        replaced = self.replaced_mask
        if self.mask is not None and (scales := self.table("weight")) is not None:
            replaced = self.mask(scales.detach())
        y = norm_exchange(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual=residual,
            threshold=self.threshold,
            region=self.region,
            criterion=self.criterion,
            replaced=replaced,
            lender=self.lender,
            norm=self.norm,
            order=self.order,
            training=of_x,
            momentum=momentum,
            eps=self.__dict__["eps"],
            activation=self.activation,
            negative_slope=self.negative_slope,
            process_group=process_group,
            backend=self.backend,
        )
        # Synchronized processes count the same batches, even one whose own batch is empty.
        updates = training and tracks and (x.numel() > 0 or process_group is not None)
        if updates and (batches := self.num_batches_tracked) is not None:
            batches.add_(1)
        return y

    def _check_has_scales(self) -> None:
        """Raise ValueError where the exchange would compare scales that an affine-free layer lacks."""
        if self.threshold > 0:
            raise ValueError(
                f"threshold={self.threshold} compares scales, of which affine=False has none: give replaced"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExchangeNorm:
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if not result.is_floating_point() or statistics_dtype(result.dtype) == result.dtype:
                return result
            return tensor.to(result.device, statistics_dtype(result.dtype))  # tensor is not rounded

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        self._place_route()
        return self

    def _place_route(self) -> None:
        """Put copies of the mask and the lenders where the parameters are, in place of the last ones."""
        for name, table in self._route.items():
            if table is not None:
                placed = getattr(self, name) if self.weight is None else self.weight
                setattr(self, name, table.to(placed.device, copy=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        shape = self.table_shape()
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None:
                value = value.to(statistics_dtype(value.dtype))
                state_dict[prefix + name] = stacked(value, shape) if name.startswith("running") else value
        self.flatten_tables(state_dict, prefix)
        # Not instance norm's, which refuses running statistics that it does not track even if not strict.
        _NormBase._load_from_state_dict(self, state_dict, prefix, *args)
        self._place_route()  # the parameters may have been replaced by tensors elsewhere

    def _replicate_for_data_parallel(self) -> ExchangeNorm:
        refuse_data_parallel(self)
        return super()._replicate_for_data_parallel()  # type: ignore[no-any-return,no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None}  # process groups cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_route", {})  # layers pickled by versions without routes
        for name in ("replaced_mask", "lender"):
            self._buffers.setdefault(name, None)
        if "mask" not in self._modules:
            self.__dict__.setdefault("mask", None)
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.flatten()  # [M, C] in layers that were pickled with such
        # Layers that were pickled before they were torch's norms lack these.
        self.__dict__.setdefault("affine", True)
        self.__dict__.setdefault("track_running_stats", self.running_mean is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExchangeNorm:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.process_group)] = self.process_group  # process groups cannot be copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def extra_repr(self) -> str:
        rule = f"threshold={self.threshold}, region={self.region!r}, criterion={self.criterion!r}"
        if self.replaced_mask is not None:
            rule = "replaced=mask"
        if self.mask is not None:
            rule = f"mask={_name_of(self.mask)}"
        rule += "" if self.lender is None else ", lender=table"
        rule += "" if self.affine else ", affine=False"
        rule += "" if self.order == "modality" else f", order={self.order!r}"
        return (
            f"{self.num_features}, num_modalities={self.num_modalities}, {rule}, "
            f"activation={self.activation!r}, momentum={self.momentum}, eps={self.eps}, "
            f"track_running_stats={self.track_running_stats}"
        )


def _check_mask(mask: object, options: Options, replaced: Tensor | None, affine: bool) -> None:
    """Raise TypeError or ValueError for a function of the scales that does not fit the layer."""
    if mask is None:
        return
    if not callable(mask):
        raise TypeError(
            f"mask must be a function of the scales, got {type(mask).__name__}; replaced takes a tensor"
        )
    if not affine:
        raise ValueError("mask is a function of the scales, of which affine=False has none: give replaced")
    given = {name: getattr(options, name) for name in ("threshold", "region", "criterion")}
    also = [name for name, value in given.items() if value != Options._field_defaults[name]]
    also += [] if replaced is None else ["replaced"]
    if also:
        raise ValueError(f"mask and {also[0]} both say which channels are replaced; give one of them")


def _name_of(mask: Any) -> str:
    function = getattr(mask, "func", mask)  # that of a functools.partial
    return str(getattr(function, "__name__", type(function).__name__))


def _copied(name: str, table: Tensor | None) -> Tensor | None:
    """A contiguous copy on the CPU, which nothing else writes to."""
    if table is not None and table.is_meta:
        raise ValueError(
            f"{name} must have values, got a tensor on the meta device; make it with device='cpu'"
        )
    return None if table is None else table.cpu().clone(memory_format=torch.contiguous_format)


class ExchangeBatchNorm2d(ExchangeNorm, nn.BatchNorm2d):
    """Batch norm of M modalities with channel exchange, residual and activation fused.

    ``torch.nn.BatchNorm2d`` per modality, then the exchange. ``eval()`` uses the running statistics while
    ``weight`` and ``bias`` still train, which is the paper's recipe for segmentation.
    Arguments, state and errors: ``ExchangeNorm``.
    """

    norm = "batch"
    tracks_by_default = True


class ExchangeInstanceNorm2d(ExchangeNorm, nn.InstanceNorm2d):
    """Instance norm of M modalities with channel exchange, residual and activation fused.

    ``torch.nn.InstanceNorm2d`` with an affine per modality, then the exchange, which depends on its scale.
    Unlike in torch, ``momentum=None`` is the cumulative average here, too.
    Arguments, state and errors: ``ExchangeNorm``.
    """

    norm = "instance"
    tracks_by_default = False
