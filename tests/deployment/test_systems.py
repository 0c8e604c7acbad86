"""Systems are pruned, too: their norms become part of their convolutions."""

from __future__ import annotations

import pytest
import torch

from cen_ext.modules import ExchangeNorm
from models.deployment import prune
from models.networks.systems import make_system
from tests.helpers.networks import randomise_norms


@pytest.mark.parametrize(
    ("name", "channels", "kept"),
    [("acnet", (3, 1), 0), ("adapnetpp", (3,), 19), ("rdfnet", (3, 3), 0), ("gnn3d", (3, 3), 0)],
)
def test_norms_are_folded(name: str, channels: tuple[int, ...], kept: int) -> None:
    """``prune`` itself compares the outputs. Norms of inputs, sums and side outputs stay as they are."""
    net = make_system(name, 5, channels).eval()
    randomise_norms(net)
    x = torch.randn(len(channels), 3, 64, 96)
    pruned = prune(net, x).net
    norms = [module for module in pruned.modules() if isinstance(module, ExchangeNorm)]
    assert len(norms) == kept
