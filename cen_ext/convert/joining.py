"""Classes of layers that are of the library's class and of their original's, too."""

from __future__ import annotations

from typing import Any

from torch import nn

_joined: dict[tuple[type, type], type] = {}


def joined_class(ours: type, theirs: type) -> Any:
    """A class with what both have, ours first, whose instances can be pickled.

    Raises:
        TypeError: there can be no such class.
    """
    if (ours, theirs) not in _joined:
        own = {"__module__": ours.__module__, "__reduce_ex__": _reduce_joined}
        _joined[ours, theirs] = type(f"{ours.__name__}[{theirs.__name__}]", (ours, theirs), own)
    return _joined[ours, theirs]


def _reduce_joined(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    ours, theirs = type(self).__bases__
    reduced: Any = super(type(self), self).__reduce_ex__(protocol)
    return new_joined, (ours, theirs), *reduced[2:]


def new_joined(ours: type, theirs: type) -> Any:
    """An instance without attributes, which unpickling fills."""
    cls = joined_class(ours, theirs)
    return cls.__new__(cls)
