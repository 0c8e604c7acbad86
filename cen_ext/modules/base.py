"""What the layers of channel-exchanging networks share, whatever the norm."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cen_ext.ops import dispatch, fx
from cen_ext.ops.norm_exchange import reference
from cen_ext.ops.norm_exchange.checks import check_options, check_route
from cen_ext.ops.norm_exchange.options import Options
from cen_ext.ops.norm_exchange.reference import statistics_dtype
from cen_ext.ops.refusals import refuse_data_parallel, refuse_rebuilding
from cen_ext.tables import PrivateTables, stacked

Mask = Callable[[Tensor], Tensor]  # scales [M, C] to the channels that are replaced, bool [M, C]


class ExchangeNorm(PrivateTables):
    """Base of the exchanging norms: M private affines, the rule of exchange, residual and activation.

    Takes the stacked ``[M*N, C, *spatial]`` that a layer shared between the modalities returns.
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
    ``reset_parameters`` and torch's attributes mean what they do there. Functions that would make a layer of
    one modality of one (``convert_sync_batchnorm``, ``fuse_conv_bn_eval``, ``to_mkldnn``, ``from_float`` of
    quantized norms, timm's ``freeze_batch_norm_2d`` and ``convert_splitbn_model``) get a TypeError.

    Args:
        torchs: what torch's layer takes by position.
        num_modalities: M >= 1.
        threshold: exchange threshold θ (Eq. 6); 0, the default, disables the exchange.
        region, criterion, activation, negative_slope, eps, order: as in ``norm_exchange``.
        replaced, lender: as in ``norm_exchange``, with values, so not on the meta device. The layer keeps
            copies, which move with it and are no part of its state.
        mask: in place of replaced, a function of the scales ``[M, C]`` that returns it, called in every
            forward pass; ``cen_ext.masks`` has some. A module is one, too, and becomes a part of the layer.
            What copies to the host makes a GPU wait.
        affine: False for private norms without scale and shift, which exchange by a mask alone.
        bias: False for scales without shifts.
        backend: as in ``norm_exchange``; it takes precedence over ``use_backend``.
        device: device of the parameters and statistics.
        dtype: dtype of the network; with a half type the parameters and statistics are float32.
        torchs_options: what torch's layer takes by name besides.

    Raises:
        TypeError, ValueError: sizes or num_modalities below 1; a threshold or mask without affine; a mask
            beside what else says which channels are replaced; the rest as ``norm_exchange``.
    """

    norm: ClassVar[str]
    affine_name: ClassVar[str] = "affine"  # of torch's argument
    # Of layers that were pickled before they had one.
    backend: str | None = None
    order: str = "modality"
    mask: Mask | None  # no default: it would hide one that is a module
    replaced_mask: Tensor | None
    lender: Tensor | None

    def __init__(
        self,
        *torchs: Any,
        num_modalities: int,
        threshold: float,
        region: str,
        criterion: str,
        replaced: Tensor | None,
        mask: Mask | None,
        lender: Tensor | None,
        activation: str,
        negative_slope: float,
        eps: float,
        affine: bool,
        bias: bool,
        order: str,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **torchs_options: Any,
    ) -> None:
        check_count("num_modalities", num_modalities)
        options = Options(threshold, region, criterion, self.norm, eps, activation, negative_slope, order)
        check_options(options)
        dispatch.check_name(backend, dispatch.BACKENDS["norm_exchange"])
        # Without tables, which torch's would be [C].
        super().__init__(*torchs, eps=eps, **{self.affine_name: False}, **torchs_options)
        self.num_modalities = num_modalities
        self.threshold = threshold
        self.region = region
        self.criterion = criterion
        self.activation = activation
        self.negative_slope = negative_slope
        self.order = order
        self.backend = backend
        setattr(self, self.affine_name, affine)
        shape = self.table_shape()
        check_route(shape, options, replaced, lender)
        _check_mask(mask, options, replaced, None if affine else self.affine_name)
        self.mask = mask
        ones = ones_of(shape, device, dtype)
        # The values stay on the CPU: a layer that is built on the meta device gets its own from there.
        self._route = {"replaced_mask": _copied("replaced", replaced), "lender": _copied("lender", lender)}
        for name, table in self._route.items():
            self.register_buffer(
                name, None if table is None else table.to(ones.device, copy=True), persistent=False
            )
        if affine:
            self.weight = nn.Parameter(ones.flatten())
            if bias:
                self.bias = nn.Parameter(torch.zeros_like(ones).flatten())
        else:
            self._check_has_scales()

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
        raise NotImplementedError

    def replaced(self) -> Tensor:
        """Mask ``[M, C]`` of the channels that the next forward pass replaces."""
        replaced = self._rule()
        if self.present is None:
            return replaced
        several = len(self.present) > 1
        there = [several and m in self.present for m in range(self.num_modalities)]
        return replaced & torch.tensor(there, device=replaced.device)[:, None]

    def _rule(self) -> Tensor:
        """The same of all modalities."""
        if self.replaced_mask is not None:
            return self.replaced_mask & (self.num_modalities > 1)
        weight = self.whole_table("weight")
        if weight is None:
            self._check_has_scales()
            return torch.zeros(self.table_shape(), dtype=torch.bool)
        if self.mask is not None:
            return self.mask(weight.detach()) & (self.num_modalities > 1)
        options = Options(self.threshold, self.region, self.criterion)
        check_options(options)
        return reference.replaced_channels(weight.detach(), options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply ``norm_exchange``; the residual, of the shape of x, is added before the activation."""
        if isinstance(x, Proxy):
            return fx.call_module(self, x, *(() if residual is None else (residual,)))
        weight, bias = self.table("weight"), self.table("bias")
        if weight is None:  # affine=False
            self._check_has_scales()
            like = x if isinstance(x, Tensor) else torch.empty(())  # the operator refuses all else
            weight = like.new_ones(self.table_shape(), dtype=statistics_dtype(like.dtype))
        elif (dtype := statistics_dtype(weight.dtype)) != weight.dtype:  # FSDP's policies bypass _apply
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        bias = torch.zeros_like(weight) if bias is None else bias
        return self.normalize(x, self.of_present(weight), self.of_present(bias), residual)

    def normalize(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        """Do the same with scales and shifts ``[M, C]``, of the present modalities, in place of its own."""
        raise NotImplementedError

    def call_options(self) -> dict[str, Any]:
        """Arguments of ``norm_exchange`` that all layers give."""
        rule: dict[str, Any] = {
            "threshold": self.threshold,
            "region": self.region,
            "criterion": self.criterion,
        }
        replaced, lender = self.replaced_mask, self.lender
        if self.mask is not None and (scales := self.table("weight")) is not None:
            replaced = self.mask(scales.detach())
        if self.present is not None:
            replaced, lender = self._present_route(replaced, lender)
            rule = {}
        return {
            **rule,
            "replaced": replaced,
            "lender": lender,
            "norm": self.norm,
            "order": self.order,
            "eps": self.__dict__["eps"],
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "backend": self.backend,
        }

    def _present_route(
        self, replaced: Tensor | None, lender: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """What of ``replaced`` and ``lender`` ``[M, C]`` holds among the present modalities.

        An absent lender is -1, the mean of the others.
        """
        if self.num_present == 1:
            return None, None
        if replaced is None and self.threshold > 0 and (scales := self.table("weight")) is not None:
            # By the rule of all modalities: with M, a modality's own share of the channels changes.
            wide = scales.detach().to(statistics_dtype(scales.dtype))
            options = Options(self.threshold, self.region, self.criterion)
            replaced = reference.replaced_channels(wide, options)
        if lender is not None:
            rows = self.of_present(lender)
            lender = torch.full_like(rows, -1)
            for index, m in enumerate(self.present or ()):
                lender = torch.where(rows == m, index, lender)
        return None if replaced is None else self.of_present(replaced), lender

    def _check_has_scales(self) -> None:
        """Raise ValueError where the exchange would compare scales that an affine-free layer lacks."""
        if self.threshold > 0:
            raise ValueError(
                f"threshold={self.threshold} compares scales, of which {self.affine_name}=False has none: "
                "give replaced"
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
        self._load_as_torch(state_dict, prefix, *args)
        self._place_route()  # the parameters may have been replaced by tensors elsewhere

    def _load_as_torch(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load state whose tables have the layer's shapes."""
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> ExchangeNorm:
        refuse_data_parallel(self)
        return super()._replicate_for_data_parallel()  # type: ignore[no-any-return,no-untyped-call]

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

    def __deepcopy__(self, memo: dict[int, Any]) -> ExchangeNorm:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def own_repr(self) -> tuple[str, str]:
        """What the representation begins with, and what it ends in."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        rule = f"threshold={self.threshold}, region={self.region!r}, criterion={self.criterion!r}"
        if self.replaced_mask is not None:
            rule = "replaced=mask"
        if self.mask is not None:
            rule = f"mask={_name_of(self.mask)}"
        rule += "" if self.lender is None else ", lender=table"
        rule += "" if getattr(self, self.affine_name) else f", {self.affine_name}=False"
        rule += "" if self.order == "modality" else f", order={self.order!r}"
        sizes, last = self.own_repr()
        return (
            f"{sizes}, num_modalities={self.num_modalities}, {rule}, activation={self.activation!r}, {last}"
        )


def ones_of(shape: tuple[int, int], device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Ones of the type that tables have in a network of a dtype."""
    return torch.ones(shape, device=device, dtype=statistics_dtype(dtype or torch.get_default_dtype()))


def check_count(name: str, value: int) -> None:
    """Raise TypeError or ValueError unless it is an integer of at least 1."""
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_mask(mask: object, options: Options, replaced: Tensor | None, without: str | None) -> None:
    """Raise TypeError or ValueError for a function of the scales that does not fit the layer.

    Args:
        without: the argument by which the layer has no scales; None where it has some.
    """
    if mask is None:
        return
    if not callable(mask):
        raise TypeError(
            f"mask must be a function of the scales, got {type(mask).__name__}; replaced takes a tensor"
        )
    if without is not None:
        raise ValueError(
            f"mask is a function of the scales, of which {without}=False has none: give replaced"
        )
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
