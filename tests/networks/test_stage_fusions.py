"""Fusions of Tables 2 and 4: parameter counts, formulas written a second time, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
import models.recipes  # registers the recipe of the contract
from models.fusion import MMF, Align, Average, Concat, ConditionalNorm, Fusion, SelfAttention
from models.networks.counting import count_parameters
from models.networks.fusion.align import AlignStage, mmd
from models.networks.fusion.conditional import ConditionalBatchNorm2d
from models.networks.fusion.stages import ConcatJoin, Join, MMFJoin, ReplaceStream, SelfAttentionJoin
from models.segmentation import build as segmentation
from models.training import config, registry
from models.training.errors import UsageError
from models.translation import build as translation
from tests.helpers.fusion_contract import check_fusion
from tests.helpers.parameter_counts import ALL, refinenet101, unet_blocks


def refinenet(fusion: Fusion, encoder: str = "resnet101") -> nn.Module:
    with torch.device("meta"):
        return models.refinenet(encoder, 40, 2, fusion=fusion)


# The other kinds are rows of Table 2, in tests/cli/test_tables.py.
@pytest.mark.parametrize("stages", [(2,), (3,), (4,), ALL], ids=["early", "middle", "late", "all"])
@pytest.mark.parametrize("setting", ["shared", "separate"])
@pytest.mark.parametrize("kind", [Average, MMF], ids=lambda kind: kind.name)
def test_parameter_counts_beside_table_2(kind: type[Fusion], setting: str, stages: tuple[int, ...]) -> None:
    expected = refinenet101(kind.name, setting, stages)
    assert count_parameters(refinenet(kind(stages=stages, setting=setting))) == expected


def test_parameter_counts_that_are_printed() -> None:
    """To the digits of Table 2, and of AsymFusion's table for RDFNet's block."""
    assert count_parameters(refinenet(Concat(stages=(3,), setting="separate"))) == 147_728_808  # 147.7 M
    assert count_parameters(refinenet(SelfAttention())) == 231_021_016  # 231.0 M
    assert count_parameters(refinenet(Align(setting="separate"))) == 291_898_064  # 291.9 M
    assert count_parameters(refinenet(MMF())) == 366_714_792
    assert count_parameters(refinenet(MMF(), "resnet152")) == 398_002_088


@pytest.mark.parametrize(
    ("encoder", "extra"), [("resnet50", 1_895_648), ("resnet101", 3_577_696), ("resnet152", 4_963_552)]
)
def test_parameter_counts_of_the_conditional_norm(encoder: str, extra: int) -> None:
    plain = count_parameters(refinenet(models.fusion.NoFusion(), encoder))
    assert count_parameters(refinenet(ConditionalNorm(), encoder)) - plain == extra


def test_formulas_give_the_all_layer_column_of_table_4() -> None:
    assert unet_blocks("concat", tuple(range(1, 9))) == 2_793_472
    assert unet_blocks("align", tuple(range(1, 9))) == 13_967_360


@pytest.mark.parametrize(
    ("fusion", "modalities"),
    [
        (Concat(stages=(2, 4)), 3),
        (Concat(stages=(3,), setting="separate"), 2),
        (Average(stages=(2, 3), setting="separate", skips="mean"), 3),
        (SelfAttention(fused_to="all"), 2),
        (SelfAttention(stages=(3, 4), setting="separate", fused_on="none"), 3),
        (MMF(stages=(3, 4)), 2),
        (MMF(stages=(4,), setting="shared"), 3),
        (Align(stages=(2,), setting="separate"), 2),
        (Align(specific_weight=0.1, samples=16), 3),
        (ConditionalNorm(), 3),
        (ConditionalNorm(modulated="every", detach=True, convolutions="private"), 2),
    ],
    ids=str,
)
def test_contract(fusion: Fusion, modalities: int) -> None:
    check_fusion(fusion, modalities)


def test_blocks_without_an_effect_are_refused() -> None:
    """A PSPNet reads the last two features, and RDFNet's streams go on unfused."""
    with pytest.raises(ValueError, match=r"fused_on must be first .* \(1, 2\) would have no effect"):
        models.pspnet("resnet18", 5, 2, fusion="mmf")


# --- blocks against formulas written a second time, in float64 ---


def streams(m: int = 2, n: int = 2, c: int = 32) -> Tensor:
    return torch.randn(m, n, c, 7, 6, dtype=torch.float64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.double()


@pytest.mark.parametrize("m", [2, 3])
def test_concat(m: int) -> None:
    x, block = streams(m), randomized(ConcatJoin(32, m))
    weight = block.conv.weight[:, :, 0, 0]
    expected = sum(torch.einsum("kc,nchw->nkhw", weight[:, i * 32 : (i + 1) * 32], x[i]) for i in range(m))
    close(block(x), expected)


@pytest.mark.parametrize("m", [2, 3])
def test_concat_starts_as_the_mean(m: int) -> None:
    x = streams(m)
    torch.testing.assert_close(ConcatJoin(32, m).double()(x), x.mean(0))


@pytest.mark.parametrize("m", [2, 3])
def test_self_attention(m: int) -> None:
    x, block = streams(m), randomized(SelfAttentionJoin(32, m)).eval()
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.5, 2)
    z = x.transpose(0, 1).flatten(1, 2)
    hidden = F.conv2d(z, block.squeeze.weight, block.squeeze.bias, padding=1).clamp_min(0)
    gate = 1 / (1 + (-F.conv2d(hidden, block.excite.weight, block.excite.bias, padding=1)).exp())
    y = F.conv2d(gate * z, block.conv.weight, padding=1)
    column = (1, -1, 1, 1)
    norm = block.norm
    expected = (y - norm.running_mean.view(column)) / (norm.running_var.view(column) + norm.eps).sqrt()
    close(block(x), expected * norm.weight.view(column) + norm.bias.view(column))


@pytest.mark.parametrize("m", [2, 3])
def test_mmf(m: int) -> None:
    x, block = streams(m), randomized(MMFJoin(32, m))
    total = 0
    for i in range(m):
        reduce, *units, widen = block.streams[i]
        r = F.conv2d(x[i], reduce.weight)
        for unit in units:
            first = F.conv2d(r.clamp_min(0), unit.conv1.weight, unit.conv1.bias, padding=1)
            r = r + F.conv2d(first.clamp_min(0), unit.conv2.weight, padding=1)
        total = total + F.conv2d(r, widen.weight, padding=1)
    f = total.clamp_min(0)
    pooled = F.pad(f, (2, 2, 2, 2), value=-torch.inf).unfold(2, 5, 1).unfold(3, 5, 1).amax((-1, -2))
    close(block(x), f + F.conv2d(pooled, block.pooled.weight, padding=1))


@pytest.mark.parametrize("m", [2, 3])
def test_align(m: int) -> None:
    x, stage = streams(m)[..., :3, :2], randomized(AlignStage(32, m, 0.7, 0.2, 10_000)).train()

    def project(conv: nn.Conv2d, value: Tensor) -> Tensor:
        return torch.einsum("kc,nchw->nkhw", conv.weight[:, :, 0, 0], value).clamp_min(0)

    common = [project(stage.common[i], x[i]) for i in range(m)]
    specific = [project(stage.specific[i], x[i]) for i in range(m)]
    expected = []
    for i in range(m):
        others = torch.stack([common[j] for j in range(m) if j != i]).mean(0)
        expected.append(project(stage.fuse[i], torch.cat([specific[i], common[i], others], 1)))
    onward, feature = stage(x.flatten(0, 1))
    close(onward, torch.cat(expected))
    assert feature is onward
    pairs = [(i, j) for i in range(m) for j in range(i)]

    def over_pairs(features: list[Tensor]) -> Tensor:
        pixels = [f.permute(0, 2, 3, 1).reshape(-1, 32) for f in features]
        return sum(slow_mmd(pixels[i], pixels[j]) for i, j in pairs) / len(pairs)

    close(stage.loss, 0.7 * over_pairs(common) - 0.2 * over_pairs(specific))
    stage.eval()(x.flatten(0, 1))
    assert stage.loss is None


def slow_mmd(x: Tensor, y: Tensor) -> Tensor:
    """From the definition, a pair and a kernel at a time."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        square = (a - b).square().sum() / a.numel()
        return sum((-square / (2 * 4.0 ** (u - 6))).exp() for u in range(1, 12)) / 11

    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(pairs)


class TestMMD:
    def test_is_the_definition(self) -> None:
        x, y = torch.randn(2, 9, 5, dtype=torch.float64)
        close(mmd(x, y + 0.5), slow_mmd(x, y + 0.5))

    def test_one_sample_gives_the_biased_estimate(self) -> None:
        x, y = torch.randn(2, 1, 5, dtype=torch.float64)
        square = (x - y).square().mean()
        close(mmd(x, y), 2 - 2 * sum((-square / (2 * 4.0 ** (u - 6))).exp() for u in range(1, 12)) / 11)

    def test_is_zero_for_equal_sets_and_symmetric(self) -> None:
        x, y = torch.randn(2, 64, 16, dtype=torch.float64)
        assert mmd(x, x).abs() < 1e-15
        close(mmd(x, y), mmd(y, x))

    @pytest.mark.parametrize("shift", [0.2, 1.0, 5.0])
    def test_is_positive_for_shifted_sets(self, shift: float) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(2, 512, 16)
        assert mmd(x, y + shift) > 4 * mmd(x, y).abs()

    def test_gradient(self) -> None:
        x, y = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(mmd, (x, y))

    def test_float32_is_near_float64_far_from_the_origin(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(2, 256, 32, dtype=torch.float64)
        expected = mmd(x + 100, y + 100.5)
        torch.testing.assert_close(
            mmd((x + 100).float(), (y + 100.5).float()).double(), expected, rtol=1e-3, atol=1e-5
        )

    def test_autocast_does_not_reach_it(self) -> None:
        x, y = torch.randn(2, 32, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mmd(x, y), mmd(x.clone(), y.clone()))
            assert mmd(x.bfloat16(), y.bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((0, 2), (0, 2)), ((3,), (3,))])
    def test_other_shapes_are_refused(self, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        with pytest.raises(ValueError, match="n of at least 1"):
            mmd(*map(torch.zeros, shapes))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_conditional_norm(training: bool, with_residual: bool, detach: bool) -> None:
    m, n, c = 3, 2, 6
    norm = randomized(ConditionalBatchNorm2d(c, m, detach=detach, activation="relu")).train(training)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = streams(m, n, c).flatten(0, 1).requires_grad_()
    residual = torch.randn_like(x) if with_residual else torch.zeros_like(x)
    found = norm(x, residual if with_residual else None)
    y = []
    for i, part in enumerate(x.chunk(m)):
        xhat = F.batch_norm(part, mean[i].clone(), var[i].clone(), training=training, eps=norm.eps)
        scale, shift = norm.weight[i].expand(n, c), norm.bias[i].expand(n, c)
        if i:
            parts = norm.modulations[i - 1]
            summary = y[0].mean((2, 3))
            h = (summary.detach() if detach else summary) @ parts.hidden.weight.T + parts.hidden.bias
            h = h.clamp_min(0)
            scale = scale + h @ parts.scale.weight.T + parts.scale.bias
            shift = shift + h @ parts.shift.weight.T + parts.shift.bias
        u = xhat * scale[:, :, None, None] + shift[:, :, None, None] + residual.chunk(m)[i]
        y.append(u.clamp_min(0))
    expected = torch.cat(y)
    close(found, expected)
    dy = torch.randn_like(expected)
    (ours,), (theirs,) = (torch.autograd.grad(value, x, dy, retain_graph=True) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_conditional_norm_keeps_the_slope_that_a_converted_network_gives() -> None:
    x = streams(2, 2, 6).flatten(0, 1)
    norm = ConditionalBatchNorm2d(6, 2, activation="leaky_relu").double()
    plain = ConditionalBatchNorm2d(6, 2).double()
    norm.negative_slope = 0.3
    close(norm(x), F.leaky_relu(plain(x), 0.3))


def test_conditional_norm_starts_as_private_norms() -> None:
    x = streams(2, 2, 6).flatten(0, 1)
    conditional, plain = (
        ConditionalBatchNorm2d(6, 2).double(),
        models.networks.fusion.NoFusion().norm(6, 2).double(),
    )
    close(conditional(x), plain(x))


# --- where the joined feature goes ---


class Half(Join):
    """A join that is easily told apart."""

    def forward(self, streams: Tensor) -> Tensor:
        return streams.sum(0) / 2


def test_the_joined_feature_replaces_the_first_stream_or_all() -> None:
    x = streams(3)
    fused, stacked = x.sum(0) / 2, x.flatten(0, 1)
    first, _ = ReplaceStream(Half(), 3, "first", to_decoder=False)(stacked)
    assert torch.equal(first, torch.cat([fused, *x[1:]]))
    everywhere, feature = ReplaceStream(Half(), 3, "all", to_decoder=False)(stacked)
    assert torch.equal(everywhere, torch.cat([fused] * 3))
    assert feature is everywhere
    onward, feature = ReplaceStream(Half(), 3, "none", to_decoder=True)(stacked)
    assert torch.equal(onward, stacked)
    assert torch.equal(feature, fused)


def test_separate_encoders_have_no_weights_in_common() -> None:
    """The second modality's image moves its own stream alone, up to the stage that joins."""
    torch.manual_seed(0)
    net = models.refinenet("resnet18", 5, 2, fusion=Concat(stages=(3,), setting="separate"), width=8).eval()
    assert net.num_branches == 1
    x = torch.randn(2, 1, 3, 33, 49)
    before = net.encoder(list(x))
    after = net.encoder([x[0], x[1] + 1])
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, False]


# --- what is refused ---


@pytest.mark.parametrize("name", ["concat", "average", "self_attention", "align", "mmf", "conditional_norm"])
def test_one_modality_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"fusion={name} needs at least two modalities"):
        models.refinenet("resnet18", 5, 1, fusion=name)


@pytest.mark.parametrize("stages", [(), (0, 1), (2, 1), (3, 3)])
def test_stages_that_are_no_ascending_numbers_are_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="stages must be ascending numbers from 1 on"):
        Concat(stages=stages)


def test_stages_that_a_network_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="stages must be at most 4"):
        models.refinenet("resnet18", 5, 2, fusion=Concat(stages=(5,)))
    with pytest.raises(ValueError, match="stages must be at most 7"):
        models.unet(size=128, fusion=Concat(stages=(8,)))


def test_what_a_unet_has_no_place_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^fusion must leave the convolutions"):
        models.unet(fusion=Concat(setting="separate"))
    with pytest.raises(ValueError, match="norm_at_end=none"):
        models.unet(fusion=SelfAttention(stages=(8,)))
    with pytest.raises(ValueError, match="batch norms"):
        models.unet(fusion=ConditionalNorm())


@pytest.mark.parametrize("changes", [{"weight": -1.0}, {"specific_weight": -0.1}, {"samples": 1}])
def test_numbers_out_of_their_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(Align(), **changes)


def test_settings_name_the_option_by_its_path() -> None:
    psp = config.override(registry.find("synthetic_demo"), ["model.network=pspnet", "fusion=mmf"])
    with pytest.raises(UsageError, match=r"^fusion\.fused_on must be first"):
        segmentation.build_network(psp)
    with pytest.raises(UsageError, match=r"^fusion\.stages must be at most 4"):
        segmentation.build_network(
            config.override(registry.find("synthetic_demo"), ["fusion=concat", "fusion.stages=5"])
        )
    unet = config.override(registry.find("synthetic_translation_demo"), ["fusion=concat"])
    with pytest.raises(UsageError, match=r"^fusion\.stages must be at most 7"):
        translation.build_generator(config.override(unet, ["model.size=128", "fusion.stages=8"]))
    with pytest.raises(UsageError, match=r"^fusion must leave the convolutions of a U-Net"):
        translation.build_generator(config.override(unet, ["fusion.setting=separate"]))


def test_unet_fuses_between_norm_and_activation() -> None:
    torch.manual_seed(0)
    net = models.unet(3, 3, 2, size=8, base_width=4, fusion=Average(stages=(2,), fused_to="all")).eval()
    seen = {}
    net.encoder.levels[1].register_forward_hook(lambda _, __, y: seen.update(y=y))
    features = net.encoder(torch.randn(4, 3, 8, 8))
    assert (seen["y"] < 0).any()
    mean = seen["y"].unflatten(0, (2, 2)).mean(0)
    torch.testing.assert_close(features[1], F.leaky_relu(torch.cat([mean, mean]), 0.2))


def test_unet_trains_with_every_stage_fusion() -> None:
    for fusion in (
        Concat(stages=(1, 3), fused_to="all"),
        Average(stages=(2,)),
        SelfAttention(stages=(1, 2, 3), norm_at_end="none"),
        Align(stages=(1, 2, 3)),  # the last is one pixel of one image
    ):
        torch.manual_seed(0)
        net = models.unet(3, 3, 2, size=8, base_width=4, fusion=fusion)
        out = net(torch.randn(2, 3, 8, 8))
        loss = fusion.loss(net)
        assert (loss is not None) == isinstance(fusion, Align)
        (out.branches.square().sum() + out.ensemble.square().sum() + (loss or 0)).backward()
        assert all(p.grad is not None for name, p in net.named_parameters() if name != "alpha"), fusion
