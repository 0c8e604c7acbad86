"""SegFormer: TokenFusion's parameter counts, the formulas a second time, where it exchanges, its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cen_ext
import models
import models.recipes
from cen_ext import reference
from cen_ext.modules import ExchangeLayerNorm
from cen_ext.ops.norm_exchange.options import Options
from models.fusion import Exchange, Fusion, NoFusion
from models.networks.counting import count_parameters
from models.networks.decoders.segformer import LinearDecoder, SegFormer, segformer
from models.networks.encoders import load_imagenet, make_encoder
from models.networks.encoders.mit import Block, EfficientAttention, MixFFN
from models.networks.fusion import named_exchange_points
from models.networks.released.tokenfusion import released_names
from models.segmentation.build import build_network
from models.training import config, registry
from models.training.errors import UsageError
from tests.helpers.networks import randomise_norms

# TokenFusion's networks with 40 classes: all parameters, and those of the second modality's layer norms.
TOKENFUSION = {
    "mit_b2": (26_018_426, 25_984),
    "mit_b3": (45_917_306, 49_024),
    "mit_b5": (83_331_962, 92_800),
}
SCORE_NETWORKS = 1_260_048
HEADS, REDUCTIONS = (1, 2, 5, 8), (8, 4, 2, 1)
SIZES = {  # of the public weights: channels and blocks
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
}

State = Mapping[str, Tensor]
Norm = Callable[[str, Tensor], Tensor]  # by the norm's name


@pytest.mark.parametrize("encoder", TOKENFUSION)
def test_parameter_counts_are_tokenfusions(encoder: str) -> None:
    total, second = TOKENFUSION[encoder]
    with torch.device("meta"):
        one, two = (segformer(encoder, 40, count) for count in (1, 2))
    assert sum(parameter.numel() for parameter in two.parameters()) == total - SCORE_NETWORKS
    assert count_parameters(two) == total - SCORE_NETWORKS - 2  # alpha
    assert count_parameters(two) - count_parameters(one) == second
    assert count_parameters(two.decoder) == 536_104


def test_b4_has_the_64_million_of_segformers_abstract() -> None:
    with torch.device("meta"):
        net = segformer("mit_b4", 150, 1, width=768)
    assert round(count_parameters(net) / 1e6) == 64


# The formulas a second time, for one modality's maps [N, h, w, C] and entries of public names.


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...c,dc->...d", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def normalized(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attention(state: State, name: str, x: Tensor, heads: int, reduction: int, norm: Norm) -> Tensor:
    n, h, w, c = x.shape
    smaller = x
    if reduction > 1:
        rows, columns = h // reduction, w // reduction
        cut = x[:, : rows * reduction, : columns * reduction]
        patches = cut.reshape(n, rows, reduction, columns, reduction, c)
        convolved = torch.einsum("nrickd,edik->nrce", patches, state[f"{name}.sr.weight"])
        smaller = norm(f"{name}.norm", convolved + state[f"{name}.sr.bias"])
    queries = linear(state, f"{name}.q", x).reshape(n, h * w, heads, -1)
    pairs = linear(state, f"{name}.kv", smaller).reshape(n, -1, 2, heads, c // heads)
    scores = torch.einsum("nqhd,nkhd->nhqk", queries, pairs[:, :, 0]) / (c // heads) ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    y = torch.einsum("nhqk,nkhd->nqhd", weights, pairs[:, :, 1]).reshape(x.shape)
    return linear(state, f"{name}.proj", y)


def mix_ffn(state: State, name: str, x: Tensor) -> Tensor:
    h, w = x.shape[1:3]
    padded = F.pad(linear(state, f"{name}.fc1", x), (0, 0, 1, 1, 1, 1))
    taps = state[f"{name}.dwconv.dwconv.weight"]
    y = sum(padded[:, i : i + h, j : j + w] * taps[:, 0, i, j] for i in range(3) for j in range(3))
    y = y + state[f"{name}.dwconv.dwconv.bias"]
    return linear(state, f"{name}.fc2", y * torch.special.ndtr(y))


def block(state: State, name: str, x: Tensor, heads: int, reduction: int, norm: Norm) -> Tensor:
    x = x + attention(state, f"{name}.attn", norm(f"{name}.norm1", x), heads, reduction, norm)
    return x + mix_ffn(state, f"{name}.mlp", norm(f"{name}.norm2", x))


def features(state: State, x: Tensor, depths: tuple[int, ...], norm: Norm) -> list[Tensor]:
    """A Mix Transformer on images ``[N, 3, H, W]``."""
    found = []
    for stage, (depth, heads, reduction) in enumerate(zip(depths, HEADS, REDUCTIONS, strict=True), 1):
        patches = f"patch_embed{stage}"
        stride, padding = (4, 3) if stage == 1 else (2, 1)
        conv = state[f"{patches}.proj.weight"], state[f"{patches}.proj.bias"]
        y = norm(f"{patches}.norm", F.conv2d(x, *conv, stride, padding).permute(0, 2, 3, 1))
        for i in range(depth):
            y = block(state, f"block{stage}.{i}", y, heads, reduction, norm)
        x = norm(f"norm{stage}", y).permute(0, 3, 1, 2)
        found.append(x)
    return found


def public(key: str) -> str:
    """The public name of an encoder's entry."""
    key = re.sub(r"stage(\d)\.(patch_embed|block|norm)\.", r"\2\1.", key)
    return key.replace(".dwconv.", ".dwconv.dwconv.")


def public_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {public(prefix + key): value for key, value in module.state_dict().items()}


def made_random(module: nn.Module) -> nn.Module:
    """Different norms and biases, as a training leaves them; where layers begin, both are alike."""
    module.double()
    randomise_norms(module)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return module


def norms_of(state: State, modality: int = 0, modalities: int = 1) -> Norm:
    """A modality's norms without exchange."""

    def norm(name: str, x: Tensor) -> Tensor:
        scale, shift = (state[f"{name}.{leaf}"].chunk(modalities)[modality] for leaf in ("weight", "bias"))
        return normalized(x) * scale + shift

    return norm


def exchanging_norms(state: State, modalities: int, threshold: float) -> Norm:
    """All modalities' norms, of which norm1 and norm2 of blocks exchange, by the library's reference."""

    def norm(name: str, x: Tensor) -> Tensor:
        point = re.fullmatch(r"block\d\.\d+\.norm\d", name) is not None
        options = Options(threshold=threshold if point else 0.0, norm="layer", eps=1e-6)
        scale, shift = (state[f"{name}.{leaf}"].unflatten(0, (modalities, -1)) for leaf in ("weight", "bias"))
        y = reference.norm_exchange(x.movedim(-1, 1), scale, shift, None, None, None, options)[0]
        return y.movedim(1, -1)

    return norm


def norm_layer(channels: int, exchange_point: bool = False) -> ExchangeLayerNorm:
    return ExchangeLayerNorm(channels, 1, eps=1e-6)


@pytest.mark.parametrize(("heads", "reduction"), [(1, 1), (2, 3), (3, 2)])
def test_attention_block_and_mix_ffn_are_the_formulas(heads: int, reduction: int) -> None:
    x = torch.randn(2, 7, 9, 12, dtype=torch.float64)
    attn = made_random(EfficientAttention(12, heads, reduction, norm_layer))
    state = public_state(attn, "a.")
    torch.testing.assert_close(attn(x), attention(state, "a", x, heads, reduction, norms_of(state)))
    ffn = made_random(MixFFN(12))
    torch.testing.assert_close(ffn(x), mix_ffn(public_state(ffn, "m."), "m", x))
    whole = made_random(Block(12, heads, reduction, norm_layer))
    state = public_state(whole, "b.")
    torch.testing.assert_close(whole(x), block(state, "b", x, heads, reduction, norms_of(state)))


@pytest.mark.parametrize("training", [True, False])
def test_decoder_is_the_formula(training: bool) -> None:
    with torch.device("meta"):
        net = segformer("mit_b0", 5, width=4, dropout=0.0)
    decoder = net.decoder.to_empty(device="cpu").double().train(training)
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1)
    sizes = ((9, 11), (5, 6), (3, 3), (2, 2))
    inputs = [
        torch.randn(4, c, *size, dtype=torch.float64)
        for c, size in zip(net.encoder.channels, sizes, strict=True)
    ]
    parts = []
    for layer, x in zip(decoder.linears, inputs, strict=True):
        y = torch.einsum("dc,nchw->ndhw", layer.weight, x) + layer.bias[:, None, None]
        parts.append(F.interpolate(y, sizes[0], mode="bilinear", align_corners=False))
    weight = decoder.fuse.conv.weight[:, :, 0, 0]
    fused = torch.einsum("dc,nchw->ndhw", weight, torch.cat(parts[::-1], 1))
    norm = decoder.fuse.norm
    statistics = [table[0].clone() for table in (norm.running_mean, norm.running_var)]
    fused = F.batch_norm(fused, *statistics, norm.weight[0], norm.bias[0], training, eps=1e-5).relu()
    classifier = decoder.classifier
    expected = torch.einsum("kc,nchw->nkhw", classifier.weight[:, :, 0, 0], fused)
    torch.testing.assert_close(decoder(inputs), expected + classifier.bias[:, None, None])


@pytest.mark.parametrize("size", [(33, 33), (37, 53)])
def test_without_exchange_every_modality_is_a_plain_transformer(size: tuple[int, int]) -> None:
    parts = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    encoder = made_random(make_encoder("mit_b0", 2, Exchange(threshold=0.0)))
    state = public_state(encoder)
    found = encoder(list(parts))
    for m, part in enumerate(parts):
        expected = features(state, part, SIZES["mit_b0"][1], norms_of(state, m, 2))
        for feature, other in zip(found, expected, strict=True):
            torch.testing.assert_close(feature.chunk(2)[m], other)


def test_with_one_modality_it_is_a_plain_transformer() -> None:
    encoder = made_random(make_encoder("mit_b0", 1, Exchange()))
    state = public_state(encoder)
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    expected = features(state, x, SIZES["mit_b0"][1], norms_of(state))
    torch.testing.assert_close(encoder(x), expected)


@pytest.mark.parametrize("modalities", [2, 3])
def test_exchange_is_the_reference_at_norm1_and_norm2_of_blocks(modalities: int) -> None:
    encoder = made_random(make_encoder("mit_b0", modalities, Exchange(threshold=0.02)))
    state = public_state(encoder)
    x = torch.randn(modalities, 3, 37, 53, dtype=torch.float64)
    depths = SIZES["mit_b0"][1]
    found = encoder(x)
    expected = features(state, x, depths, exchanging_norms(state, modalities, 0.02))
    torch.testing.assert_close(found, expected)
    apart = features(state, x, depths, exchanging_norms(state, modalities, 0.0))
    assert all(not torch.allclose(one, other) for one, other in zip(found, apart, strict=True))
    names = {f"block{stage}.{i}.norm{n}" for stage in range(1, 5) for i in range(2) for n in (1, 2)}
    assert {public(name) for name in named_exchange_points(encoder)} == names


def test_an_exchanged_channel_is_the_other_modalitys() -> None:
    net = segformer("mit_b0", 5, width=8).eval()
    norm, seen = net.encoder.stage2.block[1].norm2, []
    made_random(net)
    with torch.no_grad():
        norm.weight[0, 3], norm.weight[1, 40] = 0.001, -0.001  # of 64, each in its own half
    norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    net(torch.randn(4, 3, 33, 49, dtype=torch.float64))
    one, other = seen[0].chunk(2)
    equal = (one == other).flatten(0, -2).all(0)
    assert equal[3]
    assert equal[40]
    assert torch.equal(equal, norm.replaced().any(0))


def test_shapes_of_b2() -> None:
    with torch.device("meta"):
        net = segformer("mit_b2", 40)
        found = net.encoder(torch.empty(4, 3, 480, 640))
        logits = net.decoder(found)
    sizes = ((64, 120, 160), (128, 60, 80), (320, 30, 40), (512, 15, 20))
    assert [feature.shape for feature in found] == [(4, *size) for size in sizes]
    assert logits.shape == (4, 40, 120, 160)


@pytest.mark.parametrize("size", [(33, 33), (37, 53)])
def test_sizes_need_not_divide(size: tuple[int, int]) -> None:
    net = segformer("mit_b0", 5, width=8)
    output = net(torch.randn(4, 3, *size))
    fine = [-(-side // 4) for side in size]
    assert output.branches.shape == (2, 2, 5, *fine)
    assert output.ensemble.shape == (2, 5, *fine)


def test_gradients_reach_every_parameter() -> None:
    net = made_random(segformer("mit_b0", 5, width=8, threshold=0.0))
    out = net(torch.randn(2, 3, 64, 96, dtype=torch.float64))
    (out.branches.square().sum() + out.ensemble.square().sum()).backward()
    assert not [key for key, parameter in net.named_parameters() if not parameter.grad.any()]


def test_a_modality_may_be_absent() -> None:
    net = made_random(segformer("mit_b0", 5, width=8, threshold=0.0)).eval()
    x = torch.randn(4, 3, 33, 49, dtype=torch.float64)
    with cen_ext.present(net, [1]):
        alone = net(x[2:])
    torch.testing.assert_close(alone.branches[0], net(x).branches[1])


def public_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The public layout of a Mix Transformer's weights, without its classifier."""
    found: dict[str, tuple[int, ...]] = {}

    def add(layer: str, *shape: int) -> None:
        found.update({f"{layer}.weight": shape, f"{layer}.bias": shape[:1]})

    widths, depths = SIZES[name]
    before = 3
    for stage, (c, depth, reduction) in enumerate(zip(widths, depths, REDUCTIONS, strict=True), 1):
        side = 7 if stage == 1 else 3
        add(f"patch_embed{stage}.proj", c, before, side, side)
        add(f"patch_embed{stage}.norm", c)
        for i in range(depth):
            own = f"block{stage}.{i}"
            for norm in ("norm1", "norm2", *(["attn.norm"] if reduction > 1 else [])):
                add(f"{own}.{norm}", c)
            for layer, rows, columns in (
                *(("attn.q", c, c), ("attn.kv", 2 * c, c), ("attn.proj", c, c)),
                *(("mlp.fc1", 4 * c, c), ("mlp.fc2", c, 4 * c)),
            ):
                add(f"{own}.{layer}", rows, columns)
            add(f"{own}.mlp.dwconv.dwconv", 4 * c, 1, 3, 3)
            if reduction > 1:
                add(f"{own}.attn.sr", c, c, reduction, reduction)
        add(f"norm{stage}", c)
        before = c
    return found


def is_norm(key: str) -> bool:
    return "norm" in key.split(".")[-2]


def tokenfusion_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The layout of TokenFusion's checkpoints: 40 classes, two modalities, with score networks."""
    found: dict[str, tuple[int, ...]] = {"alpha": (2,)}
    for key, shape in public_shapes(name).items():
        layer, leaf = key.rsplit(".", 1)
        if is_norm(key):
            found |= {f"encoder.{layer}.ln_{m}.{leaf}": shape for m in (0, 1)}
        else:
            wrapped = layer if "dwconv" in layer else f"{layer}.module"
            found[f"encoder.{wrapped}.{leaf}"] = shape
    for stage, c in enumerate(SIZES[name][0], 1):
        found |= {
            f"decoder.linear_c{stage}.proj.weight": (256, c),
            f"decoder.linear_c{stage}.proj.bias": (256,),
            f"encoder.score_predictor.{stage - 1}.score_nets.0.1.weight": (c, c),
        }
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        found[f"decoder.linear_fuse.bn.{leaf}"] = (256,)
    return found | {
        "decoder.linear_fuse.bn.num_batches_tracked": (),
        "decoder.linear_fuse.conv.weight": (256, 1024, 1, 1),
        "decoder.linear_pred.weight": (40, 256, 1, 1),
        "decoder.linear_pred.bias": (40,),
    }


def made_up(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def test_imagenet_weights_load_into_every_modality(tmp_path: Path) -> None:
    state = made_up(public_shapes("mit_b0"))
    head = {"head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}
    torch.save(state | head, tmp_path / "mit_b0.pth")
    encoder = make_encoder("mit_b0", 2, Exchange())
    report = load_imagenet(encoder, tmp_path / "mit_b0.pth")
    assert report == ([], [])
    loaded = public_state(encoder)
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(loaded[key], value.repeat(2) if is_norm(key) else value), key
    load_imagenet(encoder, tmp_path / "mit_b0.pth", bgr=True)
    stem = "patch_embed1.proj.weight"
    assert torch.equal(public_state(encoder)[stem], state[stem].flip(1))


def test_tokenfusions_names() -> None:
    with torch.device("meta"):
        names = released_names(segformer("mit_b3", 40))
    expected = [key.replace(".module.", ".") for key in tokenfusion_shapes("mit_b3")]
    found = [name for theirs in names.values() for name in theirs]
    assert sorted(found) == sorted(key for key in expected if "score_predictor" not in key)


def test_tokenfusions_checkpoints_load_without_score_networks(tmp_path: Path) -> None:
    state = made_up(tokenfusion_shapes("mit_b0"))
    torch.save(
        {"segmenter": {f"module.{key}": value for key, value in state.items()}, "epoch_start": 7},
        tmp_path / "model-best.pth.tar",
    )
    net = segformer("mit_b0", 40)
    assert models.load_released(net, tmp_path / "model-best.pth.tar") is net
    assert torch.equal(net.alpha, state["alpha"])
    first = net.encoder.stage3.block[1]
    for m in (0, 1):
        assert torch.equal(first.norm1.weight[m], state[f"encoder.block3.1.norm1.ln_{m}.weight"])
        assert torch.equal(first.attn.norm.bias[m], state[f"encoder.block3.1.attn.norm.ln_{m}.bias"])
        assert torch.equal(net.encoder.stage3.norm.bias[m], state[f"encoder.norm3.ln_{m}.bias"])
    assert torch.equal(first.attn.kv.weight, state["encoder.block3.1.attn.kv.module.weight"])
    assert torch.equal(first.mlp.dwconv.bias, state["encoder.block3.1.mlp.dwconv.dwconv.bias"])
    assert torch.equal(net.decoder.linears[3].weight, state["decoder.linear_c4.proj.weight"])
    assert torch.equal(net.decoder.fuse.norm.running_var[0], state["decoder.linear_fuse.bn.running_var"])
    assert torch.equal(net.decoder.classifier.bias, state["decoder.linear_pred.bias"])

    state["encoder.block3.2.norm1.ln_0.weight"] = torch.zeros(160)  # a deeper network's
    with pytest.raises(ValueError, match=r"left over: encoder\.block3\.2\.norm1\.ln_0\.weight"):
        models.load_released(net, state)


def test_networks_unlike_tokenfusions_are_not_filled() -> None:
    with torch.device("meta"):
        others = [
            segformer("resnet18", 40),
            segformer("mit_b0", 40, fusion=NoFusion(norms="shared")),
            segformer("mit_b0", 40, fusion="late_concat"),
        ]
    for net in others:
        with pytest.raises(ValueError, match="net must be as TokenFusion's networks are"):
            models.load_released(net, {})


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        (Exchange(convolutions="private"), "share a SegFormer's decoder"),
        (models.fusion.Concat((2,), "separate"), "mit_b0 has linear layers, which have no private form"),
        (Exchange(at="downsampling"), "mit_b0 halves the resolution in no block"),
        (models.fusion.Discard(), "fusion=discard needs a network of batch or instance norms"),
        (models.fusion.AsymFusion(), "fusion=asymfusion acts around the spatial convolution"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_fusions_that_it_cannot_serve_are_refused(fusion: Fusion, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        segformer("mit_b0", 40, fusion=fusion)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: segformer("mit_b0", width=0), "width must be at least 1, got 0"),
        (lambda: segformer("mit_b0", 0), "num_classes must be at least 1, got 0"),
        (lambda: segformer("mit_b0", 40, 0), "num_modalities must be at least 1, got 0"),
        (lambda: segformer("mit_b6"), r"encoder must be one of .*, got 'mit_b6'.*did you mean 'mit_b"),
        (lambda: models.pspnet("mit_b0"), "encoder 'mit_b0' has no dilated form"),
    ],
)
def test_wrong_options_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build()


def test_recipes_build_it() -> None:
    settings = ["model.network=segformer", "model.encoder=mit_b0", "model.width=8"]
    net = build_network(config.override(registry.find("synthetic_demo"), settings))
    assert isinstance(net, SegFormer)
    assert net.decoder.dropout.p == 0.1
    assert net(torch.randn(4, 3, 64, 64)).branches.shape == (2, 2, 11, 16, 16)
    wrong = config.override(registry.find("synthetic_demo"), [*settings, "model.decoder_init=kaiming"])
    with pytest.raises(UsageError, match=r"decoder_init must be torch with model\.network=segformer"):
        build_network(wrong)


def test_recipe_is_tokenfusions() -> None:
    recipe = registry.find("nyudv2_cen_segformer_b2")
    with torch.device("meta"):
        net = build_network(recipe)
    assert isinstance(net, SegFormer)
    assert count_parameters(net) == 24_758_376
    optim = recipe.optim
    assert (optim.method, optim.weight_decay, recipe.data.batch_size) == ("adamw", 0.01, 6)
    assert [(stage.epochs, stage.encoder_lr, stage.decoder_lr) for stage in optim.stages] == [
        (100, rate, pytest.approx(10 * rate)) for rate in (6e-5, 3e-5, 1.5e-5)
    ]
    assert (recipe.loss.sparsity, recipe.fusion) == (1e-3, Exchange(penalty="all"))


def test_any_encoder_takes_the_decoder() -> None:
    net = segformer("resnet18", 5, width=8, frozen_statistics=False)
    assert isinstance(net, SegFormer)
    assert isinstance(net.decoder, LinearDecoder)
    assert net(torch.randn(4, 3, 33, 49)).branches.shape == (2, 2, 5, 9, 13)
