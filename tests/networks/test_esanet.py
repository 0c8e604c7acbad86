"""ESANet: sizes, formulas of its parts, its fusion and its encoder's exchange, weights, recipes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import examples.own_encoder  # noqa: F401 - registers plain_net
import models
import models.recipes
from cen_ext import ExchangeBatchNorm2d, exchanging_layers
from models.fusion import Exchange, NoFusion, SEAdd
from models.networks.counting import count_fusion_parameters, count_multiply_adds, count_parameters
from models.networks.decoders.blocks import ConvNorm
from models.networks.decoders.esanet import DecoderModule, ESANetDecoder, LearnedUpsampling
from models.networks.encoders import NBt1DResNet, load_imagenet, make_encoder
from models.networks.encoders.nbt1d import NonBottleneck1D
from models.networks.fusion import FusionStage
from models.networks.fusion.squeeze import SEAddJoin, SqueezeExcitation
from models.segmentation.build import build_network
from models.segmentation.task import check_batch_size
from models.training import config, registry
from models.training.errors import UsageError
from tests.helpers.networks import randomise_norms

FEW = {"width": 128, "decreasing": False, "blocks": 1}  # of the costs in later papers' tables


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(fusion: str | None = None, num_modalities: int = 2, **options: object) -> models.ESANet:
    net = models.esanet("resnet18_nbt1d", 5, num_modalities, fusion=fusion, width=16, blocks=1, **options)
    randomise_norms(net)
    return net.double()


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"fusion": "se_add"}, 46_962_112),
        ({"fusion": "se_add", "aux": False}, 46_926_152),
        ({"fusion": "se_add", **FEW}, 31_219_392),  # 31.2 M in later papers' tables
        ({}, 32_118_144),
        ({"num_modalities": 1}, 32_084_736),
        ({"encoder": "resnet18_nbt1d"}, 25_362_048),
    ],
)
def test_parameter_counts(options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(models.esanet(**options)) == count


def test_costs_of_the_tables() -> None:
    """31.2 million parameters and 34.9 billion multiply-adds, of depth with a single channel."""
    with torch.device("meta"):
        net = models.esanet(fusion="se_add", **FEW)
        alone = make_encoder("resnet34_nbt1d", 1, NoFusion(), in_channels=1)
    channels = 2 * 64 * 49
    assert (count_parameters(net) - channels) / 1e6 == pytest.approx(31.2, abs=0.05)
    assert (count_multiply_adds(net, (2, 3, 480, 640)) - channels * 240 * 320) / 1e9 == pytest.approx(
        34.9, abs=0.05
    )
    assert count_parameters(alone) == 14_780_864
    gates = sum(2 * (c * c // 8 + c // 16 + c) for c in (64, 64, 128, 256, 512))
    assert count_fusion_parameters(net) == gates


def test_shapes() -> None:
    with torch.device("meta"):
        for fusion, branches in (("exchange", 2), ("se_add", 1)):
            net = models.esanet("resnet18_nbt1d", 5, 2, fusion=fusion, width=8, blocks=1)
            for size, logits in (((480, 640), (480, 640)), ((33, 49), (36, 52)), ((75, 101), (76, 104))):
                out = net.train()(torch.empty(4, 3, *size))
                assert out.branches.shape == (branches, 2, 5, *logits)
                halved = [[-(-length // step) for length in size] for step in (32, 16, 8)]
                assert [side.shape for side in out.auxiliary] == [(branches, 2, 5, *each) for each in halved]
                assert net.num_sides == len(out.auxiliary)
                assert net.eval()(torch.empty(2, 3, *size)).auxiliary == ()
        assert models.esanet("resnet18_nbt1d", aux=False).num_sides == 0


def taps(x: Tensor, conv: nn.Conv2d, dim: int) -> Tensor:
    """A convolution of three taps along one axis, shift by shift."""
    stride, gap, length = conv.stride[dim - 2], conv.dilation[dim - 2], x.shape[dim]
    pad = x.new_zeros(*x.shape[:dim], gap, *x.shape[dim + 1 :])
    x = torch.cat([pad, x, pad], dim)
    places = torch.arange(0, length, stride)
    parts = [
        torch.einsum("oc,nchw->nohw", weight, x.index_select(dim, places + tap * gap))
        for tap, weight in enumerate(conv.weight.flatten(2).unbind(2))
    ]
    return torch.stack(parts).sum(0) + conv.bias[:, None, None]


def normalized(x: Tensor, norm: ExchangeBatchNorm2d, eps: float = 1e-5) -> Tensor:
    """By the running statistics, modality by modality."""
    parts = []
    for m, rows in enumerate(x.chunk(norm.num_modalities)):
        tables = (norm.weight, norm.running_mean, norm.running_var, norm.bias)
        weight, mean, var, bias = (table[m, :, None, None] for table in tables)
        parts.append(weight * (rows - mean) / (var + eps).sqrt() + bias)
    return torch.cat(parts)


def block_by_hand(block: NonBottleneck1D, x: Tensor) -> Tensor:
    skip = x
    if block.downsample is not None:
        conv, norm = block.downsample
        skip = normalized(torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], x[..., ::2, ::2]), norm)
    y = taps(taps(x, block.conv3x1_1, 2).relu(), block.conv1x3_1, 3)
    y = normalized(y, block.bn1, 1e-3).relu()
    y = taps(taps(y, block.conv3x1_2, 2).relu(), block.conv1x3_2, 3)
    return (normalized(y, block.bn2, 1e-3) + skip).relu()


@pytest.mark.parametrize(("out_channels", "stride", "dilations"), [(4, 1, (1, 1)), (6, 2, (1, 2))])
def test_block(out_channels: int, stride: int, dilations: tuple[int, int]) -> None:
    def norm_layer(channels: int, **options: object) -> nn.Module:
        return NoFusion().norm(channels, 2, **{"activation": "relu", **options})

    block = NonBottleneck1D(4, out_channels, stride, dilations, norm_layer).double().eval()
    randomise_norms(block)
    x = torch.randn(4, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), block_by_hand(block, x))
    assert (block.downsample is None) == (stride == 1)


def excited(gate: SqueezeExcitation, x: Tensor) -> Tensor:
    squeeze, excite = gate.squeeze, gate.excite
    mean = x.flatten(2).mean(2)
    hidden = (mean @ squeeze.weight[:, :, 0, 0].T + squeeze.bias).clamp(min=0)
    logits = hidden @ excite.weight[:, :, 0, 0].T + excite.bias
    return x / (1 + torch.exp(-logits))[:, :, None, None]


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_fusion_block(num_modalities: int) -> None:
    join = SEAddJoin(32, num_modalities).double()
    streams = torch.randn(num_modalities, 2, 32, 5, 4, dtype=torch.float64)
    expected = sum(excited(gate, x) for gate, x in zip(join.gates, streams, strict=True))
    torch.testing.assert_close(join(streams), expected)
    assert sum(p.numel() for p in join.parameters()) == num_modalities * (32 * 32 // 8 + 2 + 32)


def test_fusion_of_the_encoder() -> None:
    """Before the pooling and after each stage; depth goes on as it was, and the decoder gets the sum."""
    encoder = make_encoder("resnet18_nbt1d", 2, SEAdd()).double().eval()
    randomise_norms(encoder)
    x = torch.randn(4, 3, 65, 49, dtype=torch.float64)

    def fused(stage: int, y: Tensor) -> tuple[Tensor, Tensor]:
        colors, depth = y.chunk(2)
        gates = encoder.fusion_stages[str(stage)].join.gates
        return excited(gates[0], colors) + excited(gates[1], depth), depth

    y = F.max_pool2d(torch.cat(fused(0, encoder.bn1(encoder.conv1(x)))), 3, 2, 1)
    features = encoder(x)
    for number, (stage, feature) in enumerate(zip(encoder.stages(), features, strict=True), 1):
        colors, depth = fused(number, stage(y))
        torch.testing.assert_close(feature, colors)
        y = torch.cat([colors, depth])
    assert encoder.conv1.weight.shape == (128, 3, 7, 7)  # a set of filters for each


def enlarged(x: Tensor, layer: LearnedUpsampling, size: tuple[int, int]) -> Tensor:
    """Pixel i of the result reads pixel i // 2 and its neighbors in the doubled x."""
    rows, columns = (torch.arange(length) // 2 for length in size)
    doubled = F.pad(x[..., rows, :][..., columns], (1, 1, 1, 1))
    total = layer.conv.bias[:, None, None]
    for down in range(3):
        for across in range(3):
            shifted = doubled[..., down : down + size[0], across : across + size[1]]
            total = total + layer.conv.weight[:, 0, down, across, None, None] * shifted
    return total


def test_learned_upsampling() -> None:
    layer = LearnedUpsampling(3).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(x)[..., 1:-1, 1:-1], bilinear[..., 1:-1, 1:-1])
    nn.init.normal_(layer.conv.weight)
    nn.init.normal_(layer.conv.bias)
    torch.testing.assert_close(layer(x), enlarged(x, layer, (10, 8)))
    for size in ((9, 7), (10, 7)):
        torch.testing.assert_close(layer(x, size), enlarged(x, layer, size))


def conv_norm(layer: ConvNorm, x: Tensor) -> Tensor:
    y = F.conv2d(x, layer.conv.weight, padding=layer.conv.padding)
    return normalized(y, layer.norm).relu()


def stretched(x: Tensor, size: torch.Size) -> Tensor:
    rows, columns = (
        torch.arange(length) * own // length for length, own in zip(size, x.shape[-2:], strict=True)
    )
    return x[..., rows, :][..., columns]


def test_decoder_is_the_formula() -> None:
    """Context, three times blocks, upsampling and skip, then a classifier and two upsamplings."""
    net = models.esanet("plain_net", 3, 2, fusion=NoFusion(), width=8, blocks=2)
    randomise_norms(net)
    decoder: ESANetDecoder = net.double().decoder
    for module in decoder.modules():
        if isinstance(module, LearnedUpsampling):
            nn.init.normal_(module.conv.weight)
    decoder.eval()
    sizes = ((33, 25), (17, 13), (9, 7), (5, 4))
    channels = net.encoder.channels
    features = [torch.randn(4, c, *size).double() for c, size in zip(channels, sizes, strict=True)]
    last = features[3]
    whole = last.mean((2, 3), keepdim=True)
    # Five of 5 rows, and five of 4 columns, which share some.
    regions = torch.stack([last[..., 4 * i // 5 : -(-4 * (i + 1) // 5)].mean(3) for i in range(5)], 3)
    parts = [
        stretched(conv_norm(level, mean), last.shape[-2:])
        for level, mean in zip(decoder.context.levels, (whole, regions), strict=True)
    ]
    x = conv_norm(decoder.context.merge, torch.cat([last, *parts], 1))
    sides = []
    for level, side, feature in zip(decoder.levels, decoder.sides, features[2::-1], strict=True):
        assert isinstance(level, DecoderModule)
        x = conv_norm(level.conv, x)
        for block in level.blocks:
            x = block_by_hand(block, x)
        sides.append(F.conv2d(x, side.weight, side.bias))
        x = enlarged(x, level.upsample, tuple(feature.shape[-2:])) + conv_norm(level.skip, feature)
    x = F.conv2d(x, decoder.classifier.weight, decoder.classifier.bias, padding=1)
    for layer in decoder.upsample:
        x = enlarged(x, layer, (2 * x.shape[2], 2 * x.shape[3]))
    with torch.no_grad():
        torch.testing.assert_close(decoder(features), x.detach())
        decoder.training = True  # its norms stay in eval mode
        logits, found = decoder.with_sides(features)
    torch.testing.assert_close(logits, x.detach())
    for one, other in zip(found, sides, strict=True):
        torch.testing.assert_close(one, other.detach())
    assert not exchanging_layers(models.esanet("plain_net", 3, 2, width=8).decoder)


def test_exchange_follows_every_pair_of_convolutions() -> None:
    with torch.device("meta"):
        encoder = make_encoder("resnet34_nbt1d", 2, Exchange(threshold=0.03))
    pairs = {key for key, _ in encoder.named_modules() if "conv1x3" in key}
    named = {key.replace("conv1x3_", "bn") for key in pairs}
    assert len(named) == 2 * (3 + 4 + 6 + 3)
    assert set(exchanging_layers(encoder)) == named


def test_replaced_channels_carry_the_other_modality() -> None:
    encoder = NBt1DResNet("resnet18_nbt1d", 2, region="all").double().eval()
    randomise_norms(encoder, small_scales=0)
    block = encoder.layer2[0]
    for norm in (block.bn1, block.bn2):
        norm.weight.data[0].zero_()
    seen: list[Tensor] = []
    block.bn1.register_forward_hook(lambda module, args, output: seen.append(output))
    block.bn2.register_forward_hook(lambda module, args, output: seen.append(output - 0))
    skips: list[Tensor] = []
    block.downsample.register_forward_hook(lambda module, args, output: skips.append(output))
    with torch.no_grad():
        encoder(torch.randn(2, 3, 33, 33, dtype=torch.float64))
        inner = normalized(
            taps(taps(seen[0], block.conv3x1_2, 2).relu(), block.conv1x3_2, 3), block.bn2, 1e-3
        )
    assert torch.equal(*seen[0].chunk(2))
    other = inner.chunk(2)[1]  # before skips and relu, both have it
    torch.testing.assert_close(seen[1], (torch.cat([other, other]) + skips[0]).relu())


def test_dilation_computes_the_strided_features_in_between_as_well() -> None:
    strided = make_encoder("resnet18_nbt1d", 2, Exchange()).double().eval()
    randomise_norms(strided)
    x = torch.randn(2, 3, 65, 49, dtype=torch.float64)
    dilated = make_encoder("resnet18_nbt1d", 2, Exchange(), output_stride=8).double().eval()
    dilated.load_state_dict(strided.state_dict())
    with torch.no_grad():
        for feature, dense, step in zip(strided(x), dilated(x), (1, 1, 2, 4), strict=True):
            torch.testing.assert_close(dense[..., ::step, ::step], feature)


@pytest.mark.parametrize("fusion", ["exchange", "se_add"])
def test_every_parameter_trains(fusion: str) -> None:
    net = small(fusion, frozen_statistics=False).train()
    for module in net.modules():
        if isinstance(module, SqueezeExcitation):
            nn.init.ones_(module.squeeze.bias)  # so that some hidden unit is above 0
    out = net(torch.randn(4, 3, 49, 65, dtype=torch.float64))
    assert (out.branches.requires_grad, len(out.auxiliary)) == (True, 3)
    (sum(each.square().sum() for each in (out.branches, *out.auxiliary)) + out.ensemble.sum()).backward()
    unused = [key for key, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert unused == ([] if fusion == "exchange" else ["alpha"])  # the one branch's weight is 1


def test_decoder_norms_are_private() -> None:
    x = torch.randn(4, 3, 49, 65, dtype=torch.float64)
    changed = torch.cat([x[:2], x[2:] + 1])
    net = small("none", frozen_statistics=False).train()
    with torch.no_grad():
        outputs = [(out.branches, *out.auxiliary) for out in (net(x), net(changed))]
        for one, other in zip(*outputs, strict=True):
            assert torch.equal(one[0], other[0])
            assert not torch.equal(one[1], other[1])


def test_only_fusions_that_say_so_are_asked_for_the_stem() -> None:
    asked: list[int] = []

    class Asked(NoFusion):
        def after_stage(self, stage: int, channels: int, num_modalities: int) -> FusionStage | None:
            asked.append(stage)
            return None

    with torch.device("meta"):
        make_encoder("resnet18", 2, Asked())
    assert asked == [1, 2, 3, 4]


def one_encoder(in_channels: int) -> dict[str, Tensor]:
    """The entries of one encoder in the names and shapes of ESANet's."""
    net = NBt1DResNet("resnet18_nbt1d", 1, NoFusion(), in_channels=in_channels)
    randomise_norms(net)
    return {key: value[0] if "running" in key else value for key, value in net.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_weights_of_imagenet_start_every_modality_alike(tmp_path: Path, prefix: str) -> None:
    state = one_encoder(3)
    assert state["layer2.0.conv3x1_1.weight"].shape == (128, 64, 3, 1)
    file = {f"{prefix}{key}": value for key, value in state.items()}
    torch.save({"state_dict": {**file, "fc.weight": torch.zeros(1000, 512)}}, tmp_path / "r18.pth")
    encoder = make_encoder("resnet18_nbt1d", 2, Exchange())
    assert load_imagenet(encoder, tmp_path / "r18.pth") == ([], [])
    own = encoder.state_dict()
    assert torch.equal(own["layer4.1.conv1x3_2.weight"], state["layer4.1.conv1x3_2.weight"])
    assert torch.equal(encoder.layer3[0].bn1.weight, state["layer3.0.bn1.weight"].expand(2, -1))


def whole_esanet() -> dict[str, Tensor]:
    """The encoders and fusions of a trained ESANet, and something of its decoder."""
    state = {f"encoder_rgb.{key}": value for key, value in one_encoder(3).items()}
    state |= {f"encoder_depth.{key}": value for key, value in one_encoder(1).items()}
    for stage, channels in enumerate((64, 64, 128, 256, 512)):
        for kind in ("rgb", "depth"):
            hidden = channels // 16
            for place, layer in ((0, nn.Conv2d(channels, hidden, 1)), (2, nn.Conv2d(hidden, channels, 1))):
                for key, value in layer.state_dict().items():
                    state[f"se_layer{stage}.se_{kind}.fc.{place}.{key}"] = value
    return {**state, "decoder.conv_out.weight": torch.zeros(40, 128, 3, 3)}


@pytest.mark.parametrize("fusion", [SEAdd(), Exchange()])
def test_weights_of_a_whole_esanet(tmp_path: Path, fusion: models.fusion.Fusion) -> None:
    state = whole_esanet()
    torch.save(state, tmp_path / "esanet.pth")
    encoder = make_encoder("resnet18_nbt1d", 2, fusion)
    assert load_imagenet(encoder, tmp_path / "esanet.pth") == ([], [])
    colors, depth = (state[f"encoder_{kind}.layer1.0.conv1x3_2.weight"] for kind in ("rgb", "depth"))
    norms = [state[f"encoder_{kind}.layer3.0.bn2.running_var"] for kind in ("rgb", "depth")]
    assert torch.equal(encoder.layer3[0].bn2.running_var, torch.stack(norms))
    if isinstance(fusion, Exchange):
        assert torch.equal(encoder.layer1[0].conv1x3_2.weight, colors)
        return
    assert torch.equal(encoder.layer1[0].conv1x3_2.weight, torch.cat([colors, depth]))
    gate = encoder.fusion_stages["3"].join.gates[1]
    assert torch.equal(gate.excite.bias, state["se_layer3.se_depth.fc.2.bias"])
    x = torch.randn(1, 1, 33, 33)
    seen = encoder.conv1(x.repeat(2, 3, 1, 1)).chunk(2)[1]
    expected = F.conv2d(x, state["encoder_depth.conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_modalities must be 2 for weights of a whole ESANet, got 3"):
        load_imagenet(make_encoder("resnet18_nbt1d", 3, NoFusion()), tmp_path / "esanet.pth")


def test_recipes_build_both_forms() -> None:
    with torch.device("meta"):
        published = build_network(registry.find("nyudv2_esanet_resnet34_nbt1d"))
        exchanging = build_network(registry.find("nyudv2_cen_esanet_resnet34_nbt1d"))
    assert (count_parameters(published), count_parameters(exchanging)) == (46_962_112, 32_118_144)
    assert isinstance(published.fusion, SEAdd)
    assert isinstance(exchanging.fusion, Exchange)
    recipe = registry.find("nyudv2_esanet_resnet34_nbt1d")
    assert recipe.optim.warmup_steps == 50 * (795 // 8)
    assert config.from_plain(recipe, config.to_plain(recipe)) == recipe
    # The stem, which is se_add's alone, is not carried over to another fusion.
    assert config.override(recipe, ["fusion=concat"]).fusion.stages == (1, 2, 3, 4)
    one = config.override(recipe, ["data.batch_size=1"])
    with pytest.raises(UsageError, match=r"must be at least 2 with model\.network=esanet"):
        check_batch_size(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"encoder": "resnet34_nbtd"}, "did you mean 'resnet34_nbt1d'"),
        ({"fusion": "se_add", "num_modalities": 1}, "fusion=se_add needs at least two modalities"),
        ({"fusion": "se_add", "encoder": "plain_net"}, "fusion=se_add acts after the stem, where this enc"),
        ({"fusion": SEAdd(fused_on="none")}, r"fused_on must be first .*stages \(0,\) would have no effect"),
        ({"fusion": "asymfusion"}, "fusion=asymfusion acts around the spatial convolution of bottleneck"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.esanet(**options)


def test_stages_of_the_fusion() -> None:
    with pytest.raises(ValueError, match="stages must be ascending numbers from 0 on, got"):
        SEAdd(stages=(-1, 2))
    with pytest.raises(ValueError, match="fusion must act after the levels of a U-Net, from 1 on"):
        models.unet(fusion=SEAdd(setting="shared"))
    with torch.device("meta"):
        models.esanet("plain_net", fusion=SEAdd(stages=(1, 2, 3, 4)), width=8)
        joined = make_encoder("resnet18_nbt1d", 2, SEAdd(stages=(0,)))
        assert [len(feature) for feature in joined(torch.empty(2, 3, 64, 64))] == [1, 1, 1, 1]
        with pytest.raises(ValueError, match="encoder must be one of resnet18_nbt1d, resnet34_nbt1d, got 'r"):
            NBt1DResNet("resnet50_nbt1d")
