"""Thresholds that are factors of the median of a layer's scales, and networks converted with such."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import cen_ext
from cen_ext import make_multimodal
from cen_ext.modules.thresholds import median_threshold, parse_median
from tests.helpers.formulas import replaced


@pytest.mark.parametrize(
    ("text", "factor"),
    [("0.05*median", 0.05), ("2*median", 2.0), (" 1e-2 * median ", 0.01), (".5*median", 0.5)],
)
def test_spellings(text: str, factor: float) -> None:
    assert parse_median(text) == factor


@pytest.mark.parametrize(
    "text",
    [
        *["0.05*mean", "median", "-1*median", "0*median", "median*0.05", "0.05", "", "1e*median"],
        *["0.05*median*2", "nan*median", "1e999*median", "+-1*median", "0.05 median", "0.05*medians"],
    ],
)
def test_what_is_no_factor_is_refused_and_the_spelling_named(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^threshold must be a number, or .* written as 0\.05\*median, got "
    ):
        parse_median(text)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_median_is_numpys_in_float64(count: int, dtype: torch.dtype) -> None:
    scales = torch.randn(3, count, dtype=dtype)
    expected = 0.05 * np.median(np.abs(scales.numpy().astype(np.float64)))
    assert median_threshold(0.05, scales) == pytest.approx(expected, rel=1e-15)


def converted_and_original() -> tuple[nn.Module, nn.Sequential]:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.GroupNorm(1, 5), nn.InstanceNorm2d(5)
    ).double()
    for norm in (net[1], net[3]):
        nn.init.normal_(norm.weight)
    return make_multimodal(net, 2, threshold="0.6*median", region="all"), net


def test_each_layer_has_the_threshold_of_the_norm_it_was() -> None:
    ours, net = converted_and_original()
    found = {name: layer.threshold for name, layer in cen_ext.exchanging_layers(ours).items()}
    expected = {name: 0.6 * np.median(np.abs(net[int(name)].weight.detach().numpy())) for name in "13"}
    assert found == pytest.approx({**expected, "4": 0.6}, rel=1e-15)  # without affine, scales are ones
    assert all(type(value) is float for value in found.values())
    table = net[1].weight.detach().expand(2, -1)
    mask = ours[1].replaced()
    assert mask.any()
    assert not mask.all()
    assert torch.equal(mask, replaced(table, float(expected["1"]), "all", "abs"))
    # A copy, and a forward pass, have them as well.
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    again = copy.deepcopy(ours)
    assert again[3].threshold == ours[3].threshold
    assert torch.equal(again(x), ours(x))


def test_norms_that_do_not_exchange_need_no_median() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(net[0].weight)
    ours = make_multimodal(net, 2, threshold="0.5*median", where=["2"])
    assert (ours[0].threshold, ours[2].threshold) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([0.0, 0.0, 1.0], r"norm '1' has scales whose median is 0, .*: give a number"),
        ([0.0, 2.0, torch.nan], r"norm '1' has scales whose median is nan"),
        (None, r"norm '1' is on the meta device"),
    ],
)
def test_a_layer_without_a_median_is_refused(weight: list[float] | None, message: str) -> None:
    with torch.device("meta" if weight is None else "cpu"):
        net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    if weight is not None:
        net[1].weight = nn.Parameter(torch.tensor(weight))
    with pytest.raises(ValueError, match=r"^threshold=0\.1\*median: " + message):
        make_multimodal(net, 2, threshold="0.1*median")


def test_other_texts_are_refused_before_work_starts() -> None:
    with pytest.raises(ValueError, match=r"^threshold must be a number, or .* got '0\.1\*mean'"):
        make_multimodal(nn.BatchNorm2d(3), 2, threshold="0.1*mean")
    with pytest.raises(ValueError, match="mask"):
        make_multimodal(nn.BatchNorm2d(3), 2, threshold="0.1*median", mask=lambda scales: scales > 0)
