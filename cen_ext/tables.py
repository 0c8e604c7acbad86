"""Scales and shifts of M modalities: one-dimensional parameters, shown as tables ``[M, C]``.

Two dimensions say "matrix" to much of what goes through the parameters of a network: weight decay by groups,
initialization, Adafactor. The scales of a norm are none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Their functions register the parameter elsewhere or under another name, and need it, not its table.
_TAKING_OVER = ("torch.nn.utils.parametrize", "torch.nn.utils.prune")

Hook = Callable[[Tensor], Tensor | None]


class Table(Tensor):
    """A view ``[M, ...]`` of a one-dimensional parameter; values that are written to it are the parameter's.

    ``requires_grad``, ``grad`` and hooks are the parameter's, too. Like any view of one that trains, a table
    is no leaf: optimizers and ``torch.autograd.grad`` take what ``parameters()`` yields and refuse a table.
    Every access to a layer's attribute makes a new one.
    """

    _is_param = True  # for isinstance(table, nn.Parameter)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    parameter: nn.Parameter

    @classmethod
    def of(cls, parameter: nn.Parameter, shape: tuple[int, ...]) -> Table:
        """The table of a parameter."""
        table = parameter.view(shape).as_subclass(cls)
        table.parameter = parameter
        return table

    @property
    def requires_grad(self) -> bool:
        """Whether the parameter trains."""
        return self.parameter.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.parameter.requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> Table:
        """Set whether the parameter trains; return a table of it as it is from now on."""
        self.parameter.requires_grad_(requires_grad)
        return Table.of(self.parameter, tuple(self.shape))

    @property
    def grad(self) -> Tensor | None:
        """The parameter's gradient as a table that writes through, or None."""
        grad = self.parameter.grad
        return None if grad is None else grad.view(self.shape)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.parameter.grad = None if value is None else value.reshape(-1)

    @grad.deleter
    def grad(self) -> None:
        self.parameter.grad = None

    def register_hook(self, hook: Hook) -> RemovableHandle:
        """Register a hook on the parameter's gradient, which it gets and may return as a table."""
        shape = self.shape

        def flat_hook(grad: Tensor) -> Tensor | None:
            changed = hook(grad.view(shape))
            return None if changed is None else changed.reshape(-1)

        return self.parameter.register_hook(flat_hook)  # type: ignore[no-any-return, no-untyped-call]

    def register_post_accumulate_grad_hook(self, hook: Callable[[Table], None]) -> RemovableHandle:
        """Register a hook that gets a table of the parameter after its gradient is accumulated."""
        shape = tuple(self.shape)

        def flat_hook(parameter: nn.Parameter) -> None:
            hook(Table.of(parameter, shape))

        return self.parameter.register_post_accumulate_grad_hook(flat_hook)  # type: ignore[no-any-return, no-untyped-call]

    def retain_grad(self) -> None:
        """Do nothing, as for a leaf: the parameter's gradient is kept anyway."""


def _attribute(name: str, doc: str) -> Any:
    """The property that shows a parameter as a table. nn.Module itself sets and deletes parameters."""

    def show(self: PrivateTables) -> Any:
        stored: Any = self._parameters.get(name, self)
        if stored is self:
            if name not in self.__dict__:
                raise AttributeError(name)  # nn.Module makes the message
            stored = self.__dict__[name]
        if stored is None or is_sharded(stored):  # FSDP2 looks for the very parameter that it has put here
            return stored
        if self.shown is not None:
            return stored.view(self.table_shape())[self.shown]
        if not torch.compiler.is_compiling():
            if sys._getframe(1).f_globals.get("__name__") in _TAKING_OVER:
                return stored
            if type(stored) is nn.Parameter:
                return Table.of(stored, self.table_shape())
        return stored.view(self.table_shape())

    # Plain tensors, with which FSDP and the like replace parameters.
    def put(self: PrivateTables, value: Any) -> None:
        self.__dict__[name] = value

    def drop(self: PrivateTables) -> None:
        if self.__dict__.pop(name, self) is self:
            raise AttributeError(name)

    return property(show, put, drop, doc)


class PerModality:
    """Mixin of modules that have something for each of M modalities, ``num_modalities``.

    Attributes:
        present: the modalities, ascending, that x holds; None: all. ``cen_ext.present`` sets it for a while.
    """

    present: tuple[int, ...] | None = None

    @property
    def num_present(self) -> int:
        """How many modalities x holds."""
        every: int = self.num_modalities  # type: ignore[attr-defined]  # a property of some, set by others
        return every if self.present is None else len(self.present)

    def of_present(self, table: Tensor) -> Tensor:
        """The rows ``[M', ...]`` of a table ``[M, ...]`` that belong to the modalities in x."""
        if self.present is None:
            return table
        return torch.cat([table[m : m + 1] for m in self.present])  # an index would be copied to a GPU

    def check_subset(self) -> None:
        """Refuse to run with some of the modalities; a module that needs all of them overrides this.

        Raises:
            ValueError: it needs all of them.
        """


class PrivateTables(PerModality, nn.Module):
    """Mixin of layers whose ``weight`` and ``bias`` hold a row for each of M modalities.

    ``parameters()`` and ``state_dict()`` have them one-dimensional, ``[M*C]``; the attributes are tables
    ``[M, C]``, but while FSDP2 has sharded the parameters they are those. State of that shape, ``[M, C]``
    and, for every modality, ``[C]`` loads.
    """

    num_modalities: int
    shown: int | None = None  # the modality whose row alone the attributes are, while that is computed

    def table_shape(self) -> tuple[int, ...]:
        """The shape ``[M, C]``, or ``[M, ...]``, of the tables."""
        raise NotImplementedError

    def table(self, name: str) -> Tensor | None:
        """What the layer computes with: ``weight`` or ``bias`` as a plain ``[M, C]`` tensor, or None."""
        parameter = self._stored(name)
        return None if parameter is None else parameter.view(self.table_shape())

    def whole_table(self, name: str) -> Tensor | None:
        """The same also where processes hold shards of the parameter (FSDP2): they must all call it."""
        parameter = self._stored(name)
        if parameter is None:
            return None
        whole = parameter.full_tensor() if is_sharded(parameter) else parameter
        return whole.view(self.table_shape())  # type: ignore[no-any-return]

    def _stored(self, name: str) -> Any:
        """A parameter, or the tensor that stands in for it (``functional_call``, FSDP), or None.

        Raises AttributeError where the layer has none of that name any more.
        """
        if name in self._parameters:
            return self._parameters[name]
        if name in self.__dict__:
            return self.__dict__[name]
        return getattr(self, name)  # that of a parametrization, or AttributeError

    weight = _attribute("weight", "Scales, a ``Table`` ``[M, C]``.")
    bias = _attribute("bias", "Shifts, a ``Table`` ``[M, C]``.")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; ``weight`` and ``bias`` are one-dimensional, or tables of a tied layer."""
        if isinstance(param, Table):
            param = param.parameter
        if name in ("weight", "bias") and param is not None and param.dim() != 1:
            raise ValueError(
                f"{name} of {type(self).__name__} is stored one-dimensional, [M*C], got a parameter of shape "
                f"{tuple(param.shape)}: assign nn.Parameter(values.flatten()), or write to layer.{name}.data"
            )
        super().register_parameter(name, param)

    def flatten_tables(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Bring ``weight`` and ``bias`` of a state dict to ``[M*C]``; what does not fit stays as it is."""
        shape = self.table_shape()
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is not None and not is_sharded(value):
                table = stacked(value, shape)
                state_dict[prefix + name] = table.reshape(-1) if table.shape == shape else table


def stacked(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A table ``[M, ...]`` from itself, flattened, or from a row for every modality; all else unchanged."""
    if value.shape == shape[1:]:
        return value.expand(shape).clone(memory_format=torch.contiguous_format)
    return value.view(shape) if value.shape == (math.prod(shape),) else value


def table_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The entries of a module's state that have a row for each modality, with the shapes of their tables.

    Those of ``weight`` and ``bias`` are flattened in the state, those of running statistics are not.
    """
    return {
        f"{prefix}{name}": layer.table_shape()
        for path, layer in module.named_modules()
        if isinstance(layer, PrivateTables)
        for prefix in [f"{path}." if path else ""]
        for name in ("weight", "bias", "running_mean", "running_var")
        if getattr(layer, name, None) is not None
    }


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, told without importing that: FSDP2 or tensor parallelism has cut it."""
    return hasattr(tensor, "full_tensor")
