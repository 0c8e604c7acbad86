"""Networks that are told which backend their ops run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from cen_ext import use_backend
from cen_ext.ops import dispatch

Network = TypeVar("Network", bound=nn.Module)


def with_backend(net: Network, backend: str | None) -> Network:
    """Name the backend of a network whose forward is ``runs_on_backend``; None leaves it to ``use_backend``.

    Raises:
        ValueError: no backend has that name.
    """
    dispatch.check_name(backend, dispatch.NAMES)
    net.backend = backend  # type: ignore[assignment]  # torch declares attributes to be tensors or modules
    return net


def runs_on_backend(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a network's forward pass run within ``cen_ext.use_backend`` of the one that it names."""

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        backend = getattr(self, "backend", None)  # networks that were pickled before they had one
        if backend is None:
            return forward(self, *args, **options)
        with use_backend(backend):
            return forward(self, *args, **options)

    return run
