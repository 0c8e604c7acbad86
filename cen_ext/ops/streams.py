"""A stack of modalities that is kept apart: M tensors ``[N, C, ...]`` in place of one ``[M*N, C, ...]``.

A network whose modalities have weights of their own, as a deployed one has once its norms are part of its
convolutions, would otherwise cut its stack before every convolution and join it afterwards.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# fmt: off
# Functions by their names, under which torch has them as methods and modules call them as well.
_OF_VALUES = frozenset({
    "abs", "add", "clamp", "contiguous", "div", "exp", "float", "ge", "gelu", "gt", "half", "hardswish",
    "hardtanh", "le", "leaky_relu", "lt", "mul", "neg", "pow", "relu", "relu6", "rsub", "sigmoid", "silu",
    "softplus", "square", "sub", "tanh", "to", "true_divide", "where",
    "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__imul__",
    "__truediv__", "__neg__", "__lt__", "__le__", "__gt__", "__ge__",
})
# Each row of these results is of one row of the input alone, whatever else they take.
_OF_ROWS = frozenset({
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "conv2d", "conv_transpose2d", "group_norm",
    "instance_norm", "interpolate", "layer_norm", "linear", "max_pool2d", "pad",
})
# fmt: on


class Streams:
    """What takes the place of a stacked tensor where its M parts go their own ways.

    Functions of torch that act on each row by itself, and operators, act on each part; all others act on the
    stack, which is joined for them.

    Args:
        parts: of the M modalities, ``[N, C, ...]`` each; their channels may differ.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def of(cls, x: Tensor | Streams, count: int) -> Streams:
        """Take apart a stack of ``count`` modalities, in views; streams stay what they are."""
        return x if isinstance(x, Streams) else cls(x.unflatten(0, (count, -1)).unbind())

    def __len__(self) -> int:
        return len(self.parts)

    def stacked(self) -> Tensor:
        """The one tensor ``[M*N, C, ...]``."""
        return torch.cat(self.parts)

    def each(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Streams:
        """Apply a function to each part."""
        return Streams(function(part, *args, **options) for part in self.parts)

    @property
    def shape(self) -> torch.Size:
        """The stack's."""
        rows, *rest = self.parts[0].shape
        return torch.Size((rows * len(self.parts), *rest))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        """The parts themselves, if it is cut into them."""
        if dim == 0 and chunks == len(self.parts):
            return self.parts
        return self.stacked().chunk(chunks, dim)

    def __getitem__(self, index: Any) -> Any:
        every_row = isinstance(index, tuple) and index[0] == slice(None)
        return self.each(operator.getitem, index) if every_row else self.stacked()[index]

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(Tensor, name)  # raises AttributeError
        if callable(attribute):
            return functools.partial(_run, attribute, self)
        if name == "mT":
            return Streams(part.mT for part in self.parts)
        value = getattr(self.parts[0], name)
        if isinstance(value, Tensor):
            return getattr(self.stacked(), name)
        return value  # dtype, device and the like are those of every part

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, *args, **(kwargs or {}))


def joined(value: Any) -> Any:
    """The stack of streams; anything else as it is."""
    return value.stacked() if isinstance(value, Streams) else value


def _run(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function on each part of the streams among its arguments, or on their stacks."""
    name = function.__name__
    # In place, the values change and the place stays.
    plain = name if name.startswith("__") else name.rstrip("_")
    given = _leaves((args, options))
    apart = plain in _OF_VALUES or plain in _OF_ROWS
    if name in ("cat", "concat", "mean"):
        dims = args[1] if len(args) > 1 else options.get("dim", 0)
        apart = all(dim > 0 for dim in (dims if isinstance(dims, tuple | list) else [dims]))
        apart &= not any(isinstance(value, Tensor) for value in given)
    elif name == "expand":
        apart = args[1:2] == (-1,)
    if not apart:
        if plain != name:
            raise NotImplementedError(f"{name} cannot act in place on modalities that are kept apart")
        args, options = _each((args, options), joined)
        return function(*args, **options)
    streams = next(value for value in given if isinstance(value, Streams))
    count, shape = len(streams), streams.shape

    def split(value: Any) -> Any:
        """A stack beside the streams as streams."""
        beside = plain in _OF_VALUES and isinstance(value, Tensor) and value.dim() == len(shape)
        return Streams.of(value, count) if beside and value.shape[0] == shape[0] else value

    args, options = _each((args, options), split)
    results = []
    for m in range(count):
        own, named = _each((args, options), functools.partial(_part, m=m))
        results.append(function(*own, **named))
    return Streams(results)


def _part(value: Any, m: int) -> Any:
    """One modality's part of streams; anything else as it is."""
    return value.parts[m] if isinstance(value, Streams) else value


def _leaves(value: Any) -> list[Any]:
    """The values in nested containers."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _each(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The same containers with every value in them converted."""
    if isinstance(value, dict):
        return {key: _each(item, convert) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each(item, convert) for item in value)
    return convert(value)


def _operator(name: str) -> Callable[..., Any]:
    def run(self: Streams, *other: Any) -> Any:
        return _run(getattr(Tensor, name), self, *other)

    return run


for _name in (each for each in _OF_VALUES if each.startswith("__")):
    setattr(Streams, _name, _operator(_name))
