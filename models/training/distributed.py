"""The processes that train together: those that torchrun started, or this one alone.

Every function here does nothing but return its argument where this process is alone. Otherwise all processes
must call it, in the same order. Tensors travel between their devices; what is on the host travels between
hosts, so that nobody waits for a GPU.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from models.training.errors import UsageError

T = TypeVar("T")


@contextmanager
def processes() -> Iterator[None]:
    """The process group that the environment describes, as torchrun sets it; none where it describes none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error, where others may never come to it


def rank() -> int:
    """The rank of this process; that of 0 writes all files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def total(values: Tensor) -> Tensor:
    """The processes' sum."""
    return _reduced(values, dist.ReduceOp.SUM)


def mean(values: Tensor) -> Tensor:
    """The processes' mean."""
    return total(values) / world_size()


def maximum(values: Tensor) -> Tensor:
    """The processes' maximum."""
    return _reduced(values, dist.ReduceOp.MAX)


def largest(value: int) -> int:
    """The largest of the processes' numbers, which are on the host."""
    return largest_each(value)[0]


def largest_each(*values: int) -> list[int]:
    """``largest`` of several numbers, in one exchange."""
    return list(values) if world_size() == 1 else [int(each) for each in maximum(torch.tensor(values))]


def gathered(value: T) -> list[T]:
    """Every process's plain value, in rank 0; nothing in the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.gather_object(value, values if rank() == 0 else None)
    return values if rank() == 0 else []


def from_first(make: Callable[[], T]) -> T:
    """Make an object in rank 0 and send it to every process; a UsageError there is raised everywhere."""
    if world_size() == 1:
        return make()
    made: list[Any] = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except UsageError as error:
            made[1] = str(error)
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise UsageError(made[1])
    result: T = made[0]
    return result


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """``module``, whose gradients become the processes' mean during the backward pass."""
    if world_size() == 1:
        return module
    # Statistics are frozen, synchronized, or averaged after the step by ``average_buffers``. Torch 2.13 has
    # another name for it and warns of the old one.
    known = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if known else "broadcast_buffers": False}
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **buffers)


@torch.no_grad()
def average_buffers(*modules: nn.Module) -> None:
    """Set floating-point buffers of modules on one device to the processes' mean, in one collective.

    Running statistics follow linearly what each process saw, so that with equal parts of a batch their mean
    is what one process would have with the whole.
    """
    if world_size() == 1:
        return
    buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
    means = mean(torch.cat([buffer.flatten() for buffer in buffers]))
    parts = means.split([buffer.numel() for buffer in buffers])
    torch._foreach_copy_(buffers, [part.view_as(own) for own, part in zip(buffers, parts, strict=True)])


def gradients_stay(module: nn.Module) -> AbstractContextManager[None]:
    """Keep the gradients of a ``parallel`` module in this context, for a later backward pass to reduce."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return values
    result = values.clone()
    dist.all_reduce(result, operation)
    return result
