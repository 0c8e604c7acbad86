"""timm's networks of layer and group norms as encoders: where they exchange, and that they are timm's."""

from __future__ import annotations

import copy
import fnmatch
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from cen_ext import ExchangeLayerNorm, exchanging_layers, sparsity_penalty
from models.data import SegmentationSet, TrainTransform, train_loader
from models.fusion import ConditionalNorm, Discard, Exchange, Fusion
from models.networks.encoders import TimmEncoder, make_encoder
from tests.helpers import vision
from tests.helpers.converted import NORMS, make_different, with_history

# name -> its exchange points, as patterns; how many they are
POINTS = {
    "convnext_atto": (["stages_?.blocks.*.norm"], 12),
    "mobilevit_xxs": (["*.conv_kxk.bn", "*.conv2_kxk.bn", "*.transformer.?.norm?", "*.conv_fusion.bn"], 31),
    "mvitv2_tiny": (["model.stages.?.blocks.?.norm?"], 20),
    "pvt_v2_b0": (["stages_?.blocks.?.norm?"], 16),
    "resnet50_gn": (["layer?.?.bn2"], 16),
    "swin_tiny_patch4_window7_224": (["layers_?.blocks.?.norm?"], 24),
    "test_efficientnet_ln": (["blocks.0.0.bn1", "blocks.?.0.bn?"], 5),
}
# Of these, copies are compared.
COMPARED = ["convnext_atto", "resnet50_gn", "swin_tiny_patch4_window7_224"]


def encoder(name: str, fusion: Fusion | None = None) -> TimmEncoder:
    vision.timm()
    return make_encoder(f"timm:{name}", 2, fusion or Exchange())


def without_chance(net: nn.Module) -> nn.Module:
    """The network without stochastic depth, whose layers begin with scales of which something can be seen."""
    for layer in net.modules():
        if hasattr(layer, "drop_prob"):
            layer.drop_prob = 0.0
        if isinstance(getattr(layer, "gamma", None), nn.Parameter):  # ConvNeXt's, which begins at 1e-6
            nn.init.uniform_(layer.gamma, 0.5, 1)
    return net


@pytest.mark.parametrize("name", POINTS)
def test_blocks_exchange_and_stems_do_not(name: str) -> None:
    patterns, count = POINTS[name]
    with torch.device("meta"):
        net = encoder(name)
        features = net(torch.empty(2, 3, 64, 96))
    points = list(exchanging_layers(net.network))
    assert len(points) == count
    assert all(any(fnmatch.fnmatchcase(point, pattern) for pattern in patterns) for point in points), points
    assert [feature.shape for feature in features] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(net.channels, net.strides, strict=True)
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", COMPARED)
def test_without_exchange_every_modality_gets_timms_features(name: str, training: bool) -> None:
    timm = vision.timm()
    ours = without_chance(encoder(name, Exchange(threshold=0))).double().train(training)
    options = {"strict_img_size": False} if "swin" in name else {}
    single = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **options)
    single = with_history(without_chance(single)).train(training)
    ours.network.load_state_dict(single.state_dict())
    theirs = [copy.deepcopy(single) for _ in range(2)]
    make_different(ours.network, theirs)
    parts = list(torch.randn(2, 1, 3, 64, 96, dtype=torch.float64))
    features = ours(parts)
    gradients = [torch.randn_like(feature) for feature in features]
    torch.autograd.backward(features, gradients)
    for m, copied in enumerate(theirs):
        expected = copied(parts[m])
        if "swin" in name:
            expected = [feature.permute(0, 3, 1, 2) for feature in expected]
        for feature, other in zip(features, expected, strict=True):
            torch.testing.assert_close(feature.chunk(2)[m], other)
        torch.autograd.backward(expected, [gradient.chunk(2)[m] for gradient in gradients])
    for key, layer in single.named_modules():
        if isinstance(layer, NORMS):
            both = torch.stack([copied.get_submodule(key).weight.grad for copied in theirs])
            torch.testing.assert_close(ours.network.get_submodule(key).weight.grad, both)
    shared = ours.stem_weights[0]
    total = sum(dict(copied.named_parameters())[shared.removeprefix("network.")].grad for copied in theirs)
    torch.testing.assert_close(dict(ours.named_parameters())[shared].grad, total)


def test_stages_of_a_network_with_channels_last_take_fusions() -> None:
    """Swin computes ``[N, h, w, C]``, and fusions take ``[N, C, h, w]``."""
    vision.timm()
    with torch.device("meta"):
        net = models.refinenet("timm:swin_tiny_patch4_window7_224", 5, fusion="concat", width=16)
        out = net(torch.empty(2, 3, 64, 96))
    assert out.ensemble.shape[:2] == (1, 5)


@pytest.mark.parametrize("fusion", [Discard(), ConditionalNorm()], ids=lambda fusion: fusion.name)
def test_fusions_of_batch_norms_are_refused(fusion: Fusion) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=rf"fusion={fusion.name} needs a network of batch"),
    ):
        encoder("swin_tiny_patch4_window7_224", fusion)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_transformer_trains_on_nyudv2(name: str, shared: Path) -> None:
    """Real images of two modalities: with channels exchanged, the loss on them falls."""
    vision.timm()
    torch.manual_seed(0)
    data = SegmentationSet(shared / "data" / "nyudv2_384", "train", num_classes=40)
    loader = train_loader(data, TrainTransform(crop=96, shorter_side=144), batch_size=2, seed=0)
    net = models.refinenet(f"timm:{name}", 40, threshold=0.02, width=32, dropout=0.0).train()
    layers = exchanging_layers(net)
    assert all(isinstance(layer, ExchangeLayerNorm) for layer in layers.values())
    for layer in layers.values():
        nn.init.uniform_(layer.weight, 0.0, 0.2)  # some below the threshold, as a long training leaves them
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    batch = next(iter(loader))
    losses = []
    for _ in range(8):
        out = net(batch.images)
        loss = sum(loss_of(logits, batch.target) for logits in (*out.branches, out.ensemble))
        (loss + 1e-4 * sparsity_penalty(net)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(int(layer.replaced().sum()) for layer in layers.values()) > 50
    assert losses[-1] < 0.8 * losses[0]


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    logits = nn.functional.interpolate(logits, size=target.shape[-2:], mode="bilinear")
    return nn.functional.cross_entropy(logits, target, ignore_index=255)
