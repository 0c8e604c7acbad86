"""AdapNet++ and SSMA: sizes, values by a second writing, experts, sizes of images, weights, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.counting import count_parameters
from models.networks.encoders import ExchangeResNet, load_imagenet
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.systems.adapnet import AdapNetDecoder, AdapNetPlusPlus, MultiScaleConv, Unit
from models.networks.systems.base import make_system
from models.networks.systems.ssma import SSMA
from tests.helpers.networks import randomise_norms

State = Mapping[str, Tensor]

R50, R101 = "adapnet_resnet50", "adapnet_resnet101"
DEPTHS = {R50: (3, 4, 6, 3), R101: (3, 4, 23, 3)}
# Dilations of the halves of 3x3 convolutions, by block and unit.
PAPER = {
    **{(2, 4): (1, 2), (3, 3): (1, 2), (3, 4): (1, 16), (3, 5): (1, 8), (3, 6): (1, 4)},
    **{(4, 1): (2, 4), (4, 2): (2, 8), (4, 3): (2, 16)},
}
RELEASED = {key: (2, 2) if key[0] == 4 else (1, 2) for key in PAPER}


@pytest.mark.parametrize(
    ("kind", "classes", "encoder", "expected"),
    [
        (AdapNetPlusPlus, 12, R50, 30_145_366),
        (SSMA, 12, R50, 56_182_428),
        (SSMA, 40, R50, 56_282_892),
        (SSMA, 40, R101, 94_267_148),
    ],
)
def test_parameter_counts(kind: type, classes: int, encoder: str, expected: int) -> None:
    with torch.device("meta"):
        net = kind(classes, (3,) * kind.takes[0], encoder)
    sides = sum(p.numel() for name, p in net.named_parameters() if ".sides." in name)
    assert sides == 2 * (256 * classes + 2 * classes)
    assert count_parameters(net) - sides == expected


# A second writing: functions of a state dict's entries, in eval mode.


def norm(state: State, name: str, x: Tensor, relu: bool = True) -> Tensor:
    tables = (state[f"{name}.{key}"].view(-1, 1, 1) for key in ("weight", "bias", "running_mean"))
    weight, bias, mean = tables
    y = weight * (x - mean) / (state[f"{name}.running_var"].view(-1, 1, 1) + 1e-5).sqrt() + bias
    return y.clamp(min=0) if relu else y


def conv(state: State, name: str, x: Tensor, rate: int = 1, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, rate * (weight.shape[-1] // 2), rate)


def conv_norm(state: State, name: str, x: Tensor, rate: int = 1, relu: bool = True) -> Tensor:
    return norm(state, f"{name}.norm", conv(state, f"{name}.conv", x, rate), relu)


def unit(state: State, name: str, x: Tensor, stride: int, rates: tuple[int, ...] | None) -> Tensor:
    first = f"{name}.norm.weight" not in state
    before = x if first else norm(state, f"{name}.norm", x)
    inner = norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", before))
    weight = state[f"{name}.conv2.weight"]
    halves = zip(weight.chunk(2), rates or (1, 1), strict=True)
    spatial = torch.cat([F.conv2d(inner, half, None, stride, rate, rate) for half, rate in halves], 1)
    residual = conv(state, f"{name}.conv3", norm(state, f"{name}.bn2", spatial))
    if f"{name}.downsample.weight" in state:
        x = conv(state, f"{name}.downsample", inner if first else before, stride=stride)
    return x + residual


def pyramid(state: State, name: str, x: Tensor, rates: tuple[int, ...]) -> Tensor:
    parts = [conv_norm(state, f"{name}.point", x)]
    for number, rate in enumerate(rates):
        y = conv_norm(state, f"{name}.atrous.{number}.0", x)
        for each in (1, 2):
            y = conv_norm(state, f"{name}.atrous.{number}.{each}", y, rate)
        parts.append(conv_norm(state, f"{name}.atrous.{number}.3", y))
    mean = x.flatten(2).mean(2)[:, :, None, None]
    parts.append(conv_norm(state, f"{name}.pool", mean).expand_as(parts[0]))
    return conv_norm(state, f"{name}.merge", torch.cat(parts, 1), relu=False)


def encoder(state: State, name: str, x: Tensor) -> list[Tensor]:
    x = conv(state, f"{name}.conv1", norm(state, f"{name}.bn0", x, relu=False), stride=2)
    x = F.max_pool2d(norm(state, f"{name}.bn1", x), 3, 2, 1)
    blocks = []
    for block, depth in enumerate(DEPTHS[R50], 1):
        for number in range(1, depth + 1):
            stride = 2 if block in (2, 3) and number == 1 else 1
            x = unit(state, f"{name}.layer{block}.{number - 1}", x, stride, PAPER.get((block, number)))
        blocks.append(x)
    skips = [
        conv_norm(state, f"{name}.skips.{i}", y, relu=False) for i, y in enumerate((blocks[1], blocks[0]))
    ]
    return [pyramid(state, f"{name}.pyramid", norm(state, f"{name}.norm", x), (3, 6, 12)), *skips]


def gated(state: State, name: str, one: Tensor, other: Tensor) -> Tensor:
    z = torch.cat([one, other], 1)
    logits = conv(state, f"{name}.excite", conv(state, f"{name}.squeeze", z).clamp(min=0))
    y = conv(state, f"{name}.conv", z / (1 + torch.exp(-logits)))
    return norm(state, f"{name}.norm", y, relu=False) if f"{name}.norm.weight" in state else y


def enlarged(state: State, name: str, x: Tensor, factor: int, like: tuple[int, int]) -> Tensor:
    """A transposed convolution spreads each value times the kernel over twice the factor's square."""
    kernel = state[f"{name}.conv.weight"]
    n, _, h, w = x.shape
    y = x.new_zeros(n, kernel.shape[1], factor * (h + 1), factor * (w + 1))
    for i in range(h):
        for j in range(w):
            rows, columns = (slice(factor * k, factor * (k + 2)) for k in (i, j))
            y[..., rows, columns] += torch.einsum("nc,cokl->nokl", x[..., i, j], kernel)
    margin = factor // 2
    y = norm(state, f"{name}.norm", y[..., margin:, margin:], relu=False)
    return y[..., : like[0], : like[1]]


def decoder(state: State, features: list[Tensor], size: tuple[int, int]) -> Tensor:
    x, *skips = features
    for number, skip in enumerate(skips):
        name = f"decoder.stages.{number}"
        x = enlarged(state, f"{name}.enlarge", x, 2, skip.shape[-2:])
        if f"{name}.gate.conv.weight" in state:
            skip = skip * conv_norm(state, f"{name}.gate", x.flatten(2).mean(2)[:, :, None, None])
        x = torch.cat([x, skip], 1)
        for each in (0, 1):
            x = conv_norm(state, f"{name}.refine.{each}", x)
    logits = conv_norm(state, "decoder.classifier.conv", x)
    return enlarged(state, "decoder.classifier.enlarge", logits, 4, size)


def randomized(net: nn.Module) -> nn.Module:
    randomise_norms(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def images(size: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two, the second of one channel that is repeated, as data sets give them."""
    one, other = torch.randn(2, 1, 3, *size, dtype=dtype)
    return [one, other[:, :1].expand(-1, 3, -1, -1)]


@torch.no_grad()
def test_values_of_adapnet_by_a_second_writing() -> None:
    net = randomized(AdapNetPlusPlus(5, (3,)).double())
    state, x = net.state_dict(), images((37, 53))[0]
    features = encoder(state, "encoder", x)
    for found, expected in zip(net.encoder(x), features, strict=True):
        torch.testing.assert_close(found, expected)
    out = net(x)
    assert out.branches.std() > 0.1
    torch.testing.assert_close(out.branches[0], decoder(state, features, (37, 53)))
    torch.testing.assert_close(out.ensemble, out.branches[0])


@torch.no_grad()
def test_values_of_ssma_by_a_second_writing() -> None:
    net = randomized(SSMA(5, (3, 1)).double())
    state, (one, other) = net.state_dict(), images((33, 33))
    streams = [encoder(state, f"encoder.experts.{m}", x) for m, x in enumerate((one, other[:, :1]))]
    joined = [gated(state, f"joins.{i}", *each) for i, each in enumerate(zip(*streams, strict=True))]
    expected = decoder(state, joined, (33, 33))
    torch.testing.assert_close(net([one, other]).branches[0], expected)


@torch.no_grad()
def test_ssma_of_two_experts_has_their_features_to_the_bit() -> None:
    experts = [randomized(AdapNetPlusPlus(classes, (count,))) for classes, count in ((5, 3), (6, 1))]
    net = SSMA(7, (3, 1)).eval()
    entries = net.from_experts([expert.state_dict() for expert in experts])
    missing, unexpected = net.load_state_dict(entries, strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"alpha", "joins", "decoder"}
    parts = [x[:, :count] for x, count in zip(images((33, 33), torch.float32), (3, 1), strict=True)]
    found = net.encoder(parts)
    for expert, x, features in zip(experts, parts, found, strict=True):
        for own, theirs in zip(features, expert.encoder(x), strict=True):
            assert torch.equal(own, theirs)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("encoder", [R50, R101])
@pytest.mark.parametrize(("dilations", "by_place"), [("paper", PAPER), ("released", RELEASED)])
def test_dilations_of_multi_scale_units(encoder: str, dilations: str, by_place: dict) -> None:
    with torch.device("meta"):
        net = make_system("adapnetpp", 5, (3,), encoder=encoder, ssma_dilations=dilations)
    found = {
        (block, number): unit.conv2.rates
        for block in (1, 2, 3, 4)
        for number, unit in enumerate(getattr(net.encoder, f"layer{block}"), 1)
        if isinstance(unit.conv2, MultiScaleConv)
    }
    more = DEPTHS[encoder][2] - DEPTHS[R50][2]  # in block 3 the last four units, whatever their number
    assert found == {(b, number + more * (b == 3)): rates for (b, number), rates in by_place.items()}


def test_options_reach_both_experts() -> None:
    with torch.device("meta"):
        assert AdapNetPlusPlus(5, (3,)).encoder.layer4[2].dropout.p == 0.7
        net = make_system("ssma", 5, (3, 3), dropout=0.25, ssma_dilations="released", aspp_rates=(6, 12, 18))
    for expert in net.encoder.experts:
        assert [branch[2].conv.dilation for branch in expert.pyramid.atrous] == [(6, 6), (12, 12), (18, 18)]
        assert expert.layer4[2].conv2.rates == (2, 2)
        active = [name for name, module in expert.named_modules() if getattr(module, "p", 0) > 0]
        assert active == ["layer4.2.dropout"]
        assert expert.layer4[2].dropout.p == 0.25


def test_dropout_acts_in_training_alone() -> None:
    unit = Unit(128, 32, rates=(2, 16), dropout=0.7).double()
    x = torch.randn(2, 128, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        kept = (unit.train()(x) != x).float().mean()
        assert torch.all(unit.eval()(x) != x)
    assert 0.27 < kept < 0.33


@pytest.mark.parametrize(("name", "channels"), [("adapnetpp", (1,)), ("ssma", (3, 1))])
def test_large_images_and_side_outputs(name: str, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        net = make_system(name, 5, channels)
        x = torch.empty(2 * len(channels), 3, 480, 640)
        out = net.train()(x)
        assert type(out) is AuxiliaryOutput
        assert out.branches.shape == (1, 2, 5, 480, 640)
        assert [side.shape for side in out.auxiliary] == [(1, 2, 5, 120, 160), (1, 2, 5, 60, 80)]
        assert net.num_sides == 2
        out = net.eval()(x)
        assert type(out) is SegmentationOutput
        assert out.ensemble.shape == (2, 5, 480, 640)


@pytest.mark.parametrize(("size", "sides"), [((33, 33), ((9, 9), (5, 5))), ((37, 53), ((10, 14), (5, 7)))])
def test_gradients_reach_every_parameter(size: tuple[int, int], sides: tuple[tuple[int, int], ...]) -> None:
    net = SSMA(5, (3, 1)).train()
    out = net(torch.randn(4, 3, *size))
    assert out.branches.shape == (1, 2, 5, *size)
    assert [side.shape for side in out.auxiliary] == [(1, 2, 5, *each) for each in sides]
    loss = sum((logits * torch.randn_like(logits)).sum() for logits in (out.branches, *out.auxiliary))
    loss.backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert without == ["alpha"]  # of one branch


def test_side_outputs_read_what_is_enlarged() -> None:
    decoder = AdapNetDecoder(3)
    features = [torch.randn(2, *shape) for shape in ((256, 3, 4), (24, 5, 7), (24, 10, 14))]
    seen: list[Tensor] = []
    for stage in decoder.stages:
        stage.register_forward_hook(lambda stage, x, y: seen.append(y[0]))
    with torch.no_grad():
        found = decoder.train()(features, (37, 53)).sides
        expected = [head(y) for head, y in zip(decoder.classifier.sides, reversed(seen), strict=True)]
    assert [y.shape[-2:] for y in seen] == [(5, 7), (10, 14)]
    for side, each in zip(found, expected, strict=True):
        assert torch.equal(side, each)


def donor_state() -> dict[str, Tensor]:
    """A ResNet-50's in torchvision's layout."""
    donor = ExchangeResNet("resnet50", 1)
    randomise_norms(donor)
    state = {key: v[0] if v.dim() == 2 else v for key, v in donor.state_dict().items()}
    return {**state, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def test_weights_of_a_resnet(tmp_path: Path) -> None:
    state, net = donor_state(), SSMA(5, (3, 1))
    torch.save(state, tmp_path / "resnet50.pth")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    report = load_imagenet(net.encoder, tmp_path / "resnet50.pth", scale=(1.0, 2.0, 3.0))
    assert report.unexpected == []
    stem = state["conv1.weight"] * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    one, other = net.encoder.experts
    torch.testing.assert_close(one.conv1.weight.detach(), stem)
    torch.testing.assert_close(other.conv1.weight.detach(), stem.mean(1, keepdim=True))
    y = torch.randn(1, 512, 3, 5)
    for expert in (one, other):
        own = expert.state_dict()
        for name in ("bn1", "layer1.0.bn2", "layer4.2.bn1"):
            for table in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(own[f"{name}.{table}"].flatten(), state[f"{name}.{table}"])
        for name in ("layer1.0.conv1", "layer3.0.conv2", "layer3.3.conv2", "layer4.2.conv2"):
            assert torch.equal(own[f"{name}.weight"], state[f"{name}.weight"])
        # The norm that followed there is a shift now, which the next norm takes away.
        for name, follows in (("4.2.conv3", "4.2.bn3"), ("3.0.downsample", "3.0.downsample.1")):
            theirs = F.conv2d(y, state[f"layer{name.replace('sample', 'sample.0')}.weight"])
            shift = norm(state, f"layer{follows}", theirs, relu=False) - conv(own, f"layer{name}", y)
            torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=1e-4, atol=1e-4)
    units = [f"layer{b}.{n}" for b, depth in enumerate(DEPTHS[R50], 1) for n in range(depth)]
    norms = ["bn0", "norm", *(f"{name}.norm" for name in units[1:])]
    tables = ("weight", "bias", "running_mean", "running_var")
    made = {f"{name}.{table}" for name in norms for table in tables} | {"layer1.0.downsample.weight"}
    kept = {name for name in report.missing if not (".pyramid." in name or ".skips." in name)}
    assert kept == {f"experts.{m}.{name}" for m in (0, 1) for name in made}
    assert all(torch.equal(net.state_dict()[f"encoder.{n}"], before[f"encoder.{n}"]) for n in report.missing)


def test_refused_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = AdapNetPlusPlus(5, (3,))
    small = ExchangeResNet("resnet18", 1)
    path = tmp_path / "resnet18.pth"
    torch.save({key: v[0] if v.dim() == 2 else v for key, v in small.state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"wrong shapes: layer1\.0\.conv1\.weight"):
        load_imagenet(net.encoder, path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no key of a torchvision ResNet of bottleneck blocks in it"):
        load_imagenet(net.encoder, path)
    with pytest.raises(ValueError, match="no public checkpoint's layout is known"):
        net.from_released({})


@pytest.mark.parametrize(
    ("name", "channels", "options", "message"),
    [
        ("adapnetpp", (3, 3), {}, "network=adapnetpp takes 1 modalities, got 2"),
        ("ssma", (3,), {}, "network=ssma takes 2 modalities, got 1"),
        ("ssma", (3, 2), {}, "channels of a modality must be 1 or 3, got 2"),
        ("ssma", (3, 3), {"encoder": "resnet50"}, "encoder must be .* did you mean 'adapnet_resnet50'"),
        ("ssma", (3, 3), {"dropout": 1.5}, "dropout probability has to be between 0 and 1"),
        ("adapnetpp", (3,), {"ssma_dilations": "papers"}, "ssma_dilations must be .* did you mean 'paper'"),
        ("adapnetpp", (3,), {"aspp_rates": (3, 0)}, r"aspp_rates must be .* got \(3, 0\)"),
        ("adapnetpp", (3,), {"aspp_rates": ()}, r"aspp_rates must be .* got \(\)"),
    ],
)
def test_refused_settings(name: str, channels: tuple[int, ...], options: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make_system(name, 5, channels, **options)


def test_refused_experts() -> None:
    with torch.device("meta"):
        net, alone = SSMA(5, (3, 1)), AdapNetPlusPlus(5, (3,))
        color, gray, deep = (
            AdapNetPlusPlus(5, (count,), encoder).state_dict()
            for count, encoder in ((3, R50), (1, R50), (3, R101))
        )
    assert len(net.from_experts([color, gray])) == 2 * sum(name.startswith("encoder.") for name in color)
    with pytest.raises(ValueError, match="experts must be 2 state dicts, got 1"):
        net.from_experts([color])
    with pytest.raises(ValueError, match=r"experts\[0\] must be .* of another shape: bn0\.weight \(1,\)"):
        net.from_experts([gray, color])
    with pytest.raises(ValueError, match=r"experts\[0\] must be .* left over: layer3\.6\.norm"):
        net.from_experts([deep, gray])
    with pytest.raises(ValueError, match="network=adapnetpp does not start from experts"):
        alone.from_experts([color])
