"""make_multimodal on public networks: each equals copies of the original, or is refused by name.

``make peers`` runs all of them; a handful is in the main suite, where their libraries are installed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cen_ext import conversion_report, make_multimodal
from tests.helpers.converted import assert_equals_copies, with_history
from tests.peers.networks import MONAI, TIMM, TORCHVISION, Row, monai_row, prepared, timm_row, torchvision_row

# What the message says of those that are not converted: they have no norm, or none but such that stay shared.
REFUSED = {
    "eca_nfnet_l0": "cannot exchange: ScaledStdConv2d",
    "ese_vovnet39b_evos": "cannot exchange: EvoNorm2dS0",
    "nf_ecaresnet26": "cannot exchange: ScaledStdConv2d",
    "nf_regnet_b0": "cannot exchange: ScaledStdConv2d",
    "regnetz_b16_evos": "cannot exchange: EvoNorm2dS0a",
    "resnetv2_50d_evos": "cannot exchange: EvoNorm2dS0",
    "resmlp_12_224": "module has no BatchNorm",
    "resnetv2_50d_frn": "cannot exchange: FilterResponseNormTlu2d",
    "squeezenet1_1": "module has no BatchNorm",
    "test_efficientnet_evos": "cannot exchange: EvoNorm2dS0",
    "test_nfnet": "cannot exchange: ScaledStdConv2d",
}
# Those that mix the rows of a batch without a norm. timm's attention here multiplies [N, positions] by its
# transpose: the rows attend to one another.
MIXING = {"csatv2": r"'net\.stages\.0\.0\.attn\.attn' \(SpatialTransformerBlock\)"}
HANDFUL = {"test_resnet", "test_efficientnet_gn", "mobilenet_v3_small", "BasicUNet", "SegResNet"}
ROWS: list[tuple[Callable[[str], Row], str]] = [
    *((timm_row, name) for name in TIMM),
    *((torchvision_row, name) for name in TORCHVISION),
    *((monai_row, name) for name in MONAI),
]
NETWORKS = [
    pytest.param(row, name, marks=() if name in HANDFUL else pytest.mark.peers, id=f"{row.__name__}-{name}")
    for row, name in ROWS
]


def norm_like(net: nn.Module) -> set[str]:
    """The layers that keep running statistics, or are called norms and have state of their own."""
    found = set()
    for name, layer in net.named_modules():
        state = {**layer._parameters, **layer._buffers}
        if "running_mean" in state or ("norm" in type(layer).__name__.lower() and state):
            found.add(name)
    return found


@pytest.mark.filterwarnings("ignore:norms without an exchange version", "ignore:norms stay shared")
@pytest.mark.parametrize(("make_row", "name"), NETWORKS)
def test_every_modality_gets_the_original(make_row, name):
    row = make_row(name)
    net = with_history(prepared(row))
    assert norm_like(net) <= {norm.name for norm in conversion_report(net).rows}
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            make_multimodal(net, 2)
        return
    if name in MIXING:
        with pytest.raises(ValueError, match=MIXING[name]):
            make_multimodal(net, 2, example=torch.randn(2, *row.size, dtype=torch.float64))
        return
    for training in (True, False):
        # Of two values alone, batch norm has next to no gradient, and rounding is all that is left of it.
        assert_equals_copies(net.train(training), list(torch.randn(2, 3, *row.size, dtype=torch.float64)))


def test_the_tables_are_long_enough():
    names = {name for _, name in ROWS}
    assert len(TIMM) >= 90
    assert names >= HANDFUL | REFUSED.keys() | MIXING.keys()
