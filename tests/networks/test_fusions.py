"""The paper's Table 1 and ablations: each against a formula or a network written another way."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import cen_ext
import models
from cen_ext.modules import ExchangeNorm
from models.__main__ import main
from models.data import prepare_synthetic
from models.fusion import Discard, Exchange, FixedPortion, Fusion, GatedSum, LateConcat, NoFusion, Sum
from models.networks.encoders import ExchangeResNet, load_imagenet
from models.networks.fusion.ablations import MixedBatchNorm2d
from models.networks.fusion.base import exchange_points, scale_penalty
from models.networks.private import PrivateConv2d
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.build import build_network
from models.segmentation.load import load
from models.segmentation.task import SegmentationTask
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from tests.helpers.networks import randomise_norms

NETWORKS: dict[str, Callable[..., SegmentationNetwork]] = {
    "refinenet": models.refinenet,
    "pspnet": models.pspnet,
}
both_networks = pytest.mark.parametrize("network", NETWORKS)


def small_net(
    network: str = "refinenet", num_modalities: int = 2, fusion: Fusion | None = None
) -> SegmentationNetwork:
    options = {"width": 8, "dropout": 0.0, "frozen_statistics": False}
    net = NETWORKS[network]("resnet18", 5, num_modalities, fusion=fusion, **options)
    net.double()
    randomise_norms(net)
    return net


def images(num_modalities: int = 2, num_images: int = 2) -> Tensor:
    return torch.randn(num_modalities * num_images, 3, 33, 49, dtype=torch.float64)


def outputs(net: SegmentationNetwork, x: Tensor) -> list[Tensor]:
    out = net(x)
    return [out.branches, *out.auxiliary]


# Table 1


@both_networks
def test_unshared_is_a_network_a_modality(network: str) -> None:
    """Table 1, row 1: outputs, losses and gradients of M single networks, trained with batch statistics."""
    net = small_net(network, fusion=NoFusion(convolutions="private"))
    with torch.no_grad():  # each set of filters starts as the others do
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x = images()
    found = outputs(net.train(), x)
    sum(each.square().sum() for each in found).backward()
    for m in range(2):
        single = small_net(network, 1)
        state = {
            key: value.chunk(2)[m] if value.dim() > 0 else value for key, value in net.state_dict().items()
        }
        single.load_state_dict(state)
        expected = outputs(single.train(), x.chunk(2)[m])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[m], other[0])
        sum(each.square().sum() for each in expected).backward()
        gradients = {name: p.grad.chunk(2)[m] for name, p in net.named_parameters() if name != "alpha"}
        for name, p in single.named_parameters():
            if name != "alpha":
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-9)


@both_networks
def test_unshared_starts_as_shared(network: str) -> None:
    shared, private = small_net(network), small_net(network, fusion=Exchange(convolutions="private"))
    before = {key: value.clone() for key, value in private.state_dict().items()}
    private.load_state_dict(shared.state_dict())  # a shared set of filters goes to every modality
    assert sum(not torch.equal(before[key], value) for key, value in private.state_dict().items()) > 20
    x = images()
    for one, other in zip(outputs(private.eval(), x), outputs(shared.eval(), x), strict=True):
        torch.testing.assert_close(one, other)


def test_unshared_convolutions_still_exchange() -> None:
    """With every scale of modality 0 at zero in one norm, that norm gives it modality 1's values."""
    net = small_net(fusion=Exchange(convolutions="private")).eval()
    x = images()
    with torch.no_grad():
        before = net(x).branches
        net.encoder.layer2[0].bn1.weight[0].zero_()
        seen = []
        net.encoder.layer2[0].bn1.register_forward_hook(lambda module, args, output: seen.append(output))
        after = net(x).branches
    first, second = seen[0].unflatten(0, (2, 2))
    assert torch.equal(first[:, :64], second[:, :64])  # its own share
    assert not torch.equal(first[:, 64:], second[:, 64:])
    assert not torch.equal(before[0], after[0])


@both_networks
def test_shared_norms_are_one_network_on_the_whole_stack(network: str) -> None:
    """Table 1, row 2."""
    net = small_net(network, fusion=NoFusion(norms="shared")).train()
    single = small_net(network, 1).train()
    single.load_state_dict({**net.state_dict(), "alpha": single.alpha})
    x = images()
    for one, other in zip(outputs(net, x), outputs(single, x), strict=True):
        torch.testing.assert_close(one.flatten(0, 1), other[0])


def scales_after_3x3(encoder: ExchangeResNet) -> list[Tensor]:
    convolutions = (key for key, m in encoder.named_modules() if getattr(m, "kernel_size", None) == (3, 3))
    named = (encoder.get_submodule(key.replace("conv", "bn")) for key in convolutions if "conv" in key)
    return [norm.weight.detach() for norm in named]


@pytest.mark.parametrize("kind", [NoFusion, Exchange])
@pytest.mark.parametrize("network", NETWORKS)
def test_penalties(network: str, kind: type[Fusion]) -> None:
    """Table 1, rows 3 to 6: no penalty, that of each modality's share, or of all."""
    net = small_net(network, fusion=kind())
    scales = scales_after_3x3(net.encoder)
    assert len(scales) == 16
    own = sum(w[0, : w.shape[1] // 2].abs().sum() + w[1, w.shape[1] // 2 :].abs().sum() for w in scales)
    everything = sum(w.abs().sum() for w in scales)
    for penalty, expected in {"none": 0.0, "own": own, "all": everything}.items():
        assert kind(penalty=penalty).penalty_on_scales(net).item() == pytest.approx(
            float(expected), rel=1e-12
        )
    default = own if kind is Exchange else torch.zeros(())
    assert net.fusion.penalty_on_scales(net).item() == pytest.approx(float(default), rel=1e-12)
    assert Exchange(threshold=0.0, penalty="all").penalty_on_scales(net) == 0
    scale_penalty(net, "own").backward()
    weight = net.encoder.layer1[0].bn1.weight
    expected = weight.detach().sign()
    expected[0, 32:] = expected[1, :32] = 0
    assert torch.equal(weight.grad, expected)


TABLE = {  # overrides: private convolutions, private norms, penalty, region of a threshold's exchange
    ("fusion=none", "fusion.convolutions=private"): (True, True, "none", None),
    ("fusion=none", "fusion.norms=shared"): (False, False, "none", None),
    ("fusion=none",): (False, True, "none", None),
    ("fusion=none", "fusion.penalty=own"): (False, True, "own", None),
    (): (False, True, "own", "own"),
    ("fusion.region=all", "fusion.penalty=all"): (False, True, "all", "all"),
    ("fusion=late_concat",): (False, True, "own", "own"),
    ("fusion=fixed_portion", "fusion.choice=random"): (False, True, "none", None),
    ("fusion=fixed_portion", "fusion.penalty=own"): (False, True, "own", None),
}


@pytest.mark.parametrize("overrides", TABLE)
@pytest.mark.parametrize("name", ["nyudv2_cen_refinenet101", "nyudv2_cen_pspnet101"])
def test_rows_are_overrides_of_a_recipe(name: str, overrides: tuple[str, ...]) -> None:
    private_convolutions, private_norms, penalty, region = TABLE[overrides]
    recipe = config.override(registry.find(name), [*overrides, "model.encoder=resnet18", "model.width=8"])
    net = build_network(recipe)
    assert type(net) is (models.PSPNet if "pspnet" in name else models.RefineNet)
    parts = (net.encoder, net.decoder) if net.auxiliary is None else (net.encoder, net.decoder, net.auxiliary)
    convolutions = [m for part in parts for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert {isinstance(m, PrivateConv2d) for m in convolutions} == {private_convolutions}
    norms = [m for m in net.modules() if isinstance(m, cen_ext.ExchangeBatchNorm2d)]
    assert {len(m.weight) for m in norms} == {2 if private_norms else 1}
    assert recipe.fusion.penalty == penalty
    regions = {m.region for m in norms if m.threshold > 0}
    assert regions == ({region} if region else set())


def test_pspnet_recipes() -> None:
    recipe = registry.find("nyudv2_cen_pspnet152")
    assert [stage.epochs for stage in recipe.optim.stages] == [150] * 3
    assert (recipe.model.network, recipe.model.encoder) == ("pspnet", "resnet152")
    assert (recipe.model.width, recipe.model.dropout, recipe.loss.auxiliary) == (512, 0.1, 0.4)
    assert registry.find("nyudv2_cen_pspnet101").model.encoder == "resnet101"
    small = ["model.encoder=resnet18", "loss.auxiliary=0"]
    assert build_network(config.override(recipe, small)).auxiliary is None
    with pytest.raises(UsageError, match=r"^model\.decoder_init must be torch with model\.network=pspnet"):
        build_network(config.override(recipe, ["model.decoder_init=kaiming"]))
    with pytest.raises(UsageError, match=r"^data\.batch_size / optim\.accumulate must be at least 2 with "):
        SegmentationTask(config.override(recipe, ["data.batch_size=1"]))


# Ablations


def private_norm(layer: cen_ext.ExchangeBatchNorm2d, x: Tensor) -> list[Tensor]:
    """Eq. 5 with batch statistics: M tensors ``[N, C, H, W]``."""
    z = []
    for m, rows in enumerate(x.chunk(layer.num_modalities)):
        mean, var = rows.mean((0, 2, 3), keepdim=True), rows.var((0, 2, 3), keepdim=True, correction=0)
        xhat = (rows - mean) / (var + layer.eps).sqrt()
        z.append(layer.weight[m, :, None, None] * xhat + layer.bias[m, :, None, None])
    return z


def by_hand(kind: str, layer: ExchangeNorm, z: list[Tensor], chosen: Tensor, gate: Tensor | None) -> Tensor:
    """Mix every channel of every modality, one by one."""
    num_modalities, channels = layer.weight.shape
    rows = []
    for m in range(num_modalities):
        columns = []
        for c in range(channels):
            others = [z[k][:, c] for k in range(num_modalities) if k != m]
            if kind == "sum":
                column = sum(z[k][:, c] for k in range(num_modalities))
            elif kind == "gated_sum":
                column = sum(z[k][:, c] / (1 + torch.exp(-gate[k, c])) for k in range(num_modalities))
            elif not chosen[m, c]:
                column = z[m][:, c]
            else:
                column = 0 * others[0].detach() if kind == "discard" else sum(others) / len(others)
            columns.append(column)
        rows.append(torch.stack(columns, 1))
    return torch.cat(rows)


C = 12
MIXES: dict[str, Fusion] = {
    "first": FixedPortion(choice="first", portion=0.25),
    "first, all": FixedPortion(choice="first", portion=0.75, region="all"),
    "smallest": FixedPortion(choice="smallest", portion=0.25),
    "random": FixedPortion(choice="random", portion=0.25),
    "discard": Discard(threshold=0.3),
    "discard, signed": Discard(threshold=0.3, region="all", criterion="signed"),
    "sum": Sum(),
    "gated_sum": GatedSum(),
}


def mixed_norm(fusion: Fusion, num_modalities: int, activation: str = "relu") -> ExchangeNorm:
    layer = fusion.norm(C, num_modalities, exchange_point=True, activation=activation).double()
    assert isinstance(layer, MixedBatchNorm2d) != isinstance(fusion, FixedPortion)
    return layer


def own_share(m: int, num_modalities: int) -> range:
    return range(m * C // num_modalities, (m + 1) * C // num_modalities)


def chosen_by_hand(name: str, layer: ExchangeNorm) -> Tensor:
    num_modalities = layer.num_modalities
    chosen = torch.zeros(num_modalities, C, dtype=torch.bool)
    for m in range(num_modalities):
        share, scales = own_share(m, num_modalities), layer.weight[m].tolist()
        picked = {
            "first": list(share)[:3],
            "first, all": list(range(9)),
            "smallest": sorted(share, key=lambda c: abs(scales[c]))[:3],
            "discard": [c for c in share if abs(scales[c]) < 0.3],
            "discard, signed": [c for c in range(C) if scales[c] <= 0.3],
        }
        if name == "random":
            picked["random"] = sorted(share, key=lambda c: layer.mask.scores[m, c].item())[:3]
        chosen[m, picked.get(name, [])] = True
    return chosen


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("num_modalities", [2, 3])
def test_mixes_against_their_formulas(name: str, num_modalities: int) -> None:
    layer = mixed_norm(MIXES[name], num_modalities)
    gate = dict(layer.named_parameters()).get("mix.gate")
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(2 * num_modalities, C, 3, 4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn_like(x, requires_grad=True)
    chosen = chosen_by_hand(name, layer)
    assert torch.equal(layer.replaced(), chosen)
    assert layer.exchanges is (name not in ("sum", "gated_sum"))

    mixed = by_hand(name.partition(",")[0], layer, private_norm(layer, x), chosen, gate)
    expected = (mixed + residual).clamp(min=0)
    found = layer(x, residual)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    leaves = [x, residual, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    activation = "mixed_activation" if isinstance(layer, MixedBatchNorm2d) else "activation"
    setattr(layer, activation, "identity")
    torch.testing.assert_close(layer(x), mixed)
    setattr(layer, activation, "leaky_relu")
    layer.negative_slope = 0.2
    torch.testing.assert_close(layer(x), torch.where(mixed > 0, mixed, 0.2 * mixed))


@pytest.mark.parametrize("name", [*MIXES, "conditional_norm"])
def test_a_residual_of_another_type_is_cast_to_that_of_x(name: str) -> None:
    if name in MIXES:
        layer = mixed_norm(MIXES[name], 2).float()
    else:
        layer = models.fusion.ConditionalNorm().norm(C, 2, exchange_point=True)
    x, residual = torch.randn(2, 4, C, 3, 4)
    expected = layer.eval()(x, residual.bfloat16().float())
    residual = residual.bfloat16().requires_grad_()
    y = layer(x, residual)
    assert torch.equal(y, expected)
    assert torch.autograd.grad(y.sum(), residual)[0].dtype == torch.bfloat16


def test_a_mix_of_the_channels_below_the_threshold_is_the_operators_exchange() -> None:
    exchange = Exchange(threshold=0.5).norm(C, 3, exchange_point=True, activation="relu").double()
    nn.init.normal_(exchange.weight)
    with torch.no_grad():  # two in each share are below the threshold
        for m in range(3):
            exchange.weight[m] = exchange.weight[m].sign() * (exchange.weight[m].abs() + 0.5)
            exchange.weight[m, list(own_share(m, 3))[1:3]] = torch.tensor([0.1, -0.2], dtype=torch.float64)
    mix = mixed_norm(FixedPortion(choice="smallest", portion=2 / C), 3)
    discard = mixed_norm(Discard(threshold=0.5), 3)
    x = torch.randn(6, C, 3, 4, dtype=torch.float64)
    y = exchange(x)
    (dx,) = torch.autograd.grad(y.square().sum(), next(exchange.parameters()))
    for layer in (mix, discard):
        layer.load_state_dict(exchange.state_dict(), strict=False)
        assert torch.equal(layer.replaced(), exchange.replaced())
    torch.testing.assert_close(mix(x), y)
    (found,) = torch.autograd.grad(mix(x).square().sum(), next(mix.parameters()))
    torch.testing.assert_close(found, dx)
    kept = ~exchange.replaced()[:, None, :, None, None]
    torch.testing.assert_close(discard(x), (y.unflatten(0, (3, 2)) * kept).flatten(0, 1))


def test_random_channels_are_drawn_once_and_kept_with_the_weights() -> None:
    random = FixedPortion(choice="random")
    first, second = small_net(fusion=random), small_net(fusion=random)
    point = "layer3.0.bn1"
    drawn = first.encoder.get_submodule(point).replaced()
    assert drawn.sum(1).tolist() == [round(0.3 * 256)] * 2
    assert not drawn[0, 128:].any()
    assert not drawn[1, :128].any()
    assert torch.equal(first.encoder.get_submodule(point).replaced(), drawn)
    assert not torch.equal(second.encoder.get_submodule(point).replaced(), drawn)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.encoder.get_submodule(point).replaced(), drawn)
    x = images()
    with torch.no_grad():
        assert torch.equal(first.eval()(x).branches, second.eval()(x).branches)


@pytest.mark.parametrize(("name", "dilated"), [("resnet18", False), ("resnet50", True)])
@pytest.mark.parametrize("kind", [Exchange, FixedPortion])
def test_exchange_at_down_sampling_only(name: str, dilated: bool, kind: type[Fusion]) -> None:
    with torch.device("meta"):
        encoder = ExchangeResNet(name, 2, kind(at="downsampling"), dilated=dilated)
    norms = ("bn1", "bn2") if name == "resnet18" else ("bn2",)
    expected = {f"layer{stage}.0.{norm}" for stage in (2, 3, 4) for norm in norms}
    assert set(cen_ext.exchanging_layers(encoder)) == expected
    points = {id(point) for point in exchange_points(encoder)}
    assert {key for key, m in encoder.named_modules() if id(m) in points} == expected


@both_networks
def test_concat_fusion(network: str) -> None:
    net = small_net(network, fusion=LateConcat()).train()
    x = images()
    out = net(x)
    assert out.alpha is None
    assert net.branch_weights() == []
    assert "alpha" not in net.state_dict()
    torch.testing.assert_close(out.ensemble, out.branches.mean(0))  # where the ensemble starts, too
    out.ensemble.square().sum().backward()
    trained = {key for key, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {"head.conv.weight", "head.conv.bias"}
    with torch.no_grad():
        net.head.conv.weight.normal_()
        net.head.conv.bias.normal_()
        out = net(x)
    weight = net.head.conv.weight[:, :, 0, 0].unflatten(1, (2, 5))  # [K, M, K]
    expected = torch.einsum("kmj,mnjhw->nkhw", weight, out.branches) + net.head.conv.bias[:, None, None]
    torch.testing.assert_close(out.ensemble, expected.detach())


# What makes no sense, and what is around the networks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["=none", ".norms=shared", ".penalty=own"], "penalty must be none or all with norms=shared"),
        (["=none", ".norms=shared", ".convolutions=private"], "norms must be private with conv"),
        (["=fixed_portion", ".portion=0.6"], "portion must be at most 1/2 with 2 modalities and region=own"),
    ],
)
def test_contradictions_name_the_field(overrides: list[str], message: str) -> None:
    recipe = config.override(registry.find("synthetic_demo"), [f"fusion{each}" for each in overrides])
    with pytest.raises(UsageError, match=rf"^fusion\.{re.escape(message)}"):
        build_network(recipe)
    for build in NETWORKS.values():
        with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
            build("resnet18", fusion=recipe.fusion)


def test_norms_in_common_can_neither_exchange_nor_mix() -> None:
    """Modalities that have their scales in common have nothing to tell their channels apart."""
    for name in models.fusions():
        options = config.flatten(config.override(registry.find("synthetic_demo"), [f"fusion={name}"]))
        assert ("fusion.norms" in options) is (name == "none")


def test_unknown_values_and_one_modality_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^choice must be one of .*, got 'rando'; did you mean 'random'\?"):
        FixedPortion(choice="rando")
    with pytest.raises(ValueError, match=r"^fusion must be .*, got 'exchang'; did you mean 'exchange'"):
        models.refinenet("resnet18", fusion="exchang")
    with pytest.raises(ValueError, match=r"^threshold must not be given beside fusion: give fusion=Exchange"):
        models.refinenet("resnet18", fusion="none", threshold=0.1)
    with pytest.raises(TypeError, match=r"^fusion must be a Fusion or a registered name, got type"):
        models.refinenet("resnet18", fusion=Exchange)
    with pytest.raises(ValueError, match=r"^threshold"):
        Exchange(threshold=-1.0)
    for portion in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^portion must be above 0 and at most 1, got"):
            FixedPortion(portion=portion)
    for name in ("fixed_portion", "discard", "sum", "gated_sum", "late_concat"):
        with pytest.raises(ValueError, match=rf"^fusion={name} needs at least two modalities"):
            models.refinenet("resnet18", 5, 1, fusion=name)
    models.refinenet("resnet18", 5, 1, width=8, fusion=NoFusion(convolutions="private"))
    every = FixedPortion(choice="random", portion=1.0, region="all")
    models.refinenet("resnet18", 5, 2, width=8, fusion=every)


@pytest.mark.parametrize(
    "fusion", [Exchange(convolutions="private"), NoFusion(norms="shared"), LateConcat()], ids=str
)
def test_released_checkpoints_fit_the_papers_network_only(fusion: Fusion) -> None:
    with pytest.raises(
        ValueError, match="net must be as the released networks are, a RefineNet of shared convolutions"
    ):
        models.load_released(small_net(fusion=fusion), {})


def test_imagenet_weights_start_every_modalitys_filters_alike(tmp_path: Path) -> None:
    original = ExchangeResNet("resnet18", 1)
    randomise_norms(original)
    state = {k: (v[0] if v.dim() == 2 else v).clone() for k, v in original.state_dict().items()}
    torch.save(state, tmp_path / "resnet18.pth")
    net = models.refinenet("resnet18", 5, 3, width=8, fusion=Exchange(convolutions="private"))
    assert load_imagenet(net.encoder, tmp_path / "resnet18.pth") == ([], [])
    for m in range(3):
        assert torch.equal(net.encoder.layer2[0].conv1.weight.chunk(3)[m], state["layer2.0.conv1.weight"])
        assert torch.equal(net.encoder.layer2[0].bn1.weight[m], state["layer2.0.bn1.weight"])
    state["layer2.0.conv1.weight"] = torch.zeros(64, 64, 3, 3)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"layer2\.0\.conv1\.weight is \(64, 64, 3, 3\) in the file"):
        load_imagenet(net.encoder, tmp_path / "wrong.pth")


def test_private_convolutions_with_bias_in_channels_last() -> None:
    convs = [nn.Conv2d(3, 4, 3, 2, padding=2, dilation=2, dtype=torch.float64) for _ in range(3)]
    private = PrivateConv2d(convs[0], 3)
    with torch.no_grad():
        private.weight.copy_(torch.cat([conv.weight for conv in convs]))
        private.bias.copy_(torch.cat([conv.bias for conv in convs]))
    x = torch.randn(6, 3, 9, 8, dtype=torch.float64)
    expected = torch.cat([conv(rows) for conv, rows in zip(convs, x.chunk(3), strict=True)])
    assert torch.equal(private(x), expected)
    private.to(memory_format=torch.channels_last)
    found = private(x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)


DEFAULT_VARIANT = {
    "convolutions": "shared",
    "norms": "private",
    "penalty": "auto",
    "exchange": "threshold",
    "exchange_at": "every",
    "portion": 0.3,
    "fusion": "ensemble",
}
RULE = {"threshold": 0.1, "region": "all", "criterion": "signed"}
OLD = [  # what was in ``model`` and ``variant``, and the fusion that it is
    ({}, {}, Exchange()),
    (RULE, {}, Exchange(0.1, "all", "signed")),
    (
        RULE,
        {"penalty": "all", "exchange_at": "downsampling"},
        Exchange(0.1, "all", "signed", "all", "downsampling"),
    ),
    (
        RULE,
        {"convolutions": "private", "penalty": "none"},
        Exchange(0.1, "all", "signed", "none", convolutions="private"),
    ),
    ({"threshold": 0.0}, {}, Exchange(0.0)),
    ({"threshold": 0.0}, {"penalty": "own"}, NoFusion(penalty="own")),
    (RULE, {"exchange": "none"}, NoFusion()),
    (RULE, {"exchange": "none", "penalty": "own"}, NoFusion(penalty="own")),
    (
        RULE,
        {"exchange": "none", "norms": "shared", "penalty": "all"},
        NoFusion(norms="shared", penalty="all"),
    ),
    (RULE, {"exchange": "portion", "portion": 0.2}, FixedPortion(portion=0.2, region="all")),
    ({}, {"exchange": "smallest", "penalty": "own"}, FixedPortion("own", choice="smallest")),
    (
        {},
        {"exchange": "random", "exchange_at": "downsampling"},
        FixedPortion(at="downsampling", choice="random"),
    ),
    (RULE, {"exchange": "discard"}, Discard(threshold=0.1, region="all", criterion="signed")),
    (RULE, {"exchange": "sum"}, Sum()),
    (RULE, {"exchange": "gated_sum", "penalty": "all"}, GatedSum(penalty="all")),
    (RULE, {"fusion": "concat"}, LateConcat(0.1, "all", "signed")),
    (RULE, {"fusion": "concat", "exchange": "none"}, LateConcat(0.0, "all", "signed", "none")),
]


@pytest.mark.parametrize(("model", "variant", "expected"), OLD)
def test_settings_from_before_the_fusions_are_translated(
    model: dict[str, object], variant: dict[str, object], expected: Fusion
) -> None:
    recipe = registry.find("nyudv2_cen_refinenet101")
    plain = config.to_plain(recipe)
    del plain["fusion"], plain["model"]["network"], plain["loss"]["auxiliary"]
    plain["model"] |= model
    found = config.from_plain(recipe, {**plain, "variant": {**DEFAULT_VARIANT, **variant}})
    assert found == dataclasses.replace(recipe, fusion=expected)
    assert config.from_plain(recipe, config.to_plain(found)) == found


def test_switches_that_no_fusion_combines_are_refused() -> None:
    recipe = registry.find("nyudv2_cen_refinenet101")
    plain = config.to_plain(recipe)
    del plain["fusion"]
    with pytest.raises(UsageError, match=r"^the settings variant.fusion=concat and variant.exchange=random"):
        config.from_plain(recipe, {**plain, "variant": {"exchange": "random", "fusion": "concat"}})


def test_an_old_path_still_sets_its_option() -> None:
    recipe = config.override(registry.find("synthetic_demo"), ["model.threshold=0.3", "model.region=all"])
    assert recipe.fusion == Exchange(0.3, "all")


def test_a_choice_carries_the_options_that_both_have() -> None:
    recipe = config.override(registry.find("synthetic_demo"), ["fusion.threshold=0.3", "fusion=discard"])
    assert recipe.fusion == Discard(threshold=0.3)
    again = config.override(recipe, ["fusion=discard", "fusion.penalty=all", "fusion=discard"])
    assert again.fusion == Discard(threshold=0.3, penalty="all")
    with pytest.raises(
        UsageError, match=r"^unknown field 'fusion\.treshold'; did you mean 'fusion\.threshold'"
    ):
        config.override(recipe, ["fusion.treshold=1"])


def test_a_fusion_trains_resumes_and_is_evaluated(tmp_path: Path) -> None:
    """``python -m models train ... fusion=<name>``, with state of its own in the checkpoints."""
    rooms = prepare_synthetic(tmp_path / "rooms", train=4, val=2, size=(48, 64), seed=0)
    run = tmp_path / "run"
    command = ["train", "synthetic_demo", f"data.root={rooms}", f"run.output={run}", "run.workers=0"]
    command += ["data.batch_size=2", "data.crop=48", "data.shorter_side=48", "eval.pictures=1"]
    command += ["model.network=pspnet", "model.width=8", "fusion=fixed_portion"]
    command += ["fusion.convolutions=private", "fusion.choice=random", "optim.stages.0.steps=2"]
    assert main([*command, "run.steps=1"]) == 0
    drawn = checkpoint.load(run / checkpoint.LAST)[1]["task"]["net"]
    assert main([*command, "run.steps=2", "--resume"]) == 0
    trained = load(run / checkpoint.LAST)
    fusion, net = trained.recipe.fusion, trained.net
    state = checkpoint.load(trained.path)[1]["task"]["net"]
    assert fusion == FixedPortion(choice="random", convolutions="private")
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    scores = [key for key in state if key.endswith("mask.scores")]
    assert len(scores) == 16
    assert all(torch.equal(state[key], drawn[key]) for key in scores)
    assert not torch.equal(state["auxiliary.classifier.weight"], drawn["auxiliary.classifier.weight"])
    assert main(["evaluate", str(run), "--output", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found" / "evaluation_best.json").read_text())
    assert set(found["alpha"]) == {"rgb", "depth"}
    assert {"rgb/mean_iou", "depth/mean_iou", "ensemble/mean_iou"} <= set(found["metrics"])
