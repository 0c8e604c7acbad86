"""Networks with some of their modalities: those of the present ones, to the last gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from cen_ext import present
from models.fusion import AsymFusion, Exchange, FixedPortion, NoFusion
from models.networks.fusion.base import FUSIONS
from tests.helpers import small_xception  # noqa: F401 - registers it
from tests.helpers.networks import randomise_norms

SUBSETS = [(2, (1,)), (3, (0, 2)), (4, (0, 2, 3))]


def refinenet(count: int, fusion: Any) -> nn.Module:
    options = {"width": 4, "dropout": 0.0, "frozen_statistics": False}
    return models.refinenet("plain_net", 5, count, fusion=fusion, **options).double()


def with_rows_of(net: nn.Module, whole: nn.Module, count: int, chosen: tuple[int, ...]) -> nn.Module:
    """The weights of a network of ``count`` modalities in one of the chosen ones."""
    state, own = whole.state_dict(), net.state_dict()
    for key, value in own.items():
        given = state[key]
        if given.shape != value.shape:
            rows = given.unflatten(0, (count, -1))[list(chosen)]
            given = rows.reshape(value.shape)
        own[key] = given
    net.load_state_dict(own)
    return net


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("private", [False, True])
def test_a_network_is_one_of_the_present_modalities(training: bool, private: bool) -> None:
    """Anywhere, as shares of the channels depend on how many modalities there are in all."""
    torch.manual_seed(0)
    fusion = Exchange(threshold=0.02, region="all", convolutions="private" if private else "shared")
    for count, chosen in SUBSETS:
        whole = refinenet(count, fusion).train(training)
        randomise_norms(whole)
        with torch.no_grad():
            whole.alpha.normal_()
        other = with_rows_of(refinenet(len(chosen), fusion), whole, count, chosen).train(training)
        x = torch.randn(len(chosen) * 2, 3, 32, 33, dtype=torch.float64)
        with present(whole, chosen):
            out = whole(x)
            weights = whole.branch_weights()
        expected = other(x)
        for name in ("branches", "ensemble", "alpha"):
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
        assert weights == expected.alpha.tolist()
        for result in (out, expected):
            (result.branches.square().sum() + result.ensemble.sum()).backward()
        theirs = dict(other.named_parameters())
        for key, parameter in whole.named_parameters():
            grad = parameter.grad
            if grad.shape != theirs[key].shape:
                tables = grad.unflatten(0, (count, -1))
                assert not tables[[m for m in range(count) if m not in chosen]].any()
                grad = tables[list(chosen)].reshape(theirs[key].shape)
            torch.testing.assert_close(grad, theirs[key].grad, rtol=1e-6, atol=1e-8)
        for key, buffer in other.named_buffers():
            rows = dict(whole.named_buffers())[key]
            torch.testing.assert_close(rows if rows.shape == buffer.shape else rows[list(chosen)], buffer)


def unet(count: int, fusion: Any) -> nn.Module:
    options = {"size": 8, "base_width": 8, "dropout": 0.0, "decoder_norms": "private"}
    return models.unet(num_modalities=count, fusion=fusion, **options).double()


def pspnet(count: int, fusion: Any) -> nn.Module:
    options = {"width": 8, "dropout": 0.0, "frozen_statistics": False}
    return models.pspnet("resnet18", 5, count, fusion=fusion, **options).double()


def deeplab(count: int, fusion: Any) -> nn.Module:
    options = {"width": 8, "dropout": 0.0, "frozen_statistics": False}
    return models.deeplabv3plus("small_xception", 5, count, fusion=fusion, **options).double()


@pytest.mark.parametrize(
    ("build", "fusion", "chosen"),
    [
        (pspnet, Exchange(region="all"), (0, 2)),
        (deeplab, NoFusion(norms="shared"), (1,)),
        (deeplab, AsymFusion(), (0, 2)),
        (unet, Exchange(region="all"), (0, 2)),
        (unet, AsymFusion(), (1,)),
        (refinenet, NoFusion(), (1,)),
    ],
)
def test_all_networks(build: Callable[[int, Any], nn.Module], fusion: Any, chosen: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    whole, size = build(3, fusion), (16, 8) if build is unet else (33, 40)
    randomise_norms(whole)
    if len(chosen) == 1 and isinstance(fusion, AsymFusion):
        fusion = NoFusion()
    other = with_rows_of(build(len(chosen), fusion), whole, 3, chosen)
    x = torch.randn(len(chosen) * 2, 3, *size, dtype=torch.float64)
    for training in (True, False):
        whole.train(training)
        other.train(training)
        with present(whole, chosen):
            out = whole(x)
        expected = other(x)
        torch.testing.assert_close(out.branches, expected.branches, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(out.ensemble, expected.ensemble, rtol=1e-9, atol=1e-11)
        sides = [getattr(each, "auxiliary", ()) for each in (out, expected)]
        torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-11)


def test_a_list_of_the_present_modalities_and_of_too_many() -> None:
    net = refinenet(3, Exchange()).eval()
    x = [torch.randn(1, 3, 32, 32, dtype=torch.float64) for _ in range(3)]
    with present(net, [0, 1]):
        assert torch.equal(net(x[:2]).branches, net(torch.cat(x[:2])).branches)
        with pytest.raises(ValueError, match="has 2 modalities, but x is a list of 3"):
            net(x)


def test_a_fixed_portion_is_that_of_the_whole() -> None:
    fusion = FixedPortion(choice="random", portion=0.3, region="all")
    net = refinenet(3, fusion).eval()
    randomise_norms(net, small_scales=0)
    x = torch.randn(3, 1, 3, 32, 32, dtype=torch.float64)
    seen: dict[str, list[Tensor]] = {"whole": [], "part": []}
    points = [module for module in net.modules() if getattr(module, "exchange_point", False)]
    assert points
    for name, modalities, chosen in (("whole", x, (0, 1, 2)), ("part", x[[0, 2]], (0, 2))):
        with present(net, chosen):
            net(modalities.flatten(0, 1))
            seen[name] = [point.replaced()[[0, 2]] for point in points]
    assert all(torch.equal(*each) for each in zip(*seen.values(), strict=True))
    assert any(mask.any() for mask in seen["part"])


@pytest.mark.parametrize("name", sorted(name for name, kind in FUSIONS.members.items() if not kind.subsets))
def test_fusions_that_join_all_modalities(name: str) -> None:
    encoder = "resnet18" if FUSIONS[name]().after_stem else "plain_net"
    net = models.refinenet(encoder, 5, 2, width=4, fusion=name)
    message = rf"fusion={name} joins all modalities .*; networks with fusion=exchange or none or"
    with pytest.raises(ValueError, match=message), present(net, [0]):
        pass
    assert net.present is None
    assert all(module.__dict__.get("present") is None for module in net.modules())


@pytest.mark.parametrize("name", ["sum", "conditional_norm"])
def test_norms_that_join_all_modalities(name: str) -> None:
    norm = FUSIONS[name]().norm(8, 2, exchange_point=True)
    with pytest.raises(ValueError, match="cannot do without one"), present(norm, [0]):
        pass
