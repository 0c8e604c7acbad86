"""The device that a setting names, and the memory that was used on it."""

from __future__ import annotations

import sys

import torch

from models.networks.messages import first_line
from models.training import distributed
from models.training.errors import UsageError


def device_of(name: str) -> torch.device:
    """The device that ``run.device`` names; ``auto`` is CUDA's where there is one.

    Of several processes on a machine, each gets a GPU of its own.

    Raises:
        UsageError: no such device here, or neither a CPU nor CUDA's; one GPU for several processes.
    """
    several = distributed.world_size() > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if several and name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    elif several and name != "cpu":
        raise UsageError(
            f"run.device={name}: each process gets a GPU of its own; expected auto, cuda or cpu with torchrun"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"run.device={name}: not a device of this machine ({first_line(error)}); "
            "give run.device=auto, or run.device=cpu"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"run.device={name}: expected auto, cpu, cuda, or cuda:1 and so on")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, graphs and collectives are those of the current one
    return device


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process held at most: of tensors on a GPU, resident ones on a CPU.

    A GPU is not waited for. What the process did before counts as well; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
