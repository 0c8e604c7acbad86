"""timm's networks as encoders: where channels are exchanged, timm's weights, the same ResNets as our own."""

from __future__ import annotations

import copy
import fnmatch
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from cen_ext import exchanging_layers
from cen_ext.modules import ExchangeNorm
from examples.own_fusion import ConcatOnce
from models.fusion import Exchange, FixedPortion, Fusion, NoFusion
from models.networks.encoders import TimmEncoder, input_normalization, load_imagenet, make_encoder
from models.networks.encoders.weights import read_state_dict
from models.networks.fusion import exchange_points
from models.networks.private import PrivateConv2d
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


# Networks that no one-after-the-other of modules computes.
TANGLED = ("hrnet_w18_small", "xception41")


def encoder(
    name: str, num_modalities: int = 2, fusion: Fusion | None = None, **options: bool | int
) -> TimmEncoder:
    vision.timm()
    return make_encoder(f"timm:{name}", num_modalities, fusion or Exchange(), **options)


@pytest.mark.parametrize("name", POINTS)
def test_exchange_follows_every_spatial_convolution_but_the_stem(name: str) -> None:
    patterns, count = POINTS[name]
    with torch.device("meta"):
        points = list(exchanging_layers(encoder(name).network))
    assert len(points) == count
    assert all(any(fnmatch.fnmatchcase(point, pattern) for pattern in patterns) for point in points), points
    assert all(fnmatch.filter(points, pattern) for pattern in patterns)


def with_our_names(net: nn.Module) -> dict[str, Tensor]:
    """The state of a network on timm's encoder, as one on ours names it."""
    return {key.replace("network.", ""): value for key, value in net.state_dict().items()}


def twins(
    build: str, name: str, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[nn.Module, nn.Module]:
    """A network on our ResNet and the same one on timm's: equal weights, some channels replaced."""
    vision.timm()
    options = {"width": 16, "dropout": 0.0, "frozen_statistics": False, **options}
    ours, theirs = (
        getattr(models, build)(each, 5, 2, **options).to(dtype) for each in (name, f"timm:{name}")
    )
    randomise_norms(ours)
    own = ours.state_dict()
    names = dict(zip(with_our_names(theirs), theirs.state_dict(), strict=True))
    theirs.load_state_dict({names[key]: value for key, value in own.items()})
    points = [
        [name.replace("network.", "") for name in exchanging_layers(net.encoder)] for net in (ours, theirs)
    ]
    assert points[0] == points[1]
    return ours, theirs


def assert_trains_alike(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    """Logits in eval mode and in training, and all weights and statistics after a step of training."""
    x = torch.randn(4, 3, 64, 64, dtype=dtype)
    close = {"rtol": tolerance, "atol": tolerance}
    with torch.no_grad():
        expected = ours.eval()(x).ensemble
        torch.testing.assert_close(theirs.eval()(x).ensemble, expected, **close)
    steps = []
    for net in (ours, theirs):
        out = net.train()(x)
        (out.branches.square().mean() + out.ensemble.square().mean()).backward()
        steps.append(out.ensemble.detach())
    torch.testing.assert_close(*steps, **close)
    # Whatever the sizes of the gradients, every weight's largest change is 0.01.
    largest = [0.01 / p.grad.abs().max() if p.grad is not None else 0.0 for p in ours.parameters()]
    assert sum(bool(scale) and scale < torch.inf for scale in largest) > 50
    with torch.no_grad():
        for net in (ours, theirs):
            for parameter, scale in zip(net.parameters(), largest, strict=True):
                if scale and scale < torch.inf:
                    parameter -= scale * parameter.grad
    torch.testing.assert_close(with_our_names(theirs), dict(ours.state_dict()), **close)
    with torch.no_grad():
        after = ours.eval()(x).ensemble
        assert not torch.allclose(after, expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(theirs.eval()(x).ensemble, after, **close)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("frozen", [True, False])
def test_refinenet_on_resnet50_is_our_own(dtype: torch.dtype, tolerance: float, frozen: bool) -> None:
    """The same features before and after a training step, with channels replaced."""
    ours, theirs = twins("refinenet", "resnet50", dtype, frozen_statistics=frozen)
    assert all(layer.replaced().any() for layer in exchanging_layers(theirs).values())
    assert_trains_alike(ours, theirs, dtype, tolerance)


@dataclass(frozen=True)
class PrivateStage(NoFusion):
    """Convolutions of one stage are private."""

    stage: int = 3

    def private_convolutions(self, stage: int) -> bool:
        return stage == self.stage


@pytest.mark.parametrize(
    ("build", "fusion"),
    [
        ("pspnet", Exchange()),
        ("deeplabv3plus", Exchange()),
        ("refinenet", Exchange(at="downsampling", region="all")),
        ("refinenet", Exchange(convolutions="private")),
        ("refinenet", FixedPortion(choice="random")),
        ("refinenet", NoFusion(norms="shared")),
        ("refinenet", ConcatOnce(stage=2)),
        ("refinenet", PrivateStage()),
    ],
    ids=str,
)
def test_fusions_are_those_of_our_own_resnet18(build: str, fusion: Fusion) -> None:
    ours, theirs = twins(build, "resnet18", fusion=fusion)
    points = [sum(1 for _ in exchange_points(net)) for net in (ours, theirs)]
    assert points[0] == points[1]
    private = [sum(isinstance(layer, PrivateConv2d) for layer in net.modules()) for net in (ours, theirs)]
    assert private[0] == private[1]
    assert_trains_alike(ours, theirs, torch.float64, 1e-10)


@pytest.mark.parametrize("name", WHOLE)
def test_stages_compute_what_timms_pyramid_does(name: str) -> None:
    net = encoder(name, frozen_statistics=False).double()
    randomise_norms(net)
    assert len(net.stages()) == (0 if name in TANGLED else 4)
    copied = copy.deepcopy(net)
    for stage in copied.stages():
        assert all(any(part is own for own in copied.network.modules()) for part in stage)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for feature, expected in zip(copied.eval()(x), net.network.eval()(x), strict=True):
            assert torch.equal(feature, expected)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "tf_efficientnet_lite0", "regnety_002", "xception41"])
def test_dilated_features_end_at_an_eighth(name: str) -> None:
    with torch.device("meta"):
        net, plain = (encoder(name, dilated=dilated) for dilated in (True, False))
        features = net(torch.empty(2, 3, 64, 96))
    assert net.strides == (4, 8, 8, 8)
    sizes = [(16, 24), (8, 12), (8, 12), (8, 12)]
    assert [tuple(feature.shape) for feature in features] == [
        (2, channels, *size) for channels, size in zip(net.channels, sizes, strict=True)
    ]
    assert list(exchanging_layers(net)) == list(exchanging_layers(plain))
    assert {key: value.shape for key, value in net.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }


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
    assert net.normalization == input_normalization(f"timm:{name}") == (config.mean, config.std)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, ExchangeNorm) for module in norms)


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


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resnet51", r"^encoder: timm has no network 'resnet51'; did you mean 'resnet51q'\?$"),
        ("hf_hub:timm/resnet50.a1_in1k", r"timm has no network 'hf_hub:timm/resnet50\.a1_in1k'"),
        ("resnet50.a1_in2k", r"no record of weights 'resnet50\.a1_in2k'; did you mean 'resnet50\.a1_in1k'\?"),
        ("levit_128s", r"levit_128s has no features of strides \(4, 8, 16, 32\): "),
        ("vit_tiny_patch16_224", r"vit_tiny_patch16_224 ends in features of strides \(16, 16, "),
        (
            "convnext_atto_rms",
            "convnext_atto_rms cannot be converted: .*those that it has cannot exchange: RmsNorm2d$",
        ),
        ("coat_tiny", r"coat_tiny takes images of one size alone: Input height \(256\) doesn't match"),
    ],
)
def test_what_is_no_encoder_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encoder(name)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_modalities must be at least 1, got 0"):
        encoder("resnet18", 0)
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        encoder("resnet18", in_channels=0)
    with torch.device("meta"):
        net = encoder("resnet18")
    with pytest.raises(ValueError, match="has 2 modalities, but x is a list of 3"):
        net([torch.zeros(1, 3, 32, 32)] * 3)
    with pytest.raises(ValueError, match=r"one of .*, resnet18, .*, timm:NAME, got 'tim:resnet18'"):
        make_encoder("tim:resnet18", 2, Exchange())


@pytest.mark.parametrize(
    ("name", "fusion", "reason"),
    [
        ("hrnet_w18_small", ConcatOnce(), "is no chain of stages"),
        ("hrnet_w18_small", PrivateStage(stage=4), "is no chain of stages"),
        ("resnet18", PrivateStage(stage=0), "does not tell its stem from stage 1"),
        ("vgg11_bn", Exchange(at="downsampling"), "halves the resolution in no block"),
        (
            "tf_efficientnet_cc_b0_4e",
            NoFusion(convolutions="private"),
            r"has layers without a private form \(CondConv2d, Conv2dSame, Linear\)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Fusion) else None,
)
def test_fusions_that_a_network_cannot_serve_are_refused(name: str, fusion: Fusion, reason: str) -> None:
    problem = rf"^encoder: timm's {name} {reason}.*cannot serve {type(fusion).__name__}\(.*; choose fusion="
    with torch.device("meta"), pytest.raises(ValueError, match=problem):
        encoder(name, fusion=fusion)


def test_a_network_without_a_dilated_form_is_refused() -> None:
    vision.timm()
    with pytest.raises(
        ValueError, match=r"densenet121 has no dilated features, which PSPNet takes, of strides"
    ):
        models.pspnet("timm:densenet121")


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_weights_load_whatever_reads_the_image(tmp_path: Path, scale: float) -> None:
    """Two weights read it in RepVGG, none does so directly in TResNet."""
    timm = vision.timm()
    for name in ("repvgg_a0", "tresnet_m"):
        path = tmp_path / f"{name}.pth"
        whole = timm.create_model(name, pretrained=False).state_dict()
        torch.save(whole, path)
        net = encoder(name)
        if name == "tresnet_m" and scale != 1:
            with pytest.raises(ValueError, match=r"timm's tresnet_m rearranges the image before"):
                load_imagenet(net, path, scale=[scale] * 3)
            return
        assert load_imagenet(net, path, bgr=scale != 1, scale=[scale] * 3) == ([], [])
        for key in net.stem_weights:
            expected = whole[key.removeprefix("network.")]
            expected = expected if scale == 1 else scale * expected.flip(1)
            assert torch.equal(net.state_dict()[key], expected)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    whole = vision.timm().create_model("mobilenetv2_100", pretrained=False).state_dict()
    torch.save(whole, tmp_path / "mobilenetv2.pth")
    with pytest.raises(ValueError, match=r"wrong shapes: network\.conv_stem"):
        load_imagenet(encoder("mobilenetv2_050"), tmp_path / "mobilenetv2.pth")
    with pytest.raises(ValueError, match=r"no key of timm's regnety_002 in it; it starts with conv_stem"):
        load_imagenet(encoder("regnety_002"), tmp_path / "mobilenetv2.pth")


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for build in (make_encoder, lambda name, *_: input_normalization(name)):
        with pytest.raises(
            ImportError, match=r"^encoder: timm is not installed: pip install 'cen_ext\[timm\]'"
        ):
            build("timm:resnet18", 2, Exchange())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "nms does not exist.*another torch",
        ),
        ("import torchvision_that_is_missing", "No module named 'torchvision_that_is_missing'$"),
    ],
)
def test_a_timm_that_cannot_be_imported_says_why(
    text: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ImportError, match=f"^encoder: timm cannot be imported: .*{problem}"):
        make_encoder("timm:resnet18", 2, Exchange())
