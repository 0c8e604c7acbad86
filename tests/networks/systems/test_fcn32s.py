"""FCN-32s: its formula and alignment a second time, sizes, both fusions, pretrained and public weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.counting import count_parameters
from models.networks.encoders import load_imagenet
from models.networks.released import load_released
from models.networks.systems.base import make_system
from models.networks.systems.fcn32s import FCN32s
from tests.helpers import vision
from tests.helpers.vgg_states import unit_names, vgg16_shapes, vgg16_state

WIDTHS = (4, 4, 4, 5, 5, 7)
CLASSES = 3


def small(channels: tuple[int, ...] = (3,), **options: object) -> FCN32s:
    """Narrow, in float64, without dropout, with random scores, and biases that keep units alive."""
    net = FCN32s(CLASSES, channels, widths=WIDTHS, **{"dropout": 0.0, **options}).double()
    for name, parameter in net.named_parameters():
        if "classifier" in name:
            nn.init.normal_(parameter)
        elif name.endswith("bias"):
            nn.init.uniform_(parameter, 0.2, 0.6)
    return net


def images(channels: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    return torch.randn(2 * len(channels), 3, *size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "fusion", "expected"),
    [
        ((3,), "late", 134_424_424),
        ((3, 3), "late", 268_848_848),
        ((3, 1), "late", 268_848_848 - 2 * 9 * 64),
        ((3, 1), "early", 134_424_424 + 9 * 64),
        ((3, 3), "early", 134_424_424 + 3 * 9 * 64),
    ],
)
def test_parameter_counts(channels: tuple[int, ...], fusion: str, expected: int) -> None:
    with torch.device("meta"):
        net = make_system("fcn32s", 40, channels, fcn_fusion=fusion)
    assert count_parameters(net) == expected
    assert net.state_dict().keys() == dict(net.named_parameters()).keys()  # the kernel is in no file


def test_a_whole_network_answers_at_the_size_of_the_image() -> None:
    with torch.device("meta"):
        net = FCN32s(40, (3, 3)).eval()
        output = net(torch.empty(2, 3, 480, 640))
    assert output.branches.shape == (1, 1, 40, 480, 640)
    assert output.ensemble.shape == (1, 40, 480, 640)


def features(state: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """VGG-16 of the padded image; a pooling that goes on to the end of odd sizes."""
    x = F.pad(x, (99, 99, 99, 99))  # the convolution itself pads by 1
    before = "0"
    for name in unit_names():
        conv = f"{prefix}stages.{name}.conv"
        weight = state[f"{conv}.weight"]
        if f"{conv}.extra" in state:
            weight = torch.cat([weight, state[f"{conv}.extra"]], 1)
        if name[0] != before:
            x = ceil_pool(x)
        before = name[0]
        x = F.conv2d(x, weight, state[f"{conv}.bias"], padding=1).clamp(min=0)
    x = ceil_pool(x)
    for name in ("fc6", "fc7"):
        x = F.conv2d(x, state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"]).clamp(min=0)
    return x


def ceil_pool(x: Tensor) -> Tensor:
    height, width = (-(-side // 2) for side in x.shape[-2:])
    padded = F.pad(x, (0, 2 * width - x.shape[-1], 0, 2 * height - x.shape[-2]), value=-torch.inf)
    return padded.unflatten(3, (width, 2)).unflatten(2, (height, 2)).amax((3, 5))


def bilinear(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Every score's tent over 64x64 pixels, added up on the whole map, of which the image is cut out."""
    n, classes, h, w = scores.shape
    whole = torch.zeros(n, classes, 32 * (h + 1), 32 * (w + 1), dtype=scores.dtype)
    tent = torch.tensor([(i + 0.5) / 32 if i < 32 else (63.5 - i) / 32 for i in range(64)]).to(scores)
    for i in range(h):
        for j in range(w):
            added = scores[:, :, i, j, None, None] * tent[:, None] * tent
            whole[:, :, 32 * i : 32 * i + 64, 32 * j : 32 * j + 64] += added
    return whole[:, :, 19 : 19 + size[0], 19 : 19 + size[1]]


@pytest.mark.parametrize("size", [(33, 33), (37, 53), (48, 64), (91, 66)])
@pytest.mark.parametrize(
    ("channels", "fusion"), [((3,), "late"), ((3, 1), "late"), ((3, 3), "early"), ((1, 3), "early")]
)
def test_formula(channels: tuple[int, ...], fusion: str, size: tuple[int, int]) -> None:
    net, x = small(channels, fcn_fusion=fusion), images(channels, size)
    state = net.state_dict()
    parts = [part[:, :count] for part, count in zip(x.chunk(len(channels)), channels, strict=True)]
    if fusion == "early":
        parts = [torch.cat([part for part in parts if part.shape[1] == 3] + parts[: channels[0] == 1], 1)]
    scores = [
        F.conv2d(
            features(state, f"encoder.streams.{m}.", part),
            state[f"classifier.{m}.weight"],
            state[f"classifier.{m}.bias"],
        )
        for m, part in enumerate(parts)
    ]
    weight = {1: 1.0, 2: 0.5}[len(scores)]
    expected = bilinear(sum(weight * score for score in scores), size)
    output = net.eval()(x)
    assert expected.shape[-2:] == size
    assert not torch.allclose(expected[0], expected[1])  # the two images reach it
    torch.testing.assert_close(output.branches[0], expected)
    torch.testing.assert_close(output.ensemble, expected)


@pytest.mark.parametrize("size", [(33, 33), (40, 53)])
def test_exported_programs_pool_alike(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = small().eval(), images((3,), size)
    expected = net(x).ensemble
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(net(x).ensemble, expected)


def test_scores_start_as_zeros_and_convolutions_as_he_has_it() -> None:
    net = FCN32s(CLASSES, (3, 1), fcn_fusion="early", widths=(64,) * 6)
    assert not any(parameter.any() for parameter in net.classifier.parameters())
    state = net.encoder.state_dict()
    for name, kernel in {"stages.0.0.conv.weight": 9, "stages.0.0.conv.extra": 9, "fc6.weight": 49}.items():
        expected = (2 / (64 * kernel)) ** 0.5
        assert state[f"streams.0.{name}"].std().item() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("channels", "fusion"), [((3, 3), "late"), ((3, 1), "early")])
def test_gradients_reach_every_parameter(channels: tuple[int, ...], fusion: str) -> None:
    net = small(channels, fcn_fusion=fusion).train()
    net(images(channels, (37, 53))).branches.square().sum().backward()
    for name, parameter in net.named_parameters():
        if name != "alpha":
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_dropout_comes_before_the_scores_in_training_alone() -> None:
    """Of probability 1 it leaves the biases of the scores."""
    net = small((3, 3), dropout=1.0)
    x = images((3, 3), (33, 40))
    bias = torch.stack([score.bias for score in net.classifier]).mean(0)
    expected = bilinear(bias[:, None, None].expand(2, -1, 2, 2), (33, 40))
    torch.testing.assert_close(net.train()(x).branches[0], expected)
    assert not torch.allclose(net.eval()(x).branches[0], expected)


def test_names_of_torchvisions_weights() -> None:
    vision.torchvision()
    import torchvision

    for norm in (False, True):
        with torch.device("meta"):
            net = (torchvision.models.vgg16_bn if norm else torchvision.models.vgg16)()
        assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == vgg16_shapes(norm=norm)


@pytest.mark.parametrize(("channels", "fusion"), [((3,), "late"), ((3, 1), "late"), ((3, 3), "early")])
def test_published_weights_fill_the_encoder(channels: tuple[int, ...], fusion: str) -> None:
    with torch.device("meta"):
        encoder = FCN32s(40, channels, fcn_fusion=fusion).encoder
        state = {name: torch.empty(shape) for name, shape in vgg16_shapes().items()}
    found = encoder.from_pretrained(state)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in encoder.state_dict().items()
    }


def test_weights_load_into_both_streams(tmp_path: Path) -> None:
    state = vgg16_state(WIDTHS[:5], WIDTHS[5], tmp_path / "vgg16.pth")
    net = small((3, 1)).float()
    assert load_imagenet(net.encoder, tmp_path / "vgg16.pth") == ([], [])
    loaded = net.encoder.state_dict()
    first = state["features.0.weight"]
    assert torch.equal(loaded["streams.0.stages.0.0.conv.weight"], first)
    torch.testing.assert_close(
        loaded["streams.1.stages.0.0.conv.weight"][:, 0], (first[:, 0] + first[:, 1] + first[:, 2]) / 3
    )
    for stream in ("streams.0", "streams.1"):
        assert torch.equal(loaded[f"{stream}.stages.2.1.conv.bias"], state["features.12.bias"])
        assert torch.equal(loaded[f"{stream}.stages.4.2.conv.weight"], state["features.28.weight"])
        # As the linear layer reads features of 7x7 pixels, channel by channel.
        x = torch.randn(1, WIDTHS[4], 7, 7)
        expected = F.linear(x.flatten(1), state["classifier.0.weight"], state["classifier.0.bias"])
        fc6 = F.conv2d(x, loaded[f"{stream}.fc6.weight"], loaded[f"{stream}.fc6.bias"])
        torch.testing.assert_close(fc6[:, :, 0, 0], expected)
        assert torch.equal(loaded[f"{stream}.fc7.weight"][:, :, 0, 0], state["classifier.3.weight"])


@pytest.mark.parametrize("channels", [(3, 1), (1, 3), (3, 3)])
def test_early_fusion_starts_from_colors_and_their_mean(channels: tuple[int, ...], tmp_path: Path) -> None:
    state = vgg16_state(WIDTHS[:5], WIDTHS[5], tmp_path / "vgg16.pth")
    net = small(channels, fcn_fusion="early").float()
    assert load_imagenet(net.encoder, tmp_path / "vgg16.pth") == ([], [])
    colors, other = torch.randn(2, 1, 3, 5, 5)
    other = other[:, : min(channels[-1], channels[0])]
    first = state["features.0.weight"]
    grey = first.mean(1, keepdim=True)
    expected = F.conv2d(colors, first, state["features.0.bias"], padding=100)
    expected += sum(F.conv2d(other[:, [c]], grey, padding=100) for c in range(other.shape[1]))
    found = net.encoder.streams[0].stages[0][0].conv(torch.cat([colors, other], 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [(3, 3), (3, 1)])
def test_three_further_channels_are_scaled_as_colors(channels: tuple[int, ...], tmp_path: Path) -> None:
    """A single one has no color's deviation, by which it could be."""
    state = vgg16_state(WIDTHS[:5], WIDTHS[5], tmp_path / "vgg16.pth")
    net = small(channels, fcn_fusion="early").float()
    load_imagenet(net.encoder, tmp_path / "vgg16.pth", bgr=True, scale=(2.0, 3.0, 4.0))
    grey = state["features.0.weight"].mean(1, keepdim=True)
    factors = torch.tensor([2.0, 3.0, 4.0] if channels[1] == 3 else [1.0])
    found = net.encoder.streams[0].stages[0][0].conv.extra
    torch.testing.assert_close(found.detach(), grey * factors[:, None, None])


def test_weights_of_blue_first_and_another_scale(tmp_path: Path) -> None:
    """Those that read colors are turned and scaled."""
    state = vgg16_state(WIDTHS[:5], WIDTHS[5], tmp_path / "vgg16.pth")
    first = state["features.0.weight"]
    for fusion, stems in {"late": ["0", "1"], "early": ["0"]}.items():
        net = small((3, 3), fcn_fusion=fusion).float()
        load_imagenet(net.encoder, tmp_path / "vgg16.pth", bgr=True, scale=(2.0, 3.0, 4.0))
        expected = first[:, [2, 1, 0]] * torch.tensor([2.0, 3.0, 4.0])[:, None, None]
        for m in stems:
            torch.testing.assert_close(
                net.encoder.state_dict()[f"streams.{m}.stages.0.0.conv.weight"], expected
            )


def test_refused_weights(tmp_path: Path) -> None:
    vgg16_state(WIDTHS[:5], WIDTHS[5], tmp_path / "vgg16_bn.pth", norm=True)
    with pytest.raises(ValueError, match=r"^weights must be those of vgg16, got vgg16_bn's"):
        load_imagenet(small().encoder, tmp_path / "vgg16_bn.pth")
    path = tmp_path / "vgg16.pth"
    state = vgg16_state(WIDTHS[:5], WIDTHS[5], path)
    torch.save({**state, "features.30.weight": torch.zeros(1)}, path)
    assert load_imagenet(small().float().encoder, path).unexpected == ["features.30.weight"]
    torch.save({**state, "classifier.0.weight": torch.zeros(7, 5)}, path)
    wrong = (
        r"wrong shapes: streams\.0\.fc6\.weight is \(7, 5\) in the file, but \(7, 5, 7, 7\) in the encoder$"
    )
    with pytest.raises(ValueError, match=wrong):
        load_imagenet(small().encoder, path)


def released() -> dict[str, Tensor]:
    """The public port's names, in the shapes of the narrow network."""
    state = {}
    channels = 3
    for name, width in zip(unit_names(), [4] * 7 + [5] * 6, strict=True):
        stage, unit = (int(number) + 1 for number in name.split("."))
        state[f"conv{stage}_{unit}.weight"] = torch.randn(width, channels, 3, 3)
        state[f"conv{stage}_{unit}.bias"] = torch.randn(width)
        channels = width
    for name, shape in {"fc6": (7, 5, 7, 7), "fc7": (7, 7, 1, 1), "score_fr": (CLASSES, 7, 1, 1)}.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return {**state, "upscore.weight": torch.randn(CLASSES, CLASSES, 64, 64)}


def test_public_weights() -> None:
    state, net = released(), small().float()
    assert load_released(net, {"state_dict": state}) is net
    theirs = {
        f"stages.{name}.conv.{entry}": state[f"conv{int(name[0]) + 1}_{int(name[2]) + 1}.{entry}"]
        for name in unit_names()
        for entry in ("weight", "bias")
    }
    theirs |= {key: value for key, value in state.items() if key.startswith("fc")}
    x = torch.randn(1, 3, 37, 40)
    score = F.conv2d(features(theirs, "", x), state["score_fr.weight"], state["score_fr.bias"])
    expected = bilinear(score, (37, 40))
    found = net.eval()(x).ensemble
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("channels", [(1,), (3, 3)])
def test_public_weights_are_of_one_image_in_colors(channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"network=fcn32s .* got channels {channels[0]}"):
        small(channels).from_released(released())


@pytest.mark.parametrize("wrong", ["missing", "left over", "of another shape"])
def test_public_weights_that_do_not_fit(wrong: str) -> None:
    state = released()
    if wrong == "missing":
        del state["fc7.bias"]
    else:
        name = {"left over": "score_pool4.weight", "of another shape": "score_fr.weight"}[wrong]
        state[name] = torch.zeros(21, 7, 1, 1)
    with pytest.raises(ValueError, match=f"state must be of the public FCN-32s: {wrong}: "):
        small().from_released(state)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"^fcn_fusion must be late or early, got 'erly'; did you mean 'early'"
    ):
        FCN32s(CLASSES, (3, 1), fcn_fusion="erly", widths=WIDTHS)
    with pytest.raises(ValueError, match=r"network=fcn32s takes 1 or 2 modalities, got 3"):
        make_system("fcn32s", CLASSES, (3, 1, 3))
