"""transformers' SegFormer through make_multimodal: copies of the original, and a training on real images."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from cen_ext import ExchangeLayerNorm, exchanging_layers
from tests.helpers import vision  # noqa: F401  (before transformers, which imports torchvision)
from tests.helpers.converted import assert_equals_copies, with_history

pytestmark = pytest.mark.peers

TINY = {
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
WITHOUT_CHANCE = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return importlib.import_module("examples.segformer")


class Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


@pytest.mark.parametrize("training", [True, False])
def test_without_exchange_every_modality_gets_the_original(example: ModuleType, training: bool) -> None:
    config = example.SegformerConfig(num_labels=5, **TINY, **WITHOUT_CHANCE)
    net = with_history(Logits(example.SegformerForSemanticSegmentation(config))).train(training)
    assert_equals_copies(net, list(torch.randn(2, 2, 3, 64, 96, dtype=torch.float64)))


def test_it_trains_on_nyudv2_while_channels_are_exchanged(example: ModuleType, shared: Path) -> None:
    torch.manual_seed(0)
    net = example.segformer(40, **TINY, **WITHOUT_CHANCE).train()
    layers = exchanging_layers(net)
    assert len(layers) == 2 * sum(TINY["depths"])
    assert all(isinstance(layer, ExchangeLayerNorm) for layer in layers.values())
    for layer in layers.values():
        nn.init.uniform_(layer.weight, 0.0, 1.0)
    losses = example.train(net, shared / "data" / "nyudv2_384", steps=60, crop=96, rate=5e-3)
    assert any(layer.replaced().any() for layer in layers.values())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
