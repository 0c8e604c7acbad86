"""The rules of tests/golden/README.md: released names, weights drawn from them, comparison."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def released_form(names: dict[str, list[str]], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of our network (weights or gradients) by their released names."""
    released = {}
    for key, value in state.items():
        rows = len(names[key])
        entries = [value] * rows
        if value.dim() == 2 or (rows > 1 and value.dim() == 1):  # statistics, or scales and shifts
            entries = list(value.view(rows, -1))
        released.update(zip(names[key], entries, strict=True))
    return released


def draw(key: str, shape: list[int]) -> Tensor:
    """A weight as a function of its released name; the recipe of tests/golden/README.md."""
    r = np.random.RandomState(zlib.crc32(f"0:{key}".encode()))
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf in ("running_mean", "bias"):
        value = 0.1 * r.standard_normal(shape)
    elif leaf == "running_var":
        value = r.uniform(0.5, 1.5, shape)
    elif leaf == "weight" and len(shape) == 1:
        value = r.uniform(0.3, 0.8, shape) * np.where(r.uniform(size=shape) < 0.5, -1, 1)
        small = r.uniform(size=shape) < 0.3
        value = np.where(small, r.uniform(-0.009, 0.009, shape), value)
    elif leaf == "weight":
        value = r.standard_normal(shape) * np.sqrt(0.8 / np.prod(shape[1:]))
    else:  # alpha and the inputs
        value = r.standard_normal(shape)
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def assert_matches(found: Tensor, golden: dict[str, Any], tolerance: float, common: float = 0.0) -> None:
    """Norm, sum and head within ``tolerance`` of the norm (of the typical element for the head).

    Args:
        common: relative error that all elements may have in common, as those of one biased rounding do; they
            add up in the sum, where errors that are independent cancel.
    """
    found = found.double()
    head = torch.tensor(golden["head"], dtype=torch.float64)
    assert found.norm().item() == pytest.approx(golden["norm"], rel=tolerance)
    assert found.sum().item() == pytest.approx(
        golden["sum"], abs=(tolerance + common * found.numel() ** 0.5) * golden["norm"]
    )
    typical = golden["norm"] / found.numel() ** 0.5
    assert (found.flatten()[: len(head)] - head).abs().max().item() <= tolerance * typical
