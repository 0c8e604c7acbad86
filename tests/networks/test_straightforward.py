"""The network written a second time, the usual way, gives the same values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import models
from bench.baselines.exchange import exchange, exchange_where, split_state, stacked_state
from bench.baselines.segmentation import (
    EagerNetwork,
    EagerPSPNet,
    EagerRefineNet,
)
from tests.helpers.networks import randomise_norms

CASES = [
    # network, encoder, modalities, region, frozen statistics
    ("refinenet", "resnet18", 2, "own", True),
    ("refinenet", "resnet18", 3, "all", False),
    ("refinenet", "resnet50", 2, "all", True),
    ("refinenet", "resnet50", 3, "own", False),
    ("refinenet", "resnet34", 1, "own", False),
    ("pspnet", "resnet18", 3, "own", False),
    ("pspnet", "resnet50", 2, "all", True),
]
EAGER_NETWORKS = {"refinenet": EagerRefineNet, "pspnet": EagerPSPNet}


def pair(
    network: str, encoder: str, num_modalities: int, region: str, frozen: bool
) -> tuple[models.RefineNet | models.PSPNet, EagerNetwork]:
    """The two networks with equal float64 weights."""
    options = {"region": region, "dropout": 0.0, "width": 6, "frozen_statistics": frozen}
    net = getattr(models, network)(encoder, 5, num_modalities, **options).double()
    randomise_norms(net)
    torch.nn.init.normal_(net.alpha)
    usual = EAGER_NETWORKS[network](encoder, 5, num_modalities, **options).double()
    usual.load_state_dict(split_state(net.state_dict(), usual))
    return net, usual


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("network", "encoder", "num_modalities", "region", "frozen"), CASES)
def test_values_gradients_and_statistics(
    network: str, encoder: str, num_modalities: int, region: str, frozen: bool
) -> None:
    net, usual = pair(network, encoder, num_modalities, region, frozen)
    net.train()
    usual.train()
    xs = [torch.randn(2, 3, 33, 49, dtype=torch.float64) for _ in range(num_modalities)]

    out = net(xs)
    branches, ensemble, auxiliary = usual(xs)
    found = [*out.branches, out.ensemble, *(branch for side in out.auxiliary for branch in side)]
    expected = [*branches, ensemble, *auxiliary]
    for i, (y, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(y, other, f"output {i}")

    dys = [torch.randn_like(y) for y in expected]
    for outputs in (found, expected):
        sum((y * dy).sum() for y, dy in zip(outputs, dys, strict=True)).backward()
    expected = stacked_state({name: p.grad for name, p in usual.named_parameters()})
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], f"gradient of {name}")
    buffers = stacked_state(dict(usual.named_buffers()))
    for name, buffer in net.named_buffers():
        assert_close(buffer.double(), buffers[name].double(), name)


def test_states_convert_both_ways() -> None:
    net, usual = pair("pspnet", "resnet50", 2, "own", True)
    back = stacked_state(usual.state_dict())
    assert back.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(back[name], value), name


def test_the_exchange_that_compilers_get_is_the_same() -> None:
    masks = [torch.rand(6) < 0.4 for _ in range(3)]
    xs = [torch.randn(2, 6, 3, 4, dtype=torch.float64) for _ in masks]
    for found, expected in zip(exchange_where(xs, masks), exchange(xs, masks), strict=True):
        assert torch.equal(found, expected)
