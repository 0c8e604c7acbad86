"""Outputs of norms that are computed again in the backward pass instead of kept for it.

A convolution keeps its input for the backward pass: the output of the norm before it. That norm keeps its own
input, from which the output follows in one pass over memory, without the statistics' one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Compute = Callable[[], Tensor]


class _Kept(NamedTuple):
    """A tensor that is kept, and its version then: where there are hooks, autograd looks for no changes."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        """The tensor, if it is as it was."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that is needed for the gradients has been changed in place since: "
                f"{self.tensor.dtype} {tuple(self.tensor.shape)} is at version {self.tensor._version}, "
                f"expected {self.version}"
            )
        return self.tensor


class _Output(NamedTuple):
    """An output that can be computed again."""

    storage: StorageWeakRef
    version: int
    shape: torch.Size
    strides: tuple[int, ...]
    compute: Compute

    def is_of(self, tensor: Tensor) -> bool:
        """Whether tensor is the output, unchanged, and not a part or another view of it."""
        return (
            not self.storage.expired()  # type: ignore[no-untyped-call]
            and self.version == tensor._version
            and self.shape == tensor.shape
            and self.strides == tensor.stride()
        )


_OUTPUTS: ContextVar[dict[int, _Output] | None] = ContextVar("outputs", default=None)


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Within this context, outputs of exchanging batch norms are not kept for the backward pass.

    Whatever would keep such an output (a convolution, pooling, the next norm's residual) gets it computed
    again, once for each of them, when its gradient is due. Wrap the forward pass alone. Outputs of calls with
    a residual are kept, since a chain of blocks would hang on them, and so are those of instance norms.
    Compiled graphs are left alone: their compiler decides for itself what to keep.

    The gradients are those of the usual pass up to rounding, bit for bit with given statistics. As there, the
    backward pass raises RuntimeError where a tensor that it needs has been changed in place.
    """
    outputs: dict[int, _Output] = {}
    token = _OUTPUTS.set(outputs)

    def pack(tensor: Tensor) -> Compute:
        output = outputs.get(tensor.untyped_storage()._cdata)
        if output is not None and output.is_of(tensor):
            return output.compute
        # Detached: an operation that keeps its own output would keep itself, and all before it, for ever.
        return _Kept(tensor.detach(), tensor._version).get

    def unpack(packed: Compute) -> Tensor:
        return packed()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _OUTPUTS.reset(token)
        outputs.clear()  # what they hold is the graph's from now on


def note(y: Tensor, compute: Compute) -> None:
    """Let ``compute`` stand for y in graphs of a surrounding ``recompute_outputs``."""
    outputs = _OUTPUTS.get()
    if outputs is not None and y.requires_grad:
        storage = y.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        outputs[storage._cdata] = _Output(weak, y._version, y.shape, y.stride(), compute)


def active() -> bool:
    """Whether outputs are to be noted."""
    return not torch.compiler.is_compiling() and _OUTPUTS.get() is not None
