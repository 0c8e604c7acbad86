"""Exchanging ResNets: torchvision's layout and names, who exchanges, ImageNet weights, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cen_ext import ExchangeBatchNorm2d, exchanging_layers
from models.networks.encoders import RESNETS, Encoder, ExchangeResNet, load_imagenet, make_encoder
from models.networks.encoders.base import ENCODERS
from models.networks.fusion import Exchange, Fusion
from tests.helpers.networks import randomise_norms

# Parameters of torchvision's networks without their classifier.
TORCHVISION_PARAMETERS = {
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "resnet152": 58_143_808,
}
IMAGENET_RESNET18 = "data/resnet18_imagenet_to_layer3.safetensors"


def torchvision_form(encoder: ExchangeResNet) -> dict[str, torch.Tensor]:
    """The first modality's entries under torchvision's names and shapes."""
    return {k: (v[0] if v.dim() == 2 else v).clone() for k, v in encoder.state_dict().items()}


@pytest.mark.parametrize("name", RESNETS)
def test_one_modality_has_torchvisions_parameters(name: str) -> None:
    with torch.device("meta"):
        encoder = ExchangeResNet(name, 1)
    assert sum(p.numel() for p in encoder.parameters()) == TORCHVISION_PARAMETERS[name]


@pytest.mark.parametrize("name", RESNETS)
def test_exchange_follows_every_3x3_convolution_and_no_other(name: str) -> None:
    with torch.device("meta"):
        encoder = ExchangeResNet(name, 2, threshold=0.03, region="all", criterion="signed")
    convolutions = {
        key for key, m in encoder.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    }
    layers = exchanging_layers(encoder)
    assert set(layers) == {key.replace("conv", "bn") for key in convolutions}
    assert len(layers) == sum(RESNETS[name][1]) * (2 if name in ("resnet18", "resnet34") else 1)
    for layer in layers.values():
        assert (layer.threshold, layer.region, layer.criterion) == (0.03, "all", "signed")


def test_replaced_channel_of_one_modality_carries_the_other() -> None:
    """With every scale of modality 0 at zero in one norm, that norm gives it modality 1's values."""
    encoder = ExchangeResNet("resnet18", 2, region="all").double().eval()
    randomise_norms(encoder, small_scales=0)
    norm = encoder.layer2[1].bn1
    with torch.no_grad():
        norm.weight[0].zero_()
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        encoder([torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2)])
    first, second = seen[0].unflatten(0, (2, 2))
    assert torch.equal(first, second)
    assert second.abs().sum() > 0


def test_first_form_strides_the_1x1_convolution() -> None:
    """It computes what a 3x3 convolution of stride 2 and dilation 2 does after an unstrided one."""
    encoder = make_encoder("resnet50_v1", 1, Exchange(threshold=0)).double().eval()
    other = ExchangeResNet("resnet50", 1, threshold=0).double().eval()
    randomise_norms(encoder)
    other.load_state_dict(encoder.state_dict())
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        features = encoder(x)
        assert not torch.allclose(other(x)[-1], features[-1])
        for stage in (other.layer2, other.layer3, other.layer4):
            stage[0].conv2 = copy.deepcopy(stage[0].conv2)
            stage[0].conv2.dilation = stage[0].conv2.padding = (2, 2)
        for feature, same in zip(features, other(x), strict=True):
            torch.testing.assert_close(feature, same)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 64), ("resnet50", 256)])
def test_features_shrink_fourfold_to_thirtytwofold(name: str, channels: int) -> None:
    encoder = ExchangeResNet(name, 3, in_channels=2).eval()
    assert encoder.channels == tuple(channels << stage for stage in range(4))
    with torch.no_grad():
        features = encoder(torch.randn(3, 2, 65, 97))
    sizes = [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert [f.shape for f in features] == [
        (3, c, *size) for c, size in zip(encoder.channels, sizes, strict=True)
    ]


def test_list_and_stack_give_the_same_and_so_does_channels_last() -> None:
    encoder = ExchangeResNet("resnet18", 2).double().eval()
    randomise_norms(encoder)
    xs = [torch.randn(2, 3, 33, 49, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        expected = encoder(xs)
        stacked = encoder(torch.cat(xs))
        channels_last = encoder.to(memory_format=torch.channels_last)(torch.cat(xs))
    for feature, same, close in zip(expected, stacked, channels_last, strict=True):
        assert torch.equal(feature, same)
        torch.testing.assert_close(close, feature, rtol=1e-9, atol=1e-11)
    assert channels_last[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_statistics_stay_while_scales_train(frozen: bool) -> None:
    encoder = ExchangeResNet("resnet18", 2, frozen_statistics=frozen)
    encoder.train()
    norms = [m for m in encoder.modules() if isinstance(m, ExchangeBatchNorm2d)]
    assert encoder.training
    assert all(m.training is not frozen for m in norms)
    before = encoder.bn1.running_mean.clone()
    encoder(torch.randn(4, 3, 64, 64))[-1].sum().backward()
    assert torch.equal(encoder.bn1.running_mean, before) is frozen
    assert encoder.bn1.weight.grad.abs().sum() > 0
    assert encoder.bn1.bias.grad.abs().sum() > 0
    encoder.eval()
    assert not any(m.training for m in norms)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_imagenet_weights_start_every_modality_alike(tmp_path: Path, suffix: str) -> None:
    original = ExchangeResNet("resnet18", 1)
    randomise_norms(original)
    state = torchvision_form(original) | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    # Files from before torchvision 0.3 have no counters; their lack is nothing to report.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)

    encoder = ExchangeResNet("resnet18", 3)
    assert load_imagenet(encoder, path) == ([], [])
    for key, value in encoder.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            expected = state[key] if value.shape == state[key].shape else state[key].expand(3, -1)
            assert torch.equal(value, expected.reshape(value.shape)), key


def test_what_the_file_lacks_is_reported_and_kept(tmp_path: Path) -> None:
    state = torchvision_form(ExchangeResNet("resnet18", 1))
    del state["layer4.1.conv2.weight"], state["layer4.1.bn2.weight"]
    state["layer5.conv.weight"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "partial.pth")
    encoder = ExchangeResNet("resnet18", 2)
    before = encoder.layer4[1].conv2.weight.clone()
    report = load_imagenet(encoder, tmp_path / "partial.pth")
    assert report.missing == ["layer4.1.conv2.weight", "layer4.1.bn2.weight"]
    assert report.unexpected == ["layer5.conv.weight"]
    assert torch.equal(encoder.layer4[1].conv2.weight, before)
    assert torch.equal(encoder.conv1.weight, state["conv1.weight"])


def test_the_real_partial_resnet18(shared: Path) -> None:
    encoder = ExchangeResNet("resnet18", 2)
    report = load_imagenet(encoder, shared / IMAGENET_RESNET18)
    assert report.unexpected == []
    assert len(report.missing) == 4 + 4 * 4  # four convolutions and their norms
    assert all(key.startswith("layer4.") and "downsample" not in key for key in report.missing)
    state = load_file(shared / IMAGENET_RESNET18)
    assert torch.equal(encoder.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    assert torch.equal(encoder.bn1.running_var, state["bn1.running_var"].expand(2, -1))


def test_wrong_shapes_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    state = torchvision_form(ExchangeResNet("resnet50", 1))
    torch.save(state, tmp_path / "resnet50.pth")
    encoder = ExchangeResNet("resnet18", 2)
    before = encoder.conv1.weight.clone()
    with pytest.raises(
        ValueError, match=r"layer1\.0\.conv1\.weight is \(64, 64, 1, 1\) in the file, but \(64, 64, 3"
    ):
        load_imagenet(encoder, tmp_path / "resnet50.pth")
    assert torch.equal(encoder.conv1.weight, before)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"backbone.stem": torch.zeros(1), "fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: no key of a torchvision ResNet.*backbone\.stem"):
        load_imagenet(ExchangeResNet("resnet18", 2), tmp_path / "other.pth")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'ResNet-101'; did you mean 'resnet101'\?"):
        ExchangeResNet("ResNet-101")
    with pytest.raises(ValueError, match=r"one of resnet18, .*, got 'vgg'$"):
        ExchangeResNet("vgg")
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        ExchangeResNet("resnet18", in_channels=0)
    with pytest.raises(ValueError, match="num_modalities must be at least 1, got 0"):
        ExchangeResNet("resnet18", 0)
    with pytest.raises(ValueError, match="region must be one of 'own', 'all', got 'half'"):
        ExchangeResNet("resnet18", region="half")
    with pytest.raises(ValueError, match=r"threshold must not be negative, got -0\.1"):
        ExchangeResNet("resnet18", 1, threshold=-0.1)


def test_builders_say_by_their_arguments_how_they_dilate(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(num_modalities: int, fusion: Fusion, *, dilated: bool = False, **options: bool) -> Encoder:
        return ExchangeResNet("resnet18", num_modalities, fusion, dilated=dilated, **options)

    monkeypatch.setitem(ENCODERS.members, "older", older)
    with torch.device("meta"):
        for name, form, last in (
            ("older", {}, 32),
            ("older", {"dilated": True}, 8),
            ("older", {"output_stride": 8}, 8),
            ("resnet18", {"dilated": True}, 8),
            ("resnet18", {"output_stride": 16}, 16),
        ):
            assert make_encoder(name, 2, Exchange(), **form).strides[-1] == last
        with pytest.raises(ValueError, match="'older' has no dilated form, whose features end at 1/16"):
            make_encoder("older", 2, Exchange(), output_stride=16)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        make_encoder("resnet18", 2, Exchange(), output_stride=4)


def test_bad_inputs_are_refused() -> None:
    with torch.device("meta"):
        encoder = ExchangeResNet("resnet18", 2)
        x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match="has 2 modalities, but x is a list of 3"):
        encoder([x, x, x])
    with pytest.raises(ValueError, match="3 rows on its batch axis, not divisible by 2 modalities"):
        encoder(x.expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match=r"x must be \[M\*N, 3, H, W\], got \(2, 1, 32, 32\)"):
        encoder(torch.zeros(2, 1, 32, 32, device="meta"))
    with pytest.raises(ValueError, match=r"modality 1 is .*, but modality 0 is"):
        encoder([x, torch.zeros(1, 3, 32, 31, device="meta")])
