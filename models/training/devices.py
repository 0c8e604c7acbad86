"""The device that a setting names."""

from __future__ import annotations

import torch

from models.messages import first_line
from models.training.errors import UsageError


def device_of(name: str) -> torch.device:
    """The device that ``run.device`` names; ``auto`` is CUDA's first where there is one.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"run.device={name}: not a device of this machine ({first_line(error)})") from None
    return device
