"""Makers of masks against plain loops, and layers that make theirs of the scales in every step."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, masks, sparsity_penalty

REGIONS = ("own", "all", "tensor")
quick = settings(max_examples=40, deadline=None, derandomize=True)
scales = st.builds(
    lambda m, c, seed: torch.randn(m, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 10**6),
)


def allowed_of(weight: Tensor, region: str) -> tuple[str | Tensor, list[list[bool]]]:
    """The argument for a region, and what it allows by a plain loop."""
    count, channels = weight.shape
    if region == "tensor":
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
        return drawn, drawn.tolist()
    own = [
        [m * channels // count <= c < (m + 1) * channels // count for c in range(channels)]
        for m in range(count)
    ]
    return region, own if region == "own" else [[True] * channels for _ in range(count)]


@quick
@given(scales, st.sampled_from(REGIONS), st.sampled_from(["abs", "signed"]), st.sampled_from([0, 1, 2]))
def test_threshold(weight, region, criterion, dims):
    region, allowed = allowed_of(weight, region)
    theta = torch.linspace(0.1, 1.5, weight.numel(), dtype=torch.float64).view(weight.shape)
    theta = (0.6, theta[:, 0], theta)[dims]
    found = masks.threshold(weight, theta, region, criterion)
    each = torch.as_tensor(theta, dtype=torch.float64)
    each = (each[:, None] if each.dim() == 1 else each).expand(weight.shape)
    for m, row in enumerate(weight.tolist()):
        for c, scale in enumerate(row):
            below = abs(scale) < each[m, c] if criterion == "abs" else scale <= each[m, c]
            assert found[m, c] == (below and allowed[m][c])


def test_threshold_is_the_operators():
    weight = torch.randn(3, 32)
    for region in ("own", "all"):
        expected = cen_ext.replaced_channels(weight, 0.5, region)
        assert expected.any()
        assert torch.equal(masks.threshold(weight, 0.5, region), expected)


@quick
@given(scales, st.sampled_from(REGIONS), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_quantile(weight, region, q):
    region, allowed = allowed_of(weight, region)
    found = masks.quantile(weight, q, region)
    for m, row in enumerate(weight.abs().tolist()):
        place = q * (len(row) - 1)
        low, high = (sorted(row)[i] for i in (math.floor(place), math.ceil(place)))
        theta = low + (high - low) * (place - math.floor(place))
        for c, scale in enumerate(row):
            if abs(scale - theta) > 1e-12:  # the quantile itself may be a scale
                assert found[m, c] == (scale < theta and allowed[m][c])


def first_valley(row: list[float], bins: int) -> float | None:
    """θ of one modality, by counting."""
    low, high = min(row), max(row)
    width = (high - low) / bins
    edges = [low + width * i for i in range(bins + 1)]
    counts = [
        sum(1 for s in row if (s >= edges[i] or i == 0) and (s < edges[i + 1] or i == bins - 1))
        for i in range(bins)
    ]
    for i in range(1, bins - 1):
        if counts[i] < max(counts[:i]) and counts[i + 1] > counts[i]:
            return (edges[i] + edges[i + 1]) / 2
    return None


@quick
@given(scales, st.sampled_from(REGIONS), st.integers(3, 12))
def test_valley(weight, region, bins):
    region, allowed = allowed_of(weight, region)
    found = masks.valley(weight, bins, region)
    for m, row in enumerate(weight.abs().tolist()):
        theta = first_valley(row, bins)
        for c, scale in enumerate(row):
            assert found[m, c] == (theta is not None and scale < theta and allowed[m][c])


def test_the_valley_lies_between_two_hills():
    weight = torch.cat([torch.full((2, 30), 0.1), torch.full((2, 70), 1.0)], 1) + 0.02 * torch.rand(2, 100)
    assert torch.equal(masks.valley(weight, 20, "all"), weight < 0.5)
    assert not masks.valley(torch.linspace(0.1, 1, 64).expand(2, -1), 8, "all").any()  # as high everywhere


@quick
@given(scales, st.sampled_from(REGIONS), st.integers(0, 40))
def test_smallest(weight, region, k):
    k = min(k, weight.shape[1])
    region, allowed = allowed_of(weight, region)
    found = masks.smallest(weight, k, region)
    for m, row in enumerate(weight.abs().tolist()):
        inside = sorted(s for c, s in enumerate(row) if allowed[m][c])[:k]
        assert sorted(s for c, s in enumerate(row) if found[m, c]) == inside


def test_masks_of_places():
    assert masks.strided(2, 7, 3).tolist() == [[c % 3 == 0 for c in range(7)]] * 2
    assert masks.tail(3, 10, 0.25).tolist() == [[c >= 8 for c in range(10)]] * 3
    assert not masks.tail(2, 5, 0.0).any()
    assert masks.tail(2, 5, 1.0).all()


W = torch.ones(2, 4)
BAD = [
    (lambda: masks.threshold(W, torch.ones(4)), ValueError, r"theta must be a number, \[M\] or \[M, C\]"),
    (lambda: masks.threshold(W, "1"), TypeError, "theta must be a number, got str"),
    (lambda: masks.threshold(W, 1.0, "mine"), ValueError, "region must be one of"),
    (lambda: masks.threshold(W, 1.0, torch.ones(2, 4)), ValueError, r"a region must be torch.bool \(2, 4\)"),
    (lambda: masks.threshold(W, 1.0, criterion="l2"), ValueError, "criterion must be one of"),
    (lambda: masks.threshold(W[0], 1.0), ValueError, r"weight must be \[M, C\]"),
    (lambda: masks.threshold([1.0], 1.0), TypeError, "weight must be a tensor, got list"),
    (lambda: masks.quantile(W, 1.5), ValueError, "q must be between 0 and 1, got 1.5"),
    (lambda: masks.valley(W, 2), ValueError, "bins must be at least 3, got 2"),
    (lambda: masks.smallest(W, 5), ValueError, "k must be at most the number of channels 4, got 5"),
    (lambda: masks.smallest(W, True), TypeError, "k must be an integer, got bool"),
    (lambda: masks.strided(2, 4, 0), ValueError, "stride must be at least 1, got 0"),
    (lambda: masks.tail(2, 4, math.nan), ValueError, "share must be between 0 and 1, got nan"),
    (
        lambda: ExchangeBatchNorm2d(4, 2, mask=torch.ones(2, 4)),
        TypeError,
        "mask must be a function .* replaced",
    ),
    (
        lambda: ExchangeBatchNorm2d(4, 2, mask=masks.quantile, affine=False),
        ValueError,
        "of which affine=False",
    ),
    (
        lambda: ExchangeBatchNorm2d(4, 2, mask=masks.quantile, threshold=1.0),
        ValueError,
        "mask and threshold both",
    ),
    (
        lambda: ExchangeBatchNorm2d(4, 2, mask=masks.quantile, replaced=W > 0),
        ValueError,
        "mask and replaced both",
    ),
    (
        lambda: ExchangeBatchNorm2d(4, 2, mask=lambda w: w[0] > 0)(torch.ones(2, 4, 2)),
        ValueError,
        "replaced must",
    ),
    (lambda: sparsity_penalty(nn.ReLU(), "l2"), ValueError, "kind must be one of 'l1', 'polarization'"),
    (
        lambda: sparsity_penalty(nn.ReLU(), region="mine"),
        ValueError,
        "region must be one of None, 'own', 'all'",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


MASKS = {
    "threshold": partial(masks.threshold, theta=0.4),
    "quantile": partial(masks.quantile, q=0.5, region="all"),
    "valley": partial(masks.valley, bins=5, region="all"),
    "smallest": partial(masks.smallest, k=3),
}


@pytest.mark.parametrize("layer_class", [ExchangeBatchNorm2d, ExchangeInstanceNorm2d])
@pytest.mark.parametrize("name", MASKS)
def test_a_layers_mask_follows_its_scales(name, layer_class):
    layer = layer_class(20, 3, mask=MASKS[name], activation="relu", dtype=torch.float64)
    assert layer.exchanges
    assert f"mask={name}" in repr(layer)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        nn.init.uniform_(layer.weight, 0.8, 1.2)
        with torch.no_grad():
            layer.weight[:, torch.randperm(20)[:8]] *= -0.1
        twin.load_state_dict(layer.state_dict())
        expected = MASKS[name](layer.weight.detach())
        assert expected.any()
        fixed = layer_class(20, 3, replaced=expected, activation="relu", dtype=torch.float64)
        fixed.load_state_dict(layer.state_dict())
        x = torch.randn(6, 20, 4, 3, dtype=torch.float64)
        results = []
        for each in (fixed, layer, pickle.loads(pickle.dumps(layer)), compiled):
            assert torch.equal(each.replaced(), expected)
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            y.square().sum().backward()
            results.append((y, leaf.grad, each.weight.grad.clone()))
            each.zero_grad()
        for other in results[1:]:
            for found, wanted in zip(other, results[0], strict=True):
                torch.testing.assert_close(found, wanted)
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))
    alone = layer_class(20, 1, mask=MASKS[name])
    assert not alone.exchanges
    assert not alone.replaced().any()


class Drawn(nn.Module):
    """A mask that is drawn once and kept with the weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.rand(2, channels) < 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return self.chosen


def test_a_mask_may_be_a_module_with_state():
    layer = ExchangeBatchNorm2d(20, 2, mask=Drawn(20))
    assert layer.exchanges
    assert "mask=Drawn" in repr(layer)
    assert torch.equal(layer.replaced(), layer.state_dict()["mask.chosen"])
    other = ExchangeBatchNorm2d(20, 2, mask=Drawn(20))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 20, 3, 3)
    fixed = ExchangeBatchNorm2d(20, 2, replaced=layer.mask.chosen)
    for each in (layer, other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(each(x), fixed(x))


def test_layers_that_were_pickled_without_a_mask():
    layer = ExchangeBatchNorm2d(4, 2, threshold=0.1)
    del layer.__dict__["mask"]
    assert pickle.loads(pickle.dumps(layer)).mask is None


def test_penalties():
    net = nn.Sequential(
        ExchangeBatchNorm2d(5, 2, threshold=0.1),
        ExchangeBatchNorm2d(5, 2, mask=MASKS["smallest"]),
        ExchangeBatchNorm2d(5, 2, replaced=torch.ones(2, 5, dtype=torch.bool)),
        ExchangeBatchNorm2d(5, 2),
    )
    for layer in net:
        nn.init.normal_(layer.weight)
    counted = [layer.weight.detach() for layer in net[:2]]
    own = [(weight[0, :2], weight[1, 2:]) for weight in counted]
    rows = {"own": own, None: own, "all": [tuple(weight) for weight in counted]}
    for region, parts in rows.items():
        parts = [row for layer in parts for row in layer]
        size = sum(row.abs().sum() for row in parts)
        spread = sum((row - row.mean()).abs().sum() for row in parts)
        torch.testing.assert_close(sparsity_penalty(net, region=region), size)
        torch.testing.assert_close(sparsity_penalty(net, "polarization", region, t=1.2), 1.2 * size - spread)
