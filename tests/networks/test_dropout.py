"""Dropout against its definition, on the mask that it drew."""

from __future__ import annotations

import pytest
import torch

from bench.harness.memory import tensor_bytes
from models.networks.dropout import Dropout


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout(p: float, inplace: bool) -> None:
    x = torch.rand(2, 3, 40, 50, dtype=torch.float64) + 1
    leaf = x.clone().requires_grad_()
    y = Dropout(p)(leaf * 1, inplace)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.03)
    scale = 1 / (1 - p) if p < 1 else 0.0
    torch.testing.assert_close(y, torch.where(kept, x * scale, 0), rtol=1e-15, atol=0)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close(dx, torch.where(kept, dy * scale, 0), rtol=1e-15, atol=0)
    assert Dropout(p).eval()(leaf, inplace) is leaf


def test_the_mask_takes_a_byte_per_value() -> None:
    x = torch.rand(1000, 1000, requires_grad=True)
    held, _ = tensor_bytes(lambda: Dropout(0.5)(x))
    assert held == pytest.approx(5 * x.numel(), rel=1e-3)
