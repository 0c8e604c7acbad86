"""The network written a second time, the usual way, gives the same values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from networks import randomise_norms
from torch import Tensor

import models
from bench.straightforward import StraightforwardRefineNet, split_state, stacked_state

CASES = [
    # encoder, modalities, region, frozen statistics
    ("resnet18", 2, "own", True),
    ("resnet18", 3, "all", False),
    ("resnet50", 2, "all", True),
    ("resnet50", 3, "own", False),
    ("resnet34", 1, "own", False),
]


def pair(
    encoder: str, num_modalities: int, region: str, frozen: bool
) -> tuple[models.RefineNet, StraightforwardRefineNet]:
    """The two networks with equal float64 weights."""
    options = {"region": region, "dropout": 0.0, "width": 6, "frozen_statistics": frozen}
    net = models.refinenet(encoder, 5, num_modalities, **options).double()
    randomise_norms(net)
    torch.nn.init.normal_(net.alpha)
    usual = StraightforwardRefineNet(encoder, 5, num_modalities, **options).double()
    usual.load_state_dict(split_state(net.state_dict()))
    return net, usual


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("encoder", "num_modalities", "region", "frozen"), CASES)
def test_values_gradients_and_statistics(
    encoder: str, num_modalities: int, region: str, frozen: bool
) -> None:
    net, usual = pair(encoder, num_modalities, region, frozen)
    net.train()
    usual.train()
    xs = [torch.randn(2, 3, 33, 49, dtype=torch.float64) for _ in range(num_modalities)]
    dys = [torch.randn(2, 5, 9, 13, dtype=torch.float64) for _ in range(num_modalities + 1)]

    out = net(xs)
    branches, ensemble = usual(xs)
    for m in range(num_modalities):
        assert_close(out.branches[m], branches[m], f"branch {m}")
    assert_close(out.ensemble, ensemble, "ensemble")

    sum((y * dy).sum() for y, dy in zip([*out.branches, out.ensemble], dys, strict=True)).backward()
    sum((y * dy).sum() for y, dy in zip([*branches, ensemble], dys, strict=True)).backward()
    expected = stacked_state({name: p.grad for name, p in usual.named_parameters()})
    found = {name: p.grad for name, p in net.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], f"gradient of {name}")
    buffers = stacked_state(dict(usual.named_buffers()))
    for name, buffer in net.named_buffers():
        assert_close(buffer.double(), buffers[name].double(), name)


def test_states_convert_both_ways() -> None:
    net, usual = pair("resnet50", 2, "own", True)
    back = stacked_state(usual.state_dict())
    assert back.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(back[name], value), name
