"""Thresholds of fusions that are factors of medians, and their resolution by the weights of a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import models
import models.recipes  # fills the registry
from cen_ext import exchanging_layers
from models.fusion import Discard, Exchange, FixedPortion, Fusion, LateConcat, resolve_thresholds
from models.networks.encoders import load_imagenet
from models.networks.fusion.thresholds import ruled_layers, set_thresholds
from models.training import config, registry
from models.training.errors import UsageError
from tests.helpers.networks import randomise_norms

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "refinenet": lambda **options: models.refinenet("resnet18", 5, width=8, **options),
    "unet": lambda **options: models.unet(size=32, base_width=4, **options),
}


def thresholds(net: nn.Module) -> dict[str, float]:
    return {name: holder.threshold for name, (_, holder) in ruled_layers(net).items()}


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        *[("refinenet", kind) for kind in (Exchange, LateConcat, Discard)],
        *[("unet", kind) for kind in (Exchange, Discard)],
    ],
)
def test_each_layer_gets_its_factor_of_its_median(network: str, kind: type[Fusion]) -> None:
    net = NETWORKS[network](fusion=kind(threshold="0.5*median", region="all"))
    assert set(thresholds(net).values()) == {0.5}  # scales are ones
    randomise_norms(net)
    set_by = resolve_thresholds(net)
    layers = exchanging_layers(net)
    expected = {
        name: 0.5 * np.median(np.abs(layer.weight.detach().numpy().astype(np.float64)))
        for name, layer in layers.items()
    }
    assert len(set(expected.values())) > 2
    assert set_by == thresholds(net) == pytest.approx(expected, rel=1e-15)
    for name, layer in layers.items():
        assert torch.equal(layer.replaced(), layer.weight.detach().abs() < expected[name])
        assert layer.replaced().any()


def test_the_median_is_of_all_modalities_together() -> None:
    net = models.refinenet("resnet18", 5, 3, width=8, threshold="2*median")
    point = net.encoder.layer1[0].bn1
    with torch.no_grad():
        point.weight.copy_(torch.tensor([[0.1], [0.4], [3.0]]).expand_as(point.weight))
    assert resolve_thresholds(net)["encoder.layer1.0.bn1"] == pytest.approx(0.8, rel=1e-7)


def test_a_number_and_a_fusion_without_threshold_stay_as_they_are() -> None:
    for fusion in (Exchange(threshold=0.3), FixedPortion()):
        net = models.refinenet("resnet18", 5, width=8, fusion=fusion)
        randomise_norms(net)
        before = thresholds(net)
        assert resolve_thresholds(net) == {}
        assert thresholds(net) == before
    alone = models.refinenet("resnet18", 5, 1, width=8, threshold="0.5*median")
    assert resolve_thresholds(alone) == {}  # one modality exchanges nothing
    with torch.no_grad():
        alone([torch.randn(1, 3, 33, 33)])


def test_a_layer_whose_median_is_zero_is_named() -> None:
    net = models.refinenet("resnet18", 5, width=8, threshold="0.5*median")
    nn.init.zeros_(net.encoder.layer2[1].bn2.weight)
    message = (
        r"^threshold=0\.5\*median: encoder\.layer2\.1\.bn2 has scales whose median is 0, .*: give a number"
    )
    with pytest.raises(ValueError, match=message):
        resolve_thresholds(net)


def test_the_penalty_is_that_of_a_number() -> None:
    nets = [models.refinenet("resnet18", 5, width=8, threshold=t) for t in (0.1, "0.1*median")]
    penalties = [net.fusion.penalty_on_scales(net) for net in nets]
    assert penalties[0] == penalties[1] > 0


@pytest.mark.parametrize("text", ["0.05*mean", "median", "-1*median", "abc", "0*median"])
def test_settings_refuse_what_is_no_factor(text: str) -> None:
    for name in ("synthetic_demo", "synthetic_translation_demo"):
        for fusion in ("exchange", "discard"):
            with pytest.raises(
                UsageError, match=r"^fusion\.threshold must be a number, or .*0\.05\*median, got"
            ):
                config.override(registry.find(name), [f"fusion={fusion}", f"fusion.threshold={text}"])
    with pytest.raises(ValueError, match=r"^threshold must be a number, or"):
        Exchange(threshold=text)


def test_settings_with_a_factor_are_written_and_read() -> None:
    recipe = config.override(registry.find("synthetic_demo"), ["model.threshold=0.05*median"])
    assert recipe.fusion == Exchange(threshold="0.05*median")
    assert config.from_plain(registry.find("synthetic_demo"), config.to_plain(recipe)) == recipe
    assert "fusion.threshold=0.05*median " in "\n".join(config.describe(recipe))
    carried = config.override(recipe, ["fusion=discard"])
    assert carried.fusion == Discard(threshold="0.05*median")
    numbers = config.override(recipe, ["fusion.threshold=1e-1"])
    assert numbers.fusion == Exchange(threshold=0.1)


# The norms that exchange, and percentiles 0, 10, 50 and 90 of their |scales|.
REAL = {
    "resnet50": ("resnet50_imagenet_v1_fp16.safetensors", ("bn2",), (0.349, 0.755, 0.991, 1.277)),
    "resnet18": ("resnet18_imagenet_to_layer3.safetensors", ("bn1", "bn2"), (0.0487, 0.191, 0.305, 0.447)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_weights(name: str, shared: Path) -> None:
    file, norms, percentiles = REAL[name]
    path = shared / "data" / file
    if not path.is_file():
        pytest.skip(f"needs {path}")
    net = models.refinenet(name, 5, width=8, threshold="0.05*median")
    load_imagenet(net.encoder, path)
    values = resolve_thresholds(net)
    scales = {}
    with safe_open(path, "np") as weights:
        for key in weights.keys():  # noqa: SIM118
            if re.fullmatch(rf"layer\d\.\d\.({'|'.join(norms)})\.weight", key):
                scales[key.removesuffix(".weight")] = np.abs(weights.get_tensor(key).astype(np.float64))
    expected = {f"encoder.{key}": 0.05 * np.median(each) for key, each in scales.items()}
    # The file of ResNet-18 lacks stage 4, whose scales are ones.
    expected |= {key: 0.05 for key in values if key.startswith("encoder.layer4.") and name == "resnet18"}
    assert values == pytest.approx(expected, rel=1e-12)
    found = np.percentile(np.concatenate(list(scales.values())), (0, 10, 50, 90))
    assert found == pytest.approx(percentiles, rel=2e-3)


def test_values_are_set_by_name() -> None:
    net = models.refinenet("resnet18", 5, width=8, threshold="0.5*median")
    names = list(ruled_layers(net))
    set_thresholds(net, {name: float(i + 1) for i, name in enumerate(names)})
    assert list(thresholds(net).values()) == [float(i + 1) for i in range(len(names))]
    assert set(exchanging_layers(net)) == set(names)
