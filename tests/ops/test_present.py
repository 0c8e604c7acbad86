"""``cen_ext.present``: layers and networks with some of their modalities."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cen_ext
from cen_ext import (
    ExchangeBatchNorm2d,
    ExchangeGroupNorm,
    ExchangeInstanceNorm2d,
    ExchangeLayerNorm,
    masks,
    present,
)

C, N = 12, 2
DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "batch": ExchangeBatchNorm2d,
    "instance": partial(ExchangeInstanceNorm2d, track_running_stats=True),
    "group": partial(ExchangeGroupNorm, 3),
    "layer": partial(ExchangeLayerNorm, channel_dim=1),
}
BACKENDS = [name for name, state in cen_ext.available_backends().items() if state == "ok"]
SUBSETS = [
    (count, chosen)
    for count in (2, 3, 4)
    for size in range(1, count)
    for chosen in itertools.combinations(range(count), size)
]


def randomised(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight.uniform_(-1, 1)
        layer.bias.uniform_(-1, 1)
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    return layer


def own_shares(count: int) -> Tensor:
    shares = torch.zeros(count, C, dtype=torch.bool)
    for m in range(count):
        shares[m, m * C // count : (m + 1) * C // count] = True
    return shares


def alone(kind: str, whole: nn.Module, chosen: tuple[int, ...], **rule: Any) -> nn.Module:
    """A layer of the chosen modalities only, with their rows of everything."""
    layer = LAYERS[kind](C, len(chosen), activation="relu", **rule, **DOUBLE)
    rows = list(chosen)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(whole, name, None) is not None:
                getattr(layer, name).copy_(getattr(whole, name).detach()[rows])
    return layer


@pytest.mark.parametrize("region", ["own", "all"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_one_of_the_present_modalities(kind: str, training: bool, region: str) -> None:
    """Of the operator's own definition for them: each modality gives up what it gives up in the whole."""
    torch.manual_seed(0)
    for count, chosen in SUBSETS:
        options = {"threshold": 0.5, "region": region, "activation": "relu"}
        whole = randomised(LAYERS[kind](C, count, **options, **DOUBLE)).train(training)
        # Anywhere, that is the rule of a layer of these alone; else it is that of their shares among all.
        rule: dict[str, Any] = {"threshold": 0.5, "region": "all"}
        if region == "own":
            rule = {"replaced": ((whole.weight.detach().abs() < 0.5) & own_shares(count))[list(chosen)]}
        other = alone(kind, whole, chosen, **rule).train(training)
        before = {name: value.clone() for name, value in whole.state_dict().items()}
        x = torch.randn(len(chosen) * N, C, 3, 4, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        residual = torch.randn_like(x)
        with present(whole, chosen):
            y = whole(inputs[0], residual)
        expected = other(inputs[1], residual)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for result in (y, expected):
            (
                result * torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)
            ).sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
        for name in ("weight", "bias"):
            grad = getattr(whole, name).grad
            torch.testing.assert_close(grad[list(chosen)], getattr(other, name).grad, rtol=1e-10, atol=1e-12)
            assert not grad[[m for m in range(count) if m not in chosen]].any()
        for name in ("running_mean", "running_var"):
            if name not in before:
                continue
            after = whole.state_dict()[name]
            torch.testing.assert_close(after[list(chosen)], getattr(other, name), rtol=1e-12, atol=1e-12)
            for m in set(range(count)) - set(chosen):
                assert torch.equal(after[m], before[name][m])


@pytest.mark.parametrize("order", ["modality", "sample"])
@pytest.mark.parametrize(
    "backend", [name for name, state in cen_ext.available_backends().items() if state == "ok"]
)
def test_on_every_backend_and_in_both_orders(backend: str, order: str) -> None:
    torch.manual_seed(1)
    layer = randomised(ExchangeBatchNorm2d(C, 3, threshold=0.5, region="all", order=order, backend=backend))
    modalities = torch.randn(3, 4, C, 5, 5)
    other = ExchangeBatchNorm2d(C, 2, threshold=0.5, region="all", backend="reference")
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(other, name).copy_(getattr(layer, name)[[0, 2]])
    with present(layer, [0, 2]):
        y = layer(cen_ext.stack_modalities([modalities[0], modalities[2]], order=order))
    expected = other(modalities[[0, 2]].flatten(0, 1))
    found = torch.stack(cen_ext.unstack_modalities(y, 2, order=order)).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.running_var[[0, 2]], other.running_var, rtol=1e-5, atol=1e-6)


def test_masks_are_of_all_modalities_and_lenders_of_the_present_ones() -> None:
    torch.manual_seed(2)
    x = torch.randn(4 * N, C, 3, 3, dtype=torch.float64)
    rows = x.view(4, N, C, 3, 3)
    masked = randomised(ExchangeBatchNorm2d(C, 4, mask=partial(masks.quantile, q=0.5), **DOUBLE)).eval()
    replaced = masks.quantile(masked.weight.detach(), 0.5)
    with present(masked, [1, 2, 3]):
        y = masked(rows[1:].flatten(0, 1)).view(3, N, C, 3, 3)
        assert torch.equal(masked.replaced()[1:], replaced[1:])
        assert not masked.replaced()[0].any()
    z = affine(masked, rows)
    expected = torch.stack(
        [torch.where(spread(replaced[m]), (z[1:].sum(0) - z[m]) / 2, z[m]) for m in (1, 2, 3)]
    )
    torch.testing.assert_close(y, expected)

    # Modality m borrows of the next one: 3 of 0, which is absent, so that it gets the others' mean.
    everything = torch.ones(4, C, dtype=torch.bool)
    lender = torch.tensor([[1], [2], [3], [0]]).expand(4, C)
    lending = randomised(ExchangeBatchNorm2d(C, 4, replaced=everything, lender=lender, **DOUBLE)).eval()
    z = affine(lending, rows)
    with present(lending, [1, 2, 3]):
        y = lending(rows[1:].flatten(0, 1)).view(3, N, C, 3, 3)
    torch.testing.assert_close(y, torch.stack([z[2], z[3], (z[1] + z[2]) / 2]))
    with present(lending, [2]):
        torch.testing.assert_close(lending(rows[2]), z[2])
        assert not lending.replaced().any()


def affine(layer: nn.Module, rows: Tensor) -> Tensor:
    def table(name: str) -> Tensor:
        return getattr(layer, name).detach()[:, None, :, None, None]

    xhat = (rows - table("running_mean")) / (table("running_var") + layer.eps).sqrt()
    return table("weight") * xhat + table("bias")


def spread(mask: Tensor) -> Tensor:
    return mask[None, :, None, None]


def test_all_modalities_are_the_same_bits_and_nothing_is_left() -> None:
    torch.manual_seed(3)
    layer = randomised(ExchangeBatchNorm2d(C, 3, threshold=0.5))
    net = nn.Sequential(layer, ExchangeBatchNorm2d(C, 1)).eval()
    x = torch.randn(6, C, 3, 3)
    expected, plain = net(x), dict(layer.__dict__)
    with present(net, range(3)):
        assert torch.equal(net(x), expected)
    with present(net, [1]):
        assert net(x[:2]).shape == (2, C, 3, 3)  # the norm that all share takes any rows
        with present(net, [0, 2]):
            net(x[:4])
        assert layer.present == (1,)
        with pytest.raises(ValueError, match="residual"), present(net, [0, 2]):
            layer(x[:4], x)
        assert layer.present == (1,)
    assert layer.__dict__.keys() == plain.keys()
    assert torch.equal(net(x), expected)


def test_compiled_networks_know_which_are_present() -> None:
    """A graph for each choice of them, and one for all."""
    torch.manual_seed(5)
    layer = randomised(ExchangeBatchNorm2d(C, 3, threshold=0.5, region="all", backend="reference"))
    net = nn.Sequential(nn.Conv2d(C, C, 1), layer)
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend="eager")
    x = torch.randn(3, 2, C, 4, 4)
    for chosen in ((0, 1, 2), (0, 2), (0, 1, 2)):
        twin = copy.deepcopy(net)
        with present(net, chosen), present(twin, chosen):
            y, expected = (each(x[list(chosen)].flatten(0, 1)) for each in (compiled, twin))
        assert torch.equal(y, expected)
        assert torch.equal(layer.running_mean, twin[1].running_mean)


def test_converted_networks_and_private_norms() -> None:
    torch.manual_seed(4)
    single = nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.LayerNorm(6))
    with pytest.warns(UserWarning, match="RMSNorm"):  # which becomes private copies that do not exchange
        net = cen_ext.make_multimodal(single, 3, threshold=0.5).double()
    with torch.no_grad():
        net[1].weight.uniform_(-1, 1)
        net[2].weight.uniform_(-1, 1)
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    with present(net, [0, 2]):
        y = net(x[[0, 2]].flatten(0, 1)).view(2, 2, 6)
    replaced = (net[2].weight.detach().abs() < 0.5) & (torch.arange(6) // 2 == torch.arange(3)[:, None])
    assert replaced[[0, 2]].any()
    z = []
    for m in (0, 2):
        h = net[0](x[m])
        h = h / (h.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * net[1].weight[m]
        z.append(nn.functional.layer_norm(h, [6]) * net[2].weight[m] + net[2].bias[m])
    expected = [torch.where(replaced[m], z[1 - i], z[i]) for i, m in enumerate((0, 2))]
    torch.testing.assert_close(y, torch.stack(expected))


@pytest.mark.parametrize(
    ("modalities", "error", "message"),
    [
        ([], ValueError, r"some of 0 to 2, ascending, got \[\]"),
        ([2, 0], ValueError, r"got \[2, 0\]"),
        ([1, 1], ValueError, "ascending"),
        ([3], ValueError, r"got \[3\]"),
        ([-1, 1], ValueError, "some of 0 to 2"),
        (["depth"], TypeError, "sequence of integers"),
        (1, TypeError, "sequence of integers, got 1"),
    ],
)
def test_modalities_that_are_none(modalities: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), present(ExchangeBatchNorm2d(C, 3), modalities):
        pass


def test_networks_that_cannot() -> None:
    with pytest.raises(ValueError, match="got none"), present(nn.BatchNorm2d(C), [0]):
        pass
    both = nn.Sequential(ExchangeBatchNorm2d(C, 3), ExchangeBatchNorm2d(C, 2))
    with pytest.raises(ValueError, match="got layers of 2 and 3 modalities"), present(both, [0]):
        pass
    averaging = ExchangeBatchNorm2d(C, 2, momentum=None)
    with present(averaging, [0]):
        with pytest.raises(ValueError, match="momentum=None averages"):
            averaging(torch.randn(2, C, 3, 3))
        assert averaging.eval()(torch.randn(2, C, 3, 3)).shape == (2, C, 3, 3)
    with present(averaging, [0]), pytest.raises(ValueError, match="residual must have shape"):
        averaging(torch.randn(2, C, 3, 3), torch.randn(4, C, 3, 3))
