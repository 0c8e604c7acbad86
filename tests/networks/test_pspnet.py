"""PSPNet: size, dilated encoder, the heads' formulas and private norms, auxiliary logits, memory formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from models.networks.decoders.pspnet import ConvNorm, PyramidHead
from models.networks.encoders import ExchangeResNet
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from tests.helpers.networks import randomise_norms

# Millions of parameters, 40 classes, with and without the auxiliary head: one modality and two.
PARAMETERS = {
    ("resnet50", 1): (48.97, 46.60),
    ("resnet50", 2): (49.03, 46.66),
    ("resnet101", 1): (67.96, 65.59),
    ("resnet101", 2): (68.08, 65.70),
    ("resnet152", 1): (83.61, 81.24),
    ("resnet152", 2): (83.77, 81.39),
}


def small_net(num_modalities: int = 2, **options: object) -> models.PSPNet:
    net = models.pspnet("resnet18", 5, num_modalities, width=8, **options).double()
    randomise_norms(net)
    torch.nn.init.normal_(net.alpha)
    return net


def images(num_modalities: int = 2) -> Tensor:
    return torch.randn(num_modalities * 2, 3, 49, 65, dtype=torch.float64)


@pytest.mark.parametrize(("encoder", "num_modalities"), PARAMETERS)
def test_parameter_counts(encoder: str, num_modalities: int) -> None:
    with torch.device("meta"):
        net = models.pspnet(encoder, 40, num_modalities)
        body = ExchangeResNet(encoder, num_modalities)
    count = sum(p.numel() for p in net.parameters())
    auxiliary = sum(p.numel() for p in net.auxiliary.parameters())
    found = tuple(round(n / 1e6, 2) for n in (count, count - auxiliary))
    assert found == PARAMETERS[encoder, num_modalities]
    norm = 2 * num_modalities  # parameters per channel
    level = 2048 * 512 + 512 * norm
    merge = 9 * 4096 * 512 + 512 * norm
    heads = 4 * level + merge + 513 * 40 + (9 * 1024 * 256 + 256 * norm + 257 * 40)
    assert count == sum(p.numel() for p in body.parameters()) + heads + num_modalities


@pytest.mark.parametrize(
    ("name", "form", "steps"),
    [
        ("resnet18", {"dilated": True}, (1, 1, 2, 4)),
        ("resnet50", {"output_stride": 8}, (1, 1, 2, 4)),
        ("resnet18", {"output_stride": 16}, (1, 1, 1, 2)),
    ],
)
def test_dilation_computes_the_strided_features_in_between_as_well(
    name: str, form: dict[str, int], steps: tuple[int, ...]
) -> None:
    strided = ExchangeResNet(name, 2).double().eval()
    dilated = ExchangeResNet(name, 2, **form).double().eval()
    randomise_norms(strided)
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(2, 3, 97, 70, dtype=torch.float64)
    with torch.no_grad():
        expected, found = strided(x), dilated(x)
    for feature, dense, step in zip(expected, found, steps, strict=True):
        torch.testing.assert_close(dense[..., ::step, ::step], feature)
    assert found[3].shape[-2:] == ((13, 9) if steps[3] == 4 else (7, 5))


def conv_norm_relu(layer: ConvNorm, x: Tensor, num_modalities: int) -> Tensor:
    """Of stacked x with running statistics, modality by modality."""
    y, norm = F.conv2d(x, layer.conv.weight, padding=layer.conv.padding), layer.norm
    parts = []
    for m, rows in enumerate(y.chunk(num_modalities)):
        tables = (t[m, :, None, None] for t in (norm.weight, norm.running_mean, norm.running_var, norm.bias))
        weight, mean, var, bias = tables
        parts.append((weight * (rows - mean) / (var + 1e-5).sqrt() + bias).clamp(min=0))
    return torch.cat(parts)


def stretched(x: Tensor, size: int) -> Tensor:
    """The last axis, linearly, ends on ends."""
    if x.shape[-1] == 1:
        return x.expand(*x.shape[:-1], size)
    places = torch.arange(size, dtype=x.dtype) * (x.shape[-1] - 1) / (size - 1)
    low = places.floor().clamp(max=x.shape[-1] - 2).long()
    part = places - low
    return (1 - part) * x[..., low] + part * x[..., low + 1]


def test_the_heads_formula() -> None:
    """Averages over ceil/floor-bounded regions, reduced, stretched, concatenated, merged, classified."""
    net = small_net(2).eval()
    head: PyramidHead = net.decoder
    x = torch.randn(4, 512, 9, 11, dtype=torch.float64)
    parts = [x]
    for bins, level in zip((1, 2, 3, 6), head.pyramid, strict=True):
        rows = [slice(i * 9 // bins, -(-(i + 1) * 9 // bins)) for i in range(bins)]
        columns = [slice(i * 11 // bins, -(-(i + 1) * 11 // bins)) for i in range(bins)]
        means = torch.stack([torch.stack([x[:, :, r, c].mean((2, 3)) for c in columns], 2) for r in rows], 2)
        y = stretched(conv_norm_relu(level, means, 2), 11)
        parts.append(stretched(y.transpose(2, 3), 9).transpose(2, 3))
    merged = conv_norm_relu(head.merge, torch.cat(parts, 1), 2)
    logits = torch.einsum("kc,nchw->nkhw", head.classifier.weight[:, :, 0, 0], merged)
    with torch.no_grad():
        found = head([x, x, x, x])
        auxiliary = net.auxiliary([x, x, x[:, :256], x])
    torch.testing.assert_close(found, (logits + head.classifier.bias[:, None, None]).detach())
    reduced = conv_norm_relu(net.auxiliary.reduce, x[:, :256], 2)
    torch.testing.assert_close(auxiliary, net.auxiliary.classifier(reduced).detach())


@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_ensemble_and_auxiliary_logits(num_modalities: int) -> None:
    net = small_net(num_modalities, dropout=0.0)
    x = images(num_modalities)
    with torch.no_grad():
        out = net.eval()(list(x.chunk(num_modalities)))
        assert type(out) is SegmentationOutput
        assert out.auxiliary == ()
        assert out.branches.shape == (num_modalities, 2, 5, 7, 9)
        stacked = net.decoder(net.encoder(x))
        assert torch.equal(out.branches.flatten(0, 1), stacked)
        weights = torch.exp(net.alpha) / torch.exp(net.alpha).sum()
        torch.testing.assert_close(out.alpha, weights)
        torch.testing.assert_close(out.ensemble, torch.einsum("m,mnkhw->nkhw", weights, out.branches))
        trained = net.train()(x)
        assert type(trained) is AuxiliaryOutput
        features = net.encoder(x)
        assert torch.equal(trained.auxiliary[0].flatten(0, 1), net.auxiliary(features))
        assert torch.equal(trained.branches.flatten(0, 1), net.decoder(features))


def test_every_parameter_trains() -> None:
    net = small_net(dropout=0.0).train()
    out = net(images())
    (out.branches.square().sum() + out.ensemble.square().sum() + out.auxiliary[0].square().sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_without_an_auxiliary_head() -> None:
    net = small_net(aux=False).train()
    assert type(net(images())) is SegmentationOutput
    assert not any(name.startswith("auxiliary") for name in net.state_dict())


def test_the_heads_norms_are_private_and_do_not_exchange() -> None:
    """With batch statistics too, a branch depends on the other modality by the encoder's exchange alone."""
    x = images()
    changed = x.clone()
    changed[2:] += 1
    net = small_net(dropout=0.0, threshold=0.0, frozen_statistics=False).train()
    with torch.no_grad():
        assert torch.equal(net(x).branches[0], net(changed).branches[0])
        assert torch.equal(net(x).auxiliary[0][0], net(changed).auxiliary[0][0])
        net = small_net(dropout=0.0, threshold=0.02, frozen_statistics=False).train()
        assert not torch.equal(net(x).branches[0], net(changed).branches[0])


def test_heads_use_batch_statistics_where_the_encoder_does_not() -> None:
    net = small_net(dropout=0.0).train()
    x = images()
    before = net.encoder.bn1.running_mean.clone()
    norm = net.decoder.merge.norm
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    old = norm.running_mean.clone()
    net(x)
    means = seen[0].unflatten(0, (2, 2)).mean((1, 3, 4))
    torch.testing.assert_close(norm.running_mean, 0.9 * old + 0.1 * means)
    assert torch.equal(net.encoder.bn1.running_mean, before)


def test_channels_last_changes_nothing_but_rounding() -> None:
    net = small_net(dropout=0.0).train()
    x = images()

    def outputs_and_gradients(x: Tensor) -> list[Tensor]:
        net.zero_grad()
        out = net(x)
        (out.branches.square().sum() + out.ensemble.sum() + out.auxiliary[0].square().sum()).backward()
        outputs = (out.branches, out.ensemble, out.alpha, *out.auxiliary)
        return [*(t.detach() for t in outputs), *(p.grad.clone() for p in net.parameters())]

    expected = outputs_and_gradients(x)
    net.to(memory_format=torch.channels_last)
    found = outputs_and_gradients(x.to(memory_format=torch.channels_last))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9 * other.abs().max().item())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder must be one of .*; did you mean 'resnet50'\?"):
        models.pspnet("resnet-50")
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        models.pspnet("resnet18", 0)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        models.pspnet("resnet18", width=0)
    with pytest.raises(ValueError, match="dropout"):
        models.pspnet("resnet18", dropout=2.0)
    with pytest.raises(ValueError, match="more than one value per channel is needed in training"):
        small_net(1).train()(images(1)[:1])
    with pytest.raises(ValueError, match=r"net must be as the released networks are, a RefineNet .*a PSPNet"):
        models.load_released(small_net(), {})
