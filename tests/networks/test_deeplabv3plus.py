"""DeepLabv3+: size, the decoder's formula, its norms, output strides, encoders, fusions, refusals."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import examples.own_encoder  # noqa: F401
import models
import tests.helpers.small_xception  # noqa: F401 - registers its encoder, as the example does
from cen_ext import recompute_outputs
from cen_ext.modules import ExchangeNorm
from models.fusion import Align, Average, Exchange, Fusion, LateConcat, NoFusion
from models.networks.decoders.deeplabv3plus import DeepLabDecoder
from models.networks.encoders import make_encoder
from models.networks.outputs import SegmentationOutput
from tests.helpers.networks import randomise_norms

# Parameters with 19 classes, alpha aside: one modality, and two with private norms in the encoder only.
PARAMETERS = {"xception65": (41_054_899, 41_240_099), "xception71": (43_477_323, 43_676_299)}


def small_net(
    num_modalities: int = 2, encoder: str = "small_xception", **options: object
) -> models.DeepLabV3Plus:
    options = {"width": 8, "dropout": 0.0, "frozen_statistics": False, **options}
    net = models.deeplabv3plus(encoder, 5, num_modalities, **options).double()
    randomise_norms(net)
    return net


def images(num_modalities: int = 2) -> Tensor:
    return torch.randn(num_modalities * 2, 3, 65, 49, dtype=torch.float64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    for num_modalities, expected in enumerate(PARAMETERS[name], 1):
        with torch.device("meta"):
            net = models.deeplabv3plus(name, num_modalities=num_modalities)
        assert sum(p.numel() for p in net.parameters()) - net.alpha.numel() == expected


def test_parameters_on_a_resnet_with_private_norms() -> None:
    with torch.device("meta"):
        net = models.deeplabv3plus("resnet50", 40, 2, decoder_norms="private")
        body = make_encoder("resnet50", 2, Exchange())
    norm = 2 * 2  # parameters per channel
    point = 2048 * 256 + 256 * norm

    def separable(channels: int) -> int:
        return channels * (9 + norm) + 256 * (channels + norm)

    pyramid = 2 * point + 3 * separable(2048) + 5 * 256 * 256 + 256 * norm
    decoder = 48 * (256 + norm) + separable(304) + separable(256) + 257 * 40
    count = sum(p.numel() for p in net.parameters())
    assert count == sum(p.numel() for p in body.parameters()) + pyramid + decoder + 2


def norm_relu(norm: ExchangeNorm, y: Tensor) -> Tensor:
    """With running statistics, modality by modality where it is private."""
    parts = []
    for m, rows in enumerate(y.chunk(norm.num_modalities)):
        tables = (t[m, :, None, None] for t in (norm.weight, norm.running_mean, norm.running_var, norm.bias))
        weight, mean, var, bias = tables
        parts.append((weight * (rows - mean) / (var + 1e-5).sqrt() + bias).clamp(min=0))
    return torch.cat(parts)


def point(conv: torch.nn.Conv2d, norm: ExchangeNorm, x: Tensor) -> Tensor:
    return norm_relu(norm, torch.einsum("kc,nchw->nkhw", conv.weight[:, :, 0, 0], x))


def separable(conv: torch.nn.Module, x: Tensor, rate: int = 1) -> Tensor:
    padded, (h, w) = F.pad(x, [rate] * 4), x.shape[-2:]
    taps = [
        conv.conv_dw.weight[:, 0, i, j, None, None]
        * padded[..., i * rate : i * rate + h, j * rate : j * rate + w]
        for i in range(3)
        for j in range(3)
    ]
    return point(conv.conv_pw, conv.bn_pw, norm_relu(conv.bn_dw, sum(taps)))


@pytest.mark.parametrize(("norms", "output_stride"), [("shared", 16), ("private", 8)])
def test_the_decoders_formula(norms: str, output_stride: int) -> None:
    net = small_net(decoder_norms=norms, output_stride=output_stride).eval()
    decoder: DeepLabDecoder = net.decoder
    low, high = (torch.randn(4, *shape, dtype=torch.float64) for shape in ((12, 17, 25), (32, 5, 7)))
    pyramid = decoder.pyramid
    mean = high.flatten(2).mean(2)[:, :, None, None]
    rates = [6, 12, 18] if output_stride == 16 else [12, 24, 36]
    parts = [point(pyramid.point.conv, pyramid.point.norm, high)]
    parts += [separable(conv, high, rate) for conv, rate in zip(pyramid.atrous, rates, strict=True)]
    parts += [point(pyramid.pool.conv, pyramid.pool.norm, mean).expand_as(parts[0])]
    merged = point(pyramid.merge.conv, pyramid.merge.norm, torch.cat(parts, 1))
    large = F.interpolate(merged, (17, 25), mode="bilinear", align_corners=True)
    y = torch.cat([large, point(decoder.reduce.conv, decoder.reduce.norm, low)], 1)
    for conv in decoder.refine:
        y = separable(conv, y)
    logits = torch.einsum("kc,nchw->nkhw", decoder.classifier.weight[:, :, 0, 0], y)
    with torch.no_grad():
        found = decoder([low, low, low, high])
    torch.testing.assert_close(found, (logits + decoder.classifier.bias[:, None, None]).detach())


@pytest.mark.parametrize("num_modalities", [1, 2, 3])
@pytest.mark.parametrize("encoder", ["small_xception", "resnet18"])
def test_branches_and_ensemble_at_a_quarter(num_modalities: int, encoder: str) -> None:
    net = small_net(num_modalities, encoder).eval()
    torch.nn.init.normal_(net.alpha)
    x = images(num_modalities)
    with torch.no_grad():
        out = net(list(x.chunk(num_modalities)))
        assert type(out) is SegmentationOutput
        assert out.branches.shape == (num_modalities, 2, 5, 17, 13)
        features = net.encoder(x)
        assert features[3].shape[-2:] == (5, 4)
        assert torch.equal(out.branches.flatten(0, 1), net.decoder(features))
    weights = torch.exp(net.alpha) / torch.exp(net.alpha).sum()
    torch.testing.assert_close(out.ensemble, torch.einsum("m,mnkhw->nkhw", weights, out.branches).detach())


@pytest.mark.parametrize("encoder", ["xception65", "xception71", "resnet50"])
def test_low_level_feature_of_256_channels(encoder: str) -> None:
    with torch.device("meta"):
        net = models.deeplabv3plus(encoder, output_stride=8)
        shapes = [feature.shape for feature in net.encoder(torch.empty(2, 3, 64, 96))]
    assert (shapes[0], shapes[3]) == ((2, 256, 16, 24), (2, 2048, 8, 12))
    assert [conv.conv_dw.dilation[0] for conv in net.decoder.pyramid.atrous] == [12, 24, 36]


@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_trains(recompute: bool) -> None:
    net = small_net().train()
    x = images()
    with recompute_outputs() if recompute else nullcontext():
        out = net(x)
    (out.branches.square().sum() + out.ensemble.square().sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_norms_of_the_decoder_are_private_or_shared_and_do_not_exchange() -> None:
    """With batch statistics, a branch depends on the other modality by shared norms and by the exchange."""
    x = images()
    changed = torch.cat([x[:2], x[2:] + 1])

    def depends(training: bool, **options: object) -> bool:
        net = small_net(**options).train(training)
        with torch.no_grad():
            return not torch.equal(net(x).branches[0], net(changed).branches[0])

    assert not depends(True, decoder_norms="private", threshold=0.0)
    assert depends(True, decoder_norms="shared", threshold=0.0)
    assert not depends(False, decoder_norms="shared", threshold=0.0)
    assert depends(False, decoder_norms="shared", threshold=0.02)


@pytest.mark.parametrize(
    ("fusion", "branches"),
    [
        (Average(stages=(4,), setting="separate"), 1),
        (Average(stages=(1, 3)), 2),
        (Align(), 2),
        (LateConcat(), 2),
    ],
    ids=lambda value: value.name if isinstance(value, Fusion) else None,
)
def test_fusions(fusion: Fusion, branches: int) -> None:
    net = small_net(fusion=fusion).train()
    out = net(images())
    assert out.branches.shape == (branches, 2, 5, 17, 13)
    loss = fusion.loss(net)
    total = out.branches.square().sum() + out.ensemble.square().sum() + (0 if loss is None else loss)
    total.backward()
    unused = {key for key, p in net.named_parameters() if p.grad is None}
    assert not unused - {"alpha"}


def test_equal_modalities_fused_by_their_mean_give_the_single_modalitys_logits() -> None:
    """Also where a stage ends within a block: the skip around it is the mean of equals."""
    single = small_net(1, fusion="none").eval()
    x = images(1)
    with torch.no_grad():
        expected = single(x).branches[0]
        for stages in ((1,), (2,), (3, 4)):
            net = small_net(2, fusion=Average(stages=stages, setting="separate")).eval()
            net.load_state_dict(
                {
                    key: value[0] if key.startswith("encoder.") and value.dim() == 2 else value
                    for key, value in single.state_dict().items()
                }
            )
            torch.testing.assert_close(net(torch.cat([x, x])).branches[0], expected)


def test_a_batch_of_one() -> None:
    """The image mean's norm needs two values: shared by two modalities, it has them."""
    with pytest.raises(ValueError, match="more than one value per channel is needed in training"):
        small_net(1).train()(images(1)[:1])
    with pytest.raises(ValueError, match="more than one value per channel is needed in training"):
        small_net(2, decoder_norms="private").train()(images(1))
    assert small_net(2).train()(images(1)).ensemble.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder must be one of .*; did you mean 'xception65'\?"):
        models.deeplabv3plus("xception_65")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        models.deeplabv3plus(num_classes=0)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        models.deeplabv3plus(width=0)
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 32"):
        models.deeplabv3plus(output_stride=32)
    with pytest.raises(ValueError, match="decoder_norms must be 'shared' or 'private', got 'own'"):
        small_net(decoder_norms="own")
    with pytest.raises(ValueError, match=r"decoder_norms must be 'private' where .*, got 'shared'"):
        small_net(fusion=NoFusion(convolutions="private"))
    assert small_net(fusion=NoFusion(convolutions="private"), decoder_norms="private").num_branches == 2
    with pytest.raises(ValueError, match=r"fused_on must be first where .* stages \(1, 4\) alone, got none"):
        small_net(fusion="mmf")
    with pytest.raises(ValueError, match="'plain_net' has no dilated form, whose features end at 1/16"):
        models.deeplabv3plus("plain_net")
