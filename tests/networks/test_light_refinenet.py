"""Light-Weight RefineNet: the paper's sizes, its formula, and its place among the recipe's networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
import models.recipes
from models.networks.decoders.light_refinenet import LightRefineNetDecoder
from models.segmentation.build import build_network
from models.training import config, registry

# Nekrasov et al. 2018, Table 2: millions of parameters with 21 classes.
PARAMETERS = {"resnet50": 27, "resnet101": 46, "resnet152": 62}


@pytest.mark.parametrize("encoder", PARAMETERS)
def test_parameter_counts_are_the_papers(encoder: str) -> None:
    with torch.device("meta"):
        net = models.light_refinenet(encoder, 21, 1)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == PARAMETERS[encoder]


def pooled(x: Tensor, weights: list[Tensor]) -> Tensor:
    total = link = x
    for weight in weights:
        link = torch.einsum("oc,nchw->nohw", weight[:, :, 0, 0], F.max_pool2d(link, 5, 1, 2))
        total = total + link
    return total


def test_decoder_is_the_formula() -> None:
    decoder = LightRefineNetDecoder((3, 4, 5, 6), 7, width=4, dropout=0.5, init="kaiming").double().eval()
    sizes = ((9, 11), (5, 6), (3, 3), (2, 2))
    features = [torch.randn(2, c, *size).double() for c, size in zip((3, 4, 5, 6), sizes, strict=True)]
    x = None
    for level, feature in zip(decoder.cascades, features[::-1], strict=True):
        y = torch.einsum("oc,nchw->nohw", level.reduce.weight[:, :, 0, 0], feature)
        if x is not None:
            y = torch.einsum("oc,nchw->nohw", level.join.weight[:, :, 0, 0], y)
            y = y + F.interpolate(x, y.shape[-2:], mode="bilinear", align_corners=True)
        x = pooled(y.relu(), [conv.weight for conv in level.pool.convs])
        if level.project is not None:
            x = torch.einsum("oc,nchw->nohw", level.project.weight[:, :, 0, 0], x)
    expected = F.conv2d(x, decoder.classifier.weight, decoder.classifier.bias, padding=1)
    torch.testing.assert_close(decoder(features), expected)


def test_recipes_build_it() -> None:
    settings = ["model.network=light_refinenet", "model.width=8", "model.encoder=resnet18"]
    recipe = config.override(registry.find("synthetic_demo"), [*settings, "model.decoder_init=kaiming"])
    net = build_network(recipe)
    assert isinstance(net, models.LightRefineNet)
    out = net(torch.randn(4, 3, 64, 64))
    assert out.branches.shape == (2, 2, recipe.data.num_classes, 16, 16)


@pytest.mark.parametrize(
    ("options", "named"), [({"width": 0}, "width"), ({"decoder_init": "zeros"}, "decoder_init")]
)
def test_wrong_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        models.light_refinenet("resnet18", 5, 2, **options)
