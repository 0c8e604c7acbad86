"""timm's networks as encoders: where channels are exchanged, timm's weights, the same ResNet as our own."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d, exchanging_layers
from cen_ext.modules import ExchangeNorm
from models.networks.encoders import ExchangeResNet
from models.networks.encoders.timm import MakeNorm, TimmEncoder, spatial_norms, timm_encoder
from models.networks.encoders.weights import read_state_dict
from tests.helpers import vision
from tests.helpers.networks import randomise_norms

# name -> its exchange points, as patterns; how many they are
POINTS = {
    "densenet121": (["features_denseblock?.denselayer*.norm1", "features_transition?.norm", "*_norm5"], 58),
    "hrnet_w18_small": (["*bn?", "transition*.1", "*.fuse_layers.*.1"], 61),
    "mixnet_s": (["blocks.0.0.bn1", "blocks.?.?.bn2"], 16),
    "mobilenetv2_100": (["blocks.0.0.bn1", "blocks.?.?.bn2"], 17),
    "regnety_002": (["s?.b*.conv2.bn"], 13),
    "repvgg_a0": (["stages_?.*.conv_kxk.bn"], 21),
    "res2net50_26w_4s": (["layer?.?.bns.?"], 48),
    "resnet18": (["layer?.?.bn1", "layer?.?.bn2"], 16),
    "resnet50": (["layer?.?.bn2"], 16),
    "tf_efficientnet_cc_b0_4e": (["blocks.0.0.bn1", "blocks.?.?.bn2"], 16),
}
WHOLE = (
    *POINTS,
    "dla34",
    "dpn48b",
    "efficientnet_b0",
    "ghostnet_100",
    "resnest14d",
    "vgg11_bn",
    "xception41",
)


def norms(num_modalities: int = 2, threshold: float = 0.02, region: str = "own") -> MakeNorm:
    """The paper's norms: those after spatial convolutions exchange."""

    def make_norm(original: nn.BatchNorm2d, exchange_point: bool, activation: str) -> nn.Module:
        return ExchangeBatchNorm2d(
            original.num_features,
            num_modalities,
            threshold=threshold if exchange_point else 0.0,
            region=region,
            activation=activation,
        )

    return make_norm


def encoder(name: str, num_modalities: int = 2, **options: bool | int) -> TimmEncoder:
    vision.timm()
    return timm_encoder(name, num_modalities, norms(num_modalities), **options)


@pytest.mark.parametrize("name", POINTS)
def test_exchange_follows_every_spatial_convolution_but_the_stem(name: str) -> None:
    patterns, count = POINTS[name]
    with torch.device("meta"):
        points = list(exchanging_layers(encoder(name).network))
    assert len(points) == count
    assert all(any(fnmatch.fnmatchcase(point, pattern) for pattern in patterns) for point in points), points
    assert all(fnmatch.filter(points, pattern) for pattern in patterns)


class Tangled(nn.Module):
    """Registered in another order than run, with all that comes between a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.after_sum, self.after_cat, self.after_point, self.after_stem, self.after_wide = (
            nn.BatchNorm2d(channels) for channels in (4, 6, 4, 4, 4)
        )
        self.wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4)
        self.point = nn.Conv2d(4, 4, 1)
        self.narrow = nn.Conv2d(4, 2, 3, padding=1)
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_stem(self.stem(nn.functional.pad(x, (1, 1, 1, 1))))
        x = self.after_point(self.point(x))
        x = self.after_wide(self.wide(x))
        x = self.after_sum(x + self.wide(x))
        return self.after_cat(torch.cat([x, self.narrow(x)], 1))


def test_spatial_norms_go_by_the_tensors_and_change_nothing() -> None:
    net = Tangled()
    net.after_cat.eval()
    assert spatial_norms(net, torch.randn(2, 3, 5, 5)) == ["after_wide", "after_cat"]
    assert net.training
    assert net.stem.training
    assert not net.after_cat.training
    assert net.after_sum.num_batches_tracked == 0
    assert torch.equal(net.after_sum.running_mean, torch.zeros(4))
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_resnet50_is_our_own(frozen: bool) -> None:
    """The same features before and after a training step, with channels replaced."""
    ours = ExchangeResNet("resnet50", 2, threshold=0.02, frozen_statistics=frozen).double()
    theirs = encoder("resnet50", frozen_statistics=frozen).double()
    randomise_norms(ours)
    theirs.network.load_state_dict(ours.state_dict())
    replaced = {name: layer.replaced() for name, layer in exchanging_layers(ours).items()}
    assert all(table.any() for table in replaced.values())
    assert set(replaced) == set(exchanging_layers(theirs.network))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)

    def features(net: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return net.eval()(x)

    def step(net: nn.Module) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        torch.stack([feature.square().mean() for feature in net.train()(x)]).sum().backward()
        optimizer.step()

    before = features(ours)
    torch.testing.assert_close(features(theirs), before, rtol=1e-5, atol=1e-5)
    step(ours)
    step(theirs)
    after = features(ours)
    assert not any(torch.allclose(feature, old) for feature, old in zip(after, before, strict=True))
    torch.testing.assert_close(features(theirs), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.network.state_dict(), ours.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_features_are_what_the_attributes_say_and_timms_names_are_known(name: str) -> None:
    timm = vision.timm()
    with torch.device("meta"):
        net = encoder(name, 3)
        features = net(torch.empty(3, 3, 64, 96))
        whole = timm.create_model(name, pretrained=False).state_dict()
    assert [feature.shape for feature in features] == [
        (3, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(net.channels, net.strides, strict=True)
    ]
    state = net.from_pretrained(whole | {"strange.key": torch.empty(1)})
    assert set(state) == {*net.state_dict(), "network.strange.key"}
    config = timm.get_pretrained_cfg(name)
    assert (net.input_mean, net.input_std) == (config.mean, config.std)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


def test_flattened_names_carry_timms_weights() -> None:
    whole = vision.timm().create_model("densenet121", pretrained=False).eval()
    net = encoder("densenet121", 2).eval()
    net.load_state_dict(net.from_pretrained(whole.state_dict()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[-1], whole.forward_features(x))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("efficientnet_lite0", "efficientnet_lite0_imagenet.safetensors"),
        ("resnet50", "resnet50_imagenet_v1_fp16.safetensors"),
    ],
)
def test_real_weights_give_every_modality_timms_features(shared: Path, name: str, file: str) -> None:
    state = read_state_dict(shared / "data" / file)
    net = encoder(name).eval()
    missing, unexpected = net.load_state_dict(net.from_pretrained(state), strict=False)
    assert unexpected == []
    assert all(key.endswith("num_batches_tracked") for key in missing)
    original = vision.timm().create_model(name, pretrained=False, features_only=True).eval()
    own = {key: value for key, value in state.items() if key in original.state_dict()}
    original.load_state_dict(own, strict=False)
    x = torch.randn(2, 3, 64, 64)
    for layer in exchanging_layers(net).values():
        layer.threshold = 0.0
    with torch.no_grad():
        for feature, expected in zip(net(torch.cat([x, x])), original(x)[1:], strict=True):
            torch.testing.assert_close(feature, torch.cat([expected, expected]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("mobilenetv2_100", ["conv_stem.weight"]),
        ("repvgg_a0", ["stem.conv_kxk.conv.weight", "stem.conv_1x1.conv.weight"]),
        ("tresnet_m", []),  # folds 4x4 pixels into channels first
    ],
)
def test_the_weights_that_read_the_image_are_known(name: str, stem: list[str]) -> None:
    with torch.device("meta"):
        net = encoder(name, in_channels=5)
    assert net.stem_weights == tuple(f"network.{key}" for key in stem)
    assert all(net.state_dict()[key].shape[1] == 5 for key in net.stem_weights)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_while_scales_train(frozen: bool) -> None:
    net = encoder("efficientnet_lite0", frozen_statistics=frozen)
    assert net.training
    layers = [module for module in net.modules() if isinstance(module, ExchangeNorm)]
    assert all(layer.training is not frozen for layer in layers)
    before = net.network.bn1.running_mean.clone()
    feature = net([torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)])[-1]
    feature.backward(torch.randn_like(feature))
    assert torch.equal(net.network.bn1.running_mean, before) is frozen
    assert net.network.bn1.weight.grad.abs().sum() > 1e-3
    assert not any(layer.training for layer in net.eval().modules())


def test_what_is_no_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timm has no network 'resnet51'; did you mean 'resnet51q'\?"):
        encoder("resnet51")
    with pytest.raises(ValueError, match=r"timm has no network 'hf_hub:timm/resnet50\.a1_in1k'"):
        encoder("hf_hub:timm/resnet50.a1_in1k")
    with pytest.raises(ValueError, match=r"levit_128s has no features of strides \(4, 8, 16, 32\): "):
        encoder("levit_128s")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 ends in features of strides \(16, 16, "):
        encoder("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"those that it has cannot exchange: LayerNorm2d$"):
        encoder("convnext_atto")
    with pytest.raises(ValueError, match="num_modalities must be at least 1, got 0"):
        encoder("resnet18", 0)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        encoder("resnet18", in_channels=0)
    with torch.device("meta"):
        net = encoder("resnet18")
    with pytest.raises(ValueError, match="has 2 modalities, but x is a list of 3"):
        net([torch.zeros(1, 3, 32, 32)] * 3)


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'cen_ext\[timm\]'"):
        timm_encoder("resnet18", 2, norms())
