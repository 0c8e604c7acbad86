"""Feature maps against the formulas, the choice of a layer, and correlations of constructed maps."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from cen_ext import ExchangeBatchNorm2d, exchanging_layers
from models.analysis.channel_sets import Layer, choose, find_layers
from models.analysis.correlations import Correlator, boundaries, correlations, in_cells, texture
from models.analysis.feature_maps import FeatureMaps, feature_maps, input_of
from models.networks.encoders.resnet import BasicBlock
from models.networks.fusion import Discard, Exchange, FixedPortion, NoFusion
from models.training.errors import UsageError
from tests.helpers.networks import randomise_norms

Calls = dict[str, tuple[tuple[Any, ...], Tensor]]
STAGES = [f"encoder.layers.{i}.norm" for i in range(4)]


def network(num_modalities: int = 2, threshold: float = 0.02) -> nn.Module:
    """Four exchanging norms, of 16, 32, 48 and 64 channels in the stages 1 to 4; all scales are 1."""
    return models.refinenet("plain_net", 3, num_modalities, threshold=threshold, width=4)


def layer_of(scales: list[list[float]], threshold: float = 0.02, criterion: str = "abs") -> Layer:
    norm = ExchangeBatchNorm2d(len(scales[0]), len(scales), threshold=threshold, criterion=criterion)
    return Layer("norm", 1, norm, torch.tensor(scales), threshold, criterion)


def unused(net: nn.Module, counts: dict[str, tuple[int, ...]]) -> list[Layer]:
    """The layers, in which so many scales of each modality are below the threshold: its first, and its last
    ones of all but the first modality."""
    for name, numbers in counts.items():
        weight = net.get_submodule(name).weight
        for m, number in enumerate(numbers):
            with torch.no_grad():
                weight[m, slice(number) if m == 0 else slice(weight.shape[1] - number, None)] = -0.01
    return find_layers(net)


@pytest.mark.parametrize("region", ["own", "all"])
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_maps_are_those_of_the_formulas(region: str, num_modalities: int) -> None:
    norm = ExchangeBatchNorm2d(6, num_modalities, threshold=0.02, region=region).double().eval()
    randomise_norms(norm)
    x = torch.randn(num_modalities * 2, 6, 3, 4, dtype=torch.float64)
    maps = feature_maps(norm, x)
    z = {}
    for m in range(num_modalities):
        for c in range(6):
            values = x[2 * m : 2 * m + 2, c]
            normalized = (values - norm.running_mean[m, c]) / math.sqrt(norm.running_var[m, c] + norm.eps)
            z[m, c] = norm.weight[m, c].item() * normalized + norm.bias[m, c].item()
            torch.testing.assert_close(maps.normalized[m, :, c], normalized)
            torch.testing.assert_close(maps.magnitude[m, :, c], normalized.abs())
            torch.testing.assert_close(maps.z[m, :, c], z[m, c])
            torch.testing.assert_close(maps.rectified[m, :, c], z[m, c].clamp(min=0))
    replaced = 0
    for m, c in z:
        own = m * 6 // num_modalities <= c < (m + 1) * 6 // num_modalities
        expected = z[m, c]
        if abs(norm.weight[m, c]) < 0.02 and (own or region == "all"):
            others = [z[other, c] for other in range(num_modalities) if other != m]
            expected, replaced = sum(others) / len(others), replaced + 1
        torch.testing.assert_close(maps.exchanged[m, :, c], expected)
    assert replaced > 0
    weights = torch.tensor([[0.5, 0, 0.5, 0, 0, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.float64)
    means = maps.over(weights)
    torch.testing.assert_close(means.z[:, :, 0], (maps.z[:, :, 0] + maps.z[:, :, 2]) / 2)
    torch.testing.assert_close(means.exchanged[:, :, 1], maps.exchanged[:, :, 3])


def test_a_network_uses_the_exchanged_maps() -> None:
    """Every norm's output is relu of the exchanged maps, and of the residual at the end of a block."""
    norm_layer = functools.partial(Exchange(0.02).norm, streams=2, activation="relu")
    net = nn.Sequential(*(BasicBlock(8, 8, 1, (1, 1), norm_layer) for _ in range(2))).double().eval()
    randomise_norms(net)
    calls: Calls = {}

    def keep(name: str) -> Any:
        return lambda _, args, output: calls.__setitem__(name, (args, output))

    norms = exchanging_layers(net)
    handles = [norm.register_forward_hook(keep(name)) for name, norm in norms.items()]
    x = torch.randn(4, 8, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        net(x)
    assert list(calls) == ["0.bn1", "0.bn2", "1.bn1", "1.bn2"]
    for name, ((inside, *residual), output) in calls.items():
        maps = feature_maps(norms[name], inside)
        expected = maps.exchanged.flatten(0, 1) + (residual[0] if residual else 0)
        torch.testing.assert_close(output, expected.relu())
        assert not torch.equal(maps.exchanged, maps.z)
    assert [len(args) for args, _ in calls.values()] == [1, 2, 1, 2]
    for handle in handles:
        handle.remove()
    calls.clear()
    net[1].conv2.register_forward_hook(keep("after"))
    torch.testing.assert_close(input_of(net, net[1].bn1, x), net[1].conv1(net[0](x)))
    assert not calls
    with pytest.raises(ValueError, match="does not call"):
        input_of(net, nn.Identity(), x)


def test_sets() -> None:
    scales = [[0.01, -0.5, 0.3, -0.01, 0.02], [0.4, 0.019, -0.3, 0.0, -0.2]]
    layer = layer_of(scales)
    found = {name: mask.nonzero().flatten().tolist() for name, mask in layer.sets(1).items()}
    assert found == {"S01": [0], "S10": [1], "S11": [2, 4], "S00": [3]}
    assert layer.smallest == 1
    # Eq. 6 as printed compares the scale itself.
    signed = layer_of(scales, criterion="signed").sets(1)
    assert signed["S01"].nonzero().flatten().tolist() == [0]
    assert signed["S00"].nonzero().flatten().tolist() == [1, 3, 4]


def test_the_largest_sets_of_early_layers_are_chosen() -> None:
    some = {STAGES[0]: (2, 9), STAGES[1]: (3, 4), STAGES[2]: (20, 20)}
    layers = unused(network(), some)
    assert [layer.stage for layer in layers] == [1, 2, 3, 4]
    layer, notes = choose(layers)
    assert (layer.name, layer.smallest, notes) == (STAGES[1], 3, [])
    assert choose(layers, STAGES[2]).layer.sizes(1) == {"S01": 20, "S10": 20, "S11": 8, "S00": 0}
    late, notes = choose(unused(network(), {STAGES[0]: (5, 0), STAGES[2]: (1, 2), STAGES[3]: (4, 3)}))
    assert late.name == STAGES[3]
    assert notes == [f"no layer of stages 1 and 2 has both sets S01 and S10: {STAGES[3]} is drawn"]
    # Where nothing is left that both use, another layer is named.
    whole, notes = choose(unused(network(), {STAGES[0]: (7, 6), STAGES[1]: (16, 16), STAGES[2]: (24, 24)}))
    assert (whole.name, whole.sizes(1)["S11"]) == (STAGES[1], 0)
    assert len(notes) == 1
    assert f"--layer {STAGES[0]} has the largest sets" in notes[0]
    with pytest.raises(UsageError, match=r"--layer: encoder\.layer\.1\.norm is no .* did you mean"):
        choose(layers, "encoder.layer.1.norm")


def test_pairs_of_three_modalities() -> None:
    """Every pair needs its sets: the smaller of (4, 5) and (4, 2)."""
    (layer, *_) = unused(network(3), {STAGES[0]: (4, 5, 2)})
    assert [layer.sizes(other)["S10"] for other in layer.others] == [5, 2]
    assert layer.smallest == 2


def test_thresholds_that_give_sets_are_named() -> None:
    net = network(threshold=1e-3)
    for name in STAGES:
        norm = net.get_submodule(name)
        nn.init.uniform_(norm.weight, 0.1, 1)
    layers = find_layers(net)
    with pytest.raises(UsageError) as refused:
        choose(layers)
    thresholds = [float(found) for found in re.findall(r"fusion\.threshold=([\d.]+)", str(refused.value))]
    assert len(thresholds) == 3
    sizes = torch.cat([layer.scales.flatten() for layer in layers])
    told = re.search(
        rf"{thresholds[0]:g}, the (\d+) % percentile .*? \((\S+): S01 (\d+), S10 (\d+)\)", str(refused.value)
    )
    assert thresholds[0] == pytest.approx(torch.quantile(sizes, int(told[1]) / 100).item(), rel=1e-2)
    for name in STAGES:
        net.get_submodule(name).threshold = thresholds[0]
    chosen = choose(find_layers(net)).layer
    assert (chosen.name, *map(str, list(chosen.sizes(1).values())[:2])) == told.groups()[1:]
    # A layer that is named is drawn, with the same remedy.
    drawn, notes = choose(layers, STAGES[0])
    assert drawn.smallest == 0
    assert f"fusion.threshold={thresholds[-1]:g}" in notes[0]
    with pytest.raises(UsageError, match="no threshold would give them"):
        choose(find_layers(network()))


@pytest.mark.parametrize("fusion", [NoFusion(), Discard(threshold=0.02), FixedPortion(), Exchange(0.0)])
def test_layers_without_an_exchange_by_threshold_are_none(fusion: models.fusion.Fusion) -> None:
    assert find_layers(models.refinenet("plain_net", 3, 2, fusion=fusion, width=4)) == []


def test_correlations_of_constructed_maps() -> None:
    target = torch.tensor([1.0, 2, 3, 4, math.nan], dtype=torch.float64)
    maps = torch.tensor(
        [[3.0, 5, 7, 9, 100], [-1, -2, -3, -4, 0], [1, -1, -1, 1, 7], [2, 2, 2, 2, 5], [1, 2, 3, 5, 0]]
    )
    found = correlations(maps.double(), target).tolist()
    assert found[:3] == pytest.approx([1, -1, 0], abs=1e-12)
    assert math.isnan(found[3])
    flat = 0.3 + 1e-16 * torch.tensor([[1.0, 2, 3, 4, 5]], dtype=torch.float64)
    assert correlations(flat, target).isnan().all()
    assert found[4] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2, 3, 5])[0, 1])


def test_texture_is_the_squared_laplacian_of_colors() -> None:
    gray = np.zeros((4, 6))
    gray[1, 2] = 0.5
    normalized = torch.from_numpy(np.stack([(gray - 0.45) / std for std in (0.2, 0.3, 0.4)]))
    expected = np.zeros((4, 6))
    expected[1, 2] = (4 * 0.5) ** 2
    expected[[0, 2, 1, 1], [2, 2, 1, 3]] = 0.25
    np.testing.assert_allclose(texture(normalized, (0.2, 0.3, 0.4)), expected, atol=1e-12)


def test_boundaries_are_squared_steps_of_log_depth() -> None:
    depth = torch.full((5, 6), 2.0)
    depth[:, 3:] = 4
    depth[0, 0] = 0  # missing
    expected = np.zeros((4, 5))
    expected[:, 2] = math.log(2) ** 2
    expected[0, 0] = math.nan
    for unit in (depth, 1000 * depth, torch.where(depth > 0, 1 / depth, 0)):
        np.testing.assert_allclose(boundaries(unit), expected, rtol=1e-5, atol=1e-12)


def test_cells_are_roots_of_means_of_what_is_known() -> None:
    squares = np.array([[1.0, 3, math.nan, math.nan], [5, 7, math.nan, 9]])
    assert in_cells(squares, (1, 2)).tolist() == [[2, 3]]
    assert in_cells(squares, (2, 2))[0].isnan().tolist() == [False, True]


def test_sets_are_told_from_random_ones() -> None:
    """RGB's own channels are the texture, depth's the negative of the boundaries; all others are noise."""
    layer = layer_of([[1.0] * 5 + [0.0] * 3 + [1.0] * 24, [0.0] * 5 + [1.0] * 27])
    correlator = Correlator(layer, ("rgb", "depth"), draws=20, seed=3)
    for _ in range(4):
        targets = {name: torch.rand(6, 7, dtype=torch.float64) for name in ("texture", "boundaries")}
        z = torch.randn(2, 1, 32, 6, 7, dtype=torch.float64)
        z[0, 0, :5], z[1, 0, 5:8] = targets["texture"], -targets["boundaries"]
        correlator.add(FeatureMaps(3 * z + 1, z, z), targets)
    found = {
        (each.modality, each.channels, each.quantity, each.target): each for each in correlator.compute()
    }
    assert len(found) == 2 * 3 * 4 * 2
    assert correlator.compute() == list(found.values())
    rgb, depth = found["rgb", "S10", "z", "texture"], found["depth", "S01", "normalized", "boundaries"]
    assert (rgb.size, depth.size) == (5, 3)
    assert (rgb.value, depth.value) == (pytest.approx(1), pytest.approx(-1))
    for each in (rgb, depth, found["rgb", "S10", "z", "boundaries"]):
        assert len(each.random) == 20
        assert each.random_mean == pytest.approx(sum(each.random) / 20)
        assert abs(each.random_mean) < 0.4
        assert 0 < each.random_spread < 0.4
    assert abs(found["rgb", "S10", "z", "boundaries"].value) < 0.4
    assert found["rgb", "S10", "rectified", "texture"].value == pytest.approx(1)
    assert {each.alone for each in (rgb, depth)} == {True}
    assert not found["depth", "S10", "z", "texture"].alone


def test_an_empty_set_has_no_correlation() -> None:
    correlator = Correlator(layer_of([[0.0, 1.0], [1.0, 0.0]]), ("rgb", "depth"))
    correlator.add(
        FeatureMaps(*[torch.rand(2, 1, 2, 3, 3).double()] * 3), {"texture": torch.rand(3, 3).double()}
    )
    found = {each.channels: each for each in correlator.compute()}
    assert (found["S11"].value, found["S11"].random, found["S11"].random_mean) == (None, (), None)
    assert found["S01"].value is not None
