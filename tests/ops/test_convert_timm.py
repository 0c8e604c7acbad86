"""make_multimodal on timm's families, random weights: what test_convert asks of small networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cen_ext import exchanging_layers, make_multimodal
from tests.helpers import vision
from tests.helpers.converted import assert_equals_copies, assert_equals_exchange_by_hand, with_history

FAMILIES = (
    "convnextv2_atto",
    "cspresnet50",
    "densenet121",
    "dla34",
    "dpn48b",
    "efficientnet_b0",
    "efficientnet_lite0",
    "ghostnet_100",
    "hrnet_w18_small",
    "mixnet_s",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "regnety_002",
    "res2net50_26w_4s",
    "resnest14d",
    "resnet18",
    "tf_efficientnet_cc_b0_4e",
    "vgg11_bn",
    "xception41",
)


class Features(nn.Module):
    """All features of a network side by side: ``[N, everything]``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = vision.timm().create_model(name, features_only=True, pretrained=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([feature.flatten(1) for feature in self.net(x)], 1)


@pytest.mark.peers  # tests/peers has a handful of whole networks in the main suite
@pytest.mark.filterwarnings("ignore:norms without an exchange version")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_exchange_every_modality_gets_the_original(name: str, training: bool) -> None:
    net = with_history(Features(name)).train(training)
    assert_equals_copies(net, list(torch.randn(2, 2, 3, 64, 64, dtype=torch.float64)))


@pytest.mark.parametrize("name", ["cspresnet50", "efficientnet_lite0", "mobilenetv3_small_100", "resnet18"])
def test_with_exchange_it_is_the_original_with_an_exchange_made_by_hand(name: str) -> None:
    net = with_history(Features(name)).train()
    ours = make_multimodal(net, 2, threshold=0.3)
    for layer in exchanging_layers(ours).values():
        nn.init.uniform_(layer.weight, -1, 1)
    assert all(
        layer.replaced().any() for layer in exchanging_layers(ours).values() if layer.num_features > 32
    )
    assert_equals_exchange_by_hand(net, ours, torch.randn(4, 3, 64, 64, dtype=torch.float64))


def test_synchronised_norms_with_an_activation_are_converted() -> None:
    timm = vision.timm()
    net = timm.create_model("regnety_002", features_only=True, pretrained=False).eval()
    ours = make_multimodal(net, 2, 0)
    converted = make_multimodal(timm.layers.convert_sync_batchnorm(net), 2, 0).eval()
    x = torch.randn(2, 3, 64, 64)
    for feature, expected in zip(converted(x), ours(x), strict=True):
        assert torch.equal(feature, expected)
