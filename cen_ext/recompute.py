"""Recomputation of norm outputs in the backward pass, instead of saving them.

A convolution saves its input for the backward pass, which is the output of the norm before it. That norm
saves its own input and statistics, from which one pass over memory recomputes the output.
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
    """A saved tensor and its version, because autograd checks no versions behind saved-tensor hooks."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        """Return the tensor; raise RuntimeError if it has been changed in place."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor that is needed for the gradients has been changed in place since: "
                f"{self.tensor.dtype} {tuple(self.tensor.shape)} is at version {self.tensor._version}, "
                f"expected {self.version}"
            )
        return self.tensor


class _Output(NamedTuple):
    """A norm output that can be recomputed."""

    storage: StorageWeakRef
    version: int
    shape: torch.Size
    strides: tuple[int, ...]
    compute: Compute

    def is_of(self, tensor: Tensor) -> bool:
        """Whether tensor is the whole output, unchanged, rather than a view of it."""
        return (
            not self.storage.expired()  # type: ignore[no-untyped-call]
            and self.version == tensor._version
            and self.shape == tensor.shape
            and self.strides == tensor.stride()
        )


_OUTPUTS: ContextVar[dict[int, _Output] | None] = ContextVar("outputs", default=None)


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """Context in which outputs of exchanging batch norms are recomputed for the backward pass, not saved.

    Every operation that would save such an output (a convolution, pooling, the next norm's residual)
    recomputes it when its gradient is computed. Wrap only the forward pass. Outputs of calls with a residual
    are saved, because each would need the previous one through a chain of blocks, and so are those of
    instance norms. Compiled graphs are not affected: their compiler decides what to save.

    Gradients equal those of the usual pass up to rounding, and bitwise with given statistics. As usual, the
    backward pass raises RuntimeError if a tensor that it needs has been changed in place.
    """
    outputs: dict[int, _Output] = {}
    token = _OUTPUTS.set(outputs)

    def pack(tensor: Tensor) -> Compute:
        output = outputs.get(tensor.untyped_storage()._cdata)
        if output is not None and output.is_of(tensor):
            return output.compute
        # Detached, because an operation that saves its own output would form a reference cycle with it.
        return _Kept(tensor.detach(), tensor._version).get

    def unpack(packed: Compute) -> Tensor:
        return packed()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _OUTPUTS.reset(token)
        outputs.clear()  # the graph owns the recomputations from now on


def note(y: Tensor, compute: Compute) -> None:
    """Register ``compute`` to recompute y, if within ``recompute_outputs``."""
    outputs = _OUTPUTS.get()
    if outputs is not None and y.requires_grad:
        storage = y.untyped_storage()
        weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        outputs[storage._cdata] = _Output(weak, y._version, y.shape, y.stride(), compute)


def active() -> bool:
    """Whether eager code runs within ``recompute_outputs``."""
    return not torch.compiler.is_compiling() and _OUTPUTS.get() is not None
