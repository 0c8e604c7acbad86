"""FuseNet: its formula and unpooling a second time, where it drops, sizes, SF1 to SF5, pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.counting import count_parameters
from models.networks.encoders import load_imagenet
from models.networks.systems.base import make_system
from models.networks.systems.fusenet import FuseNet, Maxima, unpool
from tests.helpers.vgg_states import NORM_ENTRIES, STAGES, unit_names, vgg16_shapes, vgg16_state

WIDTHS = (4, 3, 4, 5, 6)
CLASSES = 3


def small(channels: tuple[int, int] = (3, 1), **options: object) -> FuseNet:
    """Narrow, in float64, without dropout, with random norms whose biases keep units alive."""
    net = FuseNet(CLASSES, channels, widths=WIDTHS, **{"dropout": 0.0, **options}).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            module.bias.data.uniform_(0.3, 0.6)
    return net


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(4, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("classes", "channels", "stages", "expected"),
    [
        (40, (3, 1), 5, 44_188_072),
        (37, (3, 1), 5, 44_186_341),
        (40, (3, 1), 1, 29_503_912),
        (40, (3, 3), 5, 44_188_072 + 2 * 9 * 64),
    ],
)
def test_parameter_counts(classes: int, channels: tuple[int, int], stages: int, expected: int) -> None:
    with torch.device("meta"):
        net = make_system("fusenet", classes, channels, fused_stages=stages)
    assert count_parameters(net) == expected


def test_a_whole_network_answers_at_the_size_of_the_image() -> None:
    with torch.device("meta"):
        output = FuseNet(40, (3, 1)).eval()(torch.empty(2, 3, 480, 640))
    assert output.branches.shape == (1, 1, 40, 480, 640)
    assert output.ensemble.shape == (1, 40, 480, 640)


@pytest.mark.parametrize("stages", range(1, 6))
def test_depths_encoder_ends_with_the_last_fusion(stages: int) -> None:
    names = [name for name, _ in small(fused_stages=stages).named_parameters()]
    read = {name.split(".")[4] for name in names if name.startswith("encoder.streams.1.")}
    assert read == {str(stage) for stage in range(stages)}


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of whole 2x2 windows, and a map that is 1 where each of them is found first."""
    pooled, places = torch.zeros_like(x[..., ::2, ::2]), torch.zeros_like(x)
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    pooled = pooled[..., :height, :width].clone()
    for i in range(height):
        for j in range(width):
            window = x[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(2)
            first = window.argmax(2, keepdim=True)
            pooled[..., i, j] = window.gather(2, first)[..., 0]
            found = (torch.arange(4) == first).to(x)
            places[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = found.unflatten(2, (2, 2))
    return pooled, places


def put_back(x: Tensor, places: Tensor) -> Tensor:
    """Values over whole windows, where the map has ones."""
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    missing = [have - had for have, had in zip(places.shape[:1:-1], repeated.shape[:1:-1], strict=True)]
    return F.pad(repeated, (0, missing[0], 0, missing[1])) * places


@pytest.mark.parametrize("size", [(2, 2), (5, 4), (6, 7), (7, 9)])
def test_unpooling(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    pooled, positions = F.max_pool2d(x, 2, return_indices=True)
    y = torch.randn_like(pooled).requires_grad_()
    found = unpool(y, Maxima(positions, *size))
    expected_pooled, places = pool(x)
    assert torch.equal(pooled, expected_pooled)
    assert torch.equal(found, put_back(y, places))
    assert torch.equal(unpool(pooled, Maxima(positions, *size)), x * places)
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(found, y, upstream)
    assert torch.equal(gradient, F.avg_pool2d(upstream * places, 2) * 4)


def cbr(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Convolution, norm by the running statistics, relu."""
    x = F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=1)
    scale, bias, mean, var = (state[f"{name}.norm.{entry}"][:, None, None] for entry in NORM_ENTRIES)
    return ((x - mean) / (var + 1e-5).sqrt() * scale + bias).clamp(min=0)


def formula(state: Mapping[str, Tensor], rgb: Tensor, depth: Tensor, fused: int) -> Tensor:
    maps = []
    for stage in range(5):
        for unit in range(STAGES[stage]):
            rgb = cbr(state, f"encoder.streams.0.stages.{stage}.{unit}", rgb)
        if stage < fused:
            for unit in range(STAGES[stage]):
                depth = cbr(state, f"encoder.streams.1.stages.{stage}.{unit}", depth)
            rgb = rgb + depth
            depth, _ = pool(depth)
        rgb, places = pool(rgb)
        maps.append(places)
    for stage in (4, 3, 2, 1, 0):
        rgb = put_back(rgb, maps[stage])
        for unit in range(STAGES[stage] - (stage == 0)):
            rgb = cbr(state, f"decoder.stages.{stage}.{unit}", rgb)
    return F.conv2d(rgb, state["classifier.weight"], state["classifier.bias"], padding=1)


@pytest.mark.parametrize("size", [(33, 33), (37, 53), (48, 64)])
@pytest.mark.parametrize(("channels", "fused"), [((3, 1), 5), ((3, 3), 2)])
def test_formula(channels: tuple[int, int], fused: int, size: tuple[int, int]) -> None:
    net, x = small(channels, fused_stages=fused).eval(), images(size)
    rgb, depth = x.chunk(2)
    with torch.no_grad():
        output = net(x)
        expected = formula(net.state_dict(), rgb, depth[:, : channels[1]], fused)
    assert expected.shape == (2, CLASSES, *size)
    assert not torch.allclose(expected[0], expected[1])  # the two images reach it
    torch.testing.assert_close(output.branches[0], expected)
    torch.testing.assert_close(output.ensemble, expected)


@pytest.mark.parametrize(("fused", "of_depth"), [(5, [3, 4]), (4, [3]), (3, []), (1, [])])
def test_where_it_drops(fused: int, of_depth: list[int]) -> None:
    """After the poolings of stage 3, 4 and 5, and after the decoder's stages of the same width."""
    net = small(fused_stages=fused, dropout=0.5)
    assert (net.encoder.dropout.p, net.decoder.dropout.p) == (0.5, 0.5)
    seen: dict[str, list[tuple[int, ...]]] = {"encoder": [], "decoder": []}
    for part, shapes in seen.items():
        getattr(net, part).dropout.register_forward_hook(
            lambda _module, _inputs, y, shapes=shapes: shapes.append(tuple(y.shape[1:]))
        )
    net(images((64, 96)))
    pooled = {3: (4, 8, 12), 4: (5, 4, 6), 5: (6, 2, 3)}
    # Stage by stage, of the colors and then of depth.
    expected = [pooled[stage] for stage in (3, 4, 5) for _ in range(1 + (stage in of_depth))]
    assert seen["encoder"] == expected
    assert seen["decoder"] == [(5, 4, 6), (4, 8, 12), (3, 16, 24)]


def test_gradients_reach_every_parameter() -> None:
    net = small().train()
    net(images((37, 53))).branches.square().sum().backward()
    for name, parameter in net.named_parameters():
        if name != "alpha":
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_starts_as_he_has_it() -> None:
    net = FuseNet(64, (3, 1), widths=(64,) * 5)
    state = net.state_dict()
    for name in ("encoder.streams.1.stages.4.2.conv", "decoder.stages.1.0.conv", "classifier"):
        assert state[f"{name}.weight"].std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
        assert not state[f"{name}.bias"].any()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("fused", [5, 2])
def test_published_weights_fill_the_encoder(fused: int, norm: bool) -> None:
    with torch.device("meta"):
        encoder = FuseNet(40, (3, 1), fused_stages=fused).encoder
        state = {name: torch.empty(shape) for name, shape in vgg16_shapes(norm=norm).items()}
    found = encoder.from_pretrained(state)
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in encoder.state_dict().items() if norm or ".norm." not in key
    }


@pytest.mark.parametrize("norm", [False, True])
def test_weights_load_into_both_streams(norm: bool, tmp_path: Path) -> None:
    state = vgg16_state(WIDTHS, 7, tmp_path / "vgg16.pth", norm=norm)
    encoder = small(fused_stages=4).float().encoder
    missing, unexpected = load_imagenet(encoder, tmp_path / "vgg16.pth")
    assert unexpected == []
    norms = [
        f"streams.{m}.stages.{name}.norm.{entry}"
        for m, stages in enumerate((5, 4))
        for name in unit_names(stages)
        for entry in NORM_ENTRIES
    ]
    assert missing == ([] if norm else norms)
    loaded = encoder.state_dict()
    first = state["features.0.weight"]
    assert torch.equal(loaded["streams.0.stages.0.0.conv.weight"], first)
    torch.testing.assert_close(
        loaded["streams.1.stages.0.0.conv.weight"][:, 0], (first[:, 0] + first[:, 1] + first[:, 2]) / 3
    )
    place, last = (20, 40) if norm else (14, 28)  # the third convolutions of stage 3 and of stage 5
    assert torch.equal(loaded["streams.0.stages.4.2.conv.weight"], state[f"features.{last}.weight"])
    for stream in ("streams.0", "streams.1"):
        unit = f"{stream}.stages.2.2"
        assert torch.equal(loaded[f"{unit}.conv.bias"], state[f"features.{place}.bias"])
        if norm:
            for entry in NORM_ENTRIES:
                assert torch.equal(loaded[f"{unit}.norm.{entry}"], state[f"features.{place + 1}.{entry}"])


def test_colors_alone_are_turned_for_weights_of_blue_first(tmp_path: Path) -> None:
    state = vgg16_state(WIDTHS, 7, tmp_path / "vgg16.pth")
    encoder = small().float().encoder
    load_imagenet(encoder, tmp_path / "vgg16.pth", bgr=True)
    first = state["features.0.weight"]
    loaded = encoder.state_dict()
    assert torch.equal(loaded["streams.0.stages.0.0.conv.weight"], first[:, [2, 1, 0]])
    torch.testing.assert_close(loaded["streams.1.stages.0.0.conv.weight"], first.mean(1, keepdim=True))


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"^data.modalities must begin with one of colors with model.network=fusenet"
    ):
        FuseNet(CLASSES, (1, 3), widths=WIDTHS)
    for stages in (0, 6):
        with pytest.raises(ValueError, match=rf"^fused_stages must be 1 to 5, got {stages}"):
            small(fused_stages=stages)
    with pytest.raises(ValueError, match=r"network=fusenet takes 2 modalities, got 1"):
        make_system("fusenet", CLASSES, (3,))
    with pytest.raises(ValueError, match=r"network=fusenet: no public checkpoint's layout is known"):
        small().from_released({})
