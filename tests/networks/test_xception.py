"""Aligned Xception: its formula, timm's names and weights, exchange points, stages that end within blocks."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import exchanging_layers
from cen_ext.modules import ExchangeNorm
from examples.own_fusion import ConcatOnce
from models.fusion import Average, Exchange, NoFusion
from models.networks.encoders import AlignedXception, input_normalization, load_imagenet, make_encoder
from models.networks.private import PrivateConv2d
from tests.helpers import vision
from tests.helpers.encoder_contract import check_encoder
from tests.helpers.networks import randomise_norms
from tests.helpers.small_xception import SmallXception

# Parameters without classifier, and those of the norms.
PARAMETERS = {"xception65": (37_867_312, 185_200), "xception71": (40_289_736, 198_976)}
ENTRY = {
    "xception65": [(128, 2), (256, 2), (728, 2)],
    "xception71": [(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)],
}


def small(num_modalities: int = 2, fusion: object = None, **options: object) -> AlignedXception:
    options = {"frozen_statistics": False, **options}
    encoder = SmallXception(num_modalities, fusion or NoFusion(), **options).double()
    randomise_norms(encoder)
    return encoder


def images(num_modalities: int = 2) -> Tensor:
    return torch.randn(2 * num_modalities, 3, 65, 97, dtype=torch.float64)


def test_contract() -> None:
    check_encoder("small_xception")


def test_parameter_counts() -> None:
    for name, (parameters, norms) in PARAMETERS.items():
        for num_modalities in (1, 2):
            with torch.device("meta"):
                encoder = make_encoder(name, num_modalities, NoFusion())
            own = [m for m in encoder.modules() if isinstance(m, ExchangeNorm)]
            assert sum(p.numel() for m in own for p in m.parameters()) == num_modalities * norms
            assert all(m.eps == 1e-3 for m in own)
            count = sum(p.numel() for p in encoder.parameters())
            assert count == parameters + (num_modalities - 1) * norms


def timms_shapes(entry: list[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """The state of timm's network of that entry flow, name by name, batch counters aside."""

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", (channels,)

    shapes = {"stem.0.conv.weight": (32, 3, 3, 3), "stem.1.conv.weight": (64, 32, 3, 3)}
    shapes |= {**dict(norm("stem.0.bn", 32)), **dict(norm("stem.1.bn", 64))}
    blocks = [((width, width, width), stride) for width, stride in entry] + [((728, 728, 728), 1)] * 16
    blocks += [((728, 1024, 1024), 2), ((1536, 1536, 2048), 1)]
    channels = 64
    for i, (widths, stride) in enumerate(blocks):
        if i < len(blocks) - 1 and (stride == 2 or widths[2] != channels):
            shapes[f"blocks.{i}.shortcut.conv.weight"] = (widths[2], channels, 1, 1)
            shapes |= dict(norm(f"blocks.{i}.shortcut.bn", widths[2]))
        for j, width in enumerate(widths, 1):
            conv = f"blocks.{i}.stack.conv{j}"
            shapes |= {
                f"{conv}.conv_dw.weight": (channels, 1, 3, 3),
                f"{conv}.conv_pw.weight": (width, channels, 1, 1),
            }
            shapes |= {**dict(norm(f"{conv}.bn_dw", channels)), **dict(norm(f"{conv}.bn_pw", width))}
            channels = width
    return shapes | {"head.fc.weight": (1000, channels), "head.fc.bias": (1000,)}


@pytest.mark.parametrize("name", ENTRY)
def test_timms_names_and_shapes_are_translated(name: str) -> None:
    shapes = timms_shapes(ENTRY[name])
    if name == "xception65":  # with the classifier for ImageNet
        trained = [shape for key, shape in shapes.items() if "running" not in key]
        assert sum(torch.Size(shape).numel() for shape in trained) == 39_916_312
    with torch.device("meta"):
        encoder = make_encoder(name, 1, NoFusion())
        state = encoder.from_pretrained({key: torch.empty(shape) for key, shape in shapes.items()})
    own = {key: value for key, value in encoder.state_dict().items() if not key.endswith("tracked")}
    single = {
        key: value[0] if isinstance(value, Tensor) and value.dim() == 2 else value
        for key, value in own.items()
    }
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in single.items()
    }


@pytest.mark.parametrize(
    ("name", "output_stride"), [("xception65", 32), ("xception65", 16), ("xception71", 8)]
)
def test_timms_weights_give_timms_features(name: str, output_stride: int) -> None:
    timm = vision.timm()
    whole = timm.create_model(name, pretrained=False, output_stride=output_stride).double().eval()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    encoder = make_encoder(name, 1, NoFusion(), output_stride=output_stride).double().eval()
    encoder.load_state_dict(encoder.from_pretrained(whole.state_dict()))
    x = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, intermediates_only=True)[1:]
        found = encoder(x)
    for stage, (feature, other) in enumerate(zip(found, expected, strict=True), 1):
        assert other.std() > 1e-2
        feature = feature.relu() if stage < 4 else feature  # timm's features leave behind the relu
        torch.testing.assert_close(feature, other, rtol=1e-10, atol=1e-10)
    assert input_normalization(name) == (
        timm.get_pretrained_cfg(name).mean,
        timm.get_pretrained_cfg(name).std,
    )


def test_weights_load_from_a_file_into_every_modality(tmp_path: Path) -> None:
    state = {
        key.replace("stem_convs.", "stem."): value[0] if value.dim() == 2 else value
        for key, value in small(1).state_dict().items()
    }
    torch.save(
        state | {"head.fc.weight": torch.zeros(10, 32), "head.fc.bias": torch.zeros(10)}, tmp_path / "x.pth"
    )
    encoder = small(3)
    assert load_imagenet(encoder, tmp_path / "x.pth", bgr=True) == ([], [])
    own = encoder.state_dict()
    assert torch.equal(own["stem_convs.0.conv.weight"], state["stem.0.conv.weight"].flip(1))
    assert torch.equal(own["blocks.3.shortcut.bn.weight"], state["blocks.3.shortcut.bn.weight"].repeat(3))
    assert input_normalization("small_xception") == ((0.5,) * 3, (0.5,) * 3)
    assert input_normalization("resnet18") is None
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no key of timm's small_xception in it; it starts with fc"):
        load_imagenet(encoder, tmp_path / "other.pth")


def conv_norm(conv: nn.Conv2d, norm: ExchangeNorm, x: Tensor) -> Tensor:
    """Of one modality, with running statistics."""
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    tables = (t[0, :, None, None] for t in (norm.weight, norm.running_mean, norm.running_var, norm.bias))
    weight, mean, var, bias = tables
    return weight * (y - mean) / (var + 1e-3).sqrt() + bias


def separable(conv: nn.Module, x: Tensor, *, relu_after: bool = False) -> Tensor:
    y = conv_norm(conv.conv_dw, conv.bn_dw, x)
    y = conv_norm(conv.conv_pw, conv.bn_pw, y.clamp(min=0) if relu_after else y)
    return y.clamp(min=0) if relu_after else y


def test_the_formula() -> None:
    """Each separable convolution takes the relu of its input, the exit's last block rectifies its outputs."""
    encoder, x = small(1).eval(), images(1)
    y = x
    for conv, norm in encoder.stem_convs:
        y = conv_norm(conv, norm, y).clamp(min=0)
    features = []
    *blocks, last = encoder.blocks
    for i, block in enumerate(blocks):
        inner = separable(block.stack.conv2, separable(block.stack.conv1, y.clamp(min=0)).clamp(min=0))
        if i in (2, 3, len(blocks) - 1):
            features.append(inner)
        skip = y if block.shortcut is None else conv_norm(*block.shortcut, y)
        y = separable(block.stack.conv3, inner.clamp(min=0)) + skip
    for conv in last.stack:
        y = separable(conv, y, relu_after=True)
    with torch.no_grad():
        for feature, expected in zip(encoder(x), [*features, y], strict=True):
            assert expected.std() > 1e-2
            torch.testing.assert_close(feature, expected.detach())


@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilation_computes_the_strided_features_in_between_as_well(output_stride: int) -> None:
    strided = small().eval()
    dilated = small(output_stride=output_stride).eval()
    dilated.load_state_dict(strided.state_dict())
    assert dilated.strides == tuple(min(stride, output_stride) for stride in (4, 8, 16, 32))
    x = images()
    with torch.no_grad():
        expected, found = strided(x), dilated(x)
    for feature, dense, own, stride in zip(expected, found, dilated.strides, strided.strides, strict=True):
        step = stride // own
        assert dense.shape[-2:] == (-(-65 // own), -(-97 // own))
        torch.testing.assert_close(dense[..., ::step, ::step], feature)


def test_exchange_follows_every_spatial_convolution_but_the_first() -> None:
    with torch.device("meta"):
        encoder = make_encoder("xception65", 2, Exchange(threshold=0.03))
        halving = make_encoder("xception65", 2, Exchange(at="downsampling"))
    spatial = {
        re.sub(r"\bconv(?=_dw|$)", "bn", key)
        for key, module in encoder.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    }
    assert set(exchanging_layers(encoder)) == spatial - {"stem_convs.0.bn"}
    assert len(spatial) == 2 + 3 * 21
    blocks = {key.split(".")[1] for key in exchanging_layers(halving)}
    assert blocks == {"0", "1", "2", "19"}
    assert len(exchanging_layers(halving)) == 12


def test_private_convolutions_end_where_the_stages_do() -> None:
    """Separate up to stage 2: its last block's third convolution and skip are shared again."""
    encoder = small(2, Average(stages=(2,), setting="separate"))
    private = {key for key, module in encoder.named_modules() if isinstance(module, PrivateConv2d)}
    convolutions = {key for key, module in encoder.named_modules() if isinstance(module, nn.Conv2d)}
    ends = ("blocks.3.stack.conv3.", "blocks.3.shortcut.")
    kept = {
        key for key in convolutions if key.startswith(("blocks.4", "blocks.5", "blocks.6", "blocks.7", *ends))
    }
    assert private == convolutions - kept
    copied = copy.deepcopy(encoder)
    assert all(part in set(copied.modules()) for stage in copied.stages() for part in stage)
    everything = small(2, NoFusion(convolutions="private"))
    convolutions = [module for module in everything.modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(module, PrivateConv2d) for module in convolutions)


def test_a_skip_around_the_join_of_streams_is_averaged() -> None:
    encoder, x = small(2, ConcatOnce(stage=1)).eval(), images()
    taken: list[tuple[Tensor, Tensor]] = []
    block, fused = encoder.blocks[2], encoder.fusion_stages["1"]
    nn.init.normal_(fused.reduce.weight)
    end = block.end

    def watched(inner: Tensor, y: Tensor) -> Tensor:
        taken.append((inner, y))
        return end(inner, y)

    block.end = watched
    with torch.no_grad():
        features = encoder(x)
        y = encoder.stem(x)
        for before in encoder.blocks[:2]:
            y = before.end(before.begin(y), y)
        joined = fused(block.begin(y))[0]
    assert [len(feature) for feature in features] == [2, 2, 2, 2]
    torch.testing.assert_close(features[0], joined)
    torch.testing.assert_close(taken[0], (joined, (y[:2] + y[2:]) / 2))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        make_encoder("xception65", 2, NoFusion(), output_stride=4)
    with pytest.raises(ValueError, match=r"did you mean 'xception65'\?"):
        make_encoder("xception56", 2, NoFusion())
    with pytest.raises(ValueError, match="stages must be at most 4"):
        small(2, Average(stages=(5,)))
