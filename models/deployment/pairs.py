"""Which norm normalizes what a convolution returns, and nothing else reads: found by running the network."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cen_ext import use_backend
from cen_ext.modules import ExchangeNorm

# Methods and attributes that tell about a tensor without reading its values.
_TELLING = frozenset(
    (
        *("device", "dim", "dtype", "is_contiguous", "layout", "ndim", "numel", "requires_grad"),
        *("shape", "size", "stride"),
    )
)


class Pair(NamedTuple):
    """A convolution and the norm after it, by their names.

    Attributes:
        conv, norm: the two.
        adds: whether the norm takes a residual.
        feeds: the convolution of another pair, if that alone reads what the norm returns.
    """

    conv: str
    norm: str
    adds: bool = False
    feeds: str | None = None


def find_pairs(net: nn.Module, x: Any) -> tuple[Pair, ...]:
    """The pairs in a network, in the order of computation.

    A module that is called several times, or that has hooks of its own, is in none.

    Args:
        net: in evaluation mode.
        x: an input that it runs on.
    """
    watch = _Watch(net)
    with torch.no_grad(), use_backend("reference"), watch, watch.hooks():
        output = net(x)
    watch.read(output)
    return tuple(watch.pairs())


class _Watch(TorchFunctionMode):
    """Sees in a forward pass who makes and who reads each result of a convolution or an exchanging norm."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._layers: dict[str, nn.Module] = {
            name: module
            for name, module in net.named_modules()
            if isinstance(module, _ConvNd | ExchangeNorm)
            and not (module._forward_hooks or module._forward_pre_hooks)
        }
        self._calls: Counter[str] = Counter()
        # By id; the results are held, so that no other tensor gets the id of one.
        self._results: dict[int, tuple[str, Tensor]] = {}
        self._readers: dict[str, list[str]] = {}  # by who made it; "": something that is no such layer
        self._adding: set[str] = set()  # layers that take tensors besides
        self._inside = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within it the layers tell when they are called."""
        handles: list[Any] = []
        for name, layer in self._layers.items():
            enter, leave = (functools.partial(each, name) for each in (self._enter, self._leave))
            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, values: Any, by: str = "") -> None:
        """Note who reads the results among these values."""
        for value in tree_leaves(values):
            maker, result = self._results.get(id(value), ("", None))
            if result is value and maker:
                self._readers.setdefault(maker, []).append(by)

    def pairs(self) -> Iterator[Pair]:
        """What was seen."""
        convs = {  # by the norms that alone read their results
            reader: conv
            for conv, layer in self._layers.items()
            if isinstance(layer, _ConvNd)
            and isinstance(self._layers.get(reader := self._only_reader(conv) or ""), ExchangeNorm)
        }
        paired = {*convs.values()}
        for norm in self._calls:
            if norm in convs and self._calls[norm] == 1:
                feeds = self._only_reader(norm)
                yield Pair(convs[norm], norm, norm in self._adding, feeds if feeds in paired else None)

    def _only_reader(self, name: str) -> str | None:
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 and self._calls[name] == 1 else None

    def _enter(self, name: str, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._calls[name] += 1
        self.read(args[:1], by=name)
        besides = (args[1:], options)
        self.read(besides)  # a residual is not what it normalizes
        if any(isinstance(value, Tensor) for value in tree_leaves(besides)):
            self._adding.add(name)
        self._inside = True

    def _leave(self, name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._inside = False
        if isinstance(output, Tensor):
            self._results[id(output)] = (name, output)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(getattr(function, "__self__", None), "__name__", "")
        if not self._inside and name not in _TELLING:
            self.read((args, kwargs))
        return function(*args, **(kwargs or {}))
