"""The contract of an encoder as a test that a new one inherits."""

from __future__ import annotations

import pytest
import torch

from cen_ext import ExchangeBatchNorm2d
from cen_ext.modules import ExchangeNorm
from examples.own_fusion import ConcatOnce
from models.networks.encoders import make_encoder
from models.networks.fusion import Exchange, NoFusion, exchange_points
from tests.helpers.networks import randomise_norms


def check_encoder(name: str, size: int = 64, *, has_stages: bool = True) -> None:
    """Build the encoder of that name and hold it to what decoders and fusions need of one.

    Args:
        size: of the images.
        has_stages: whether fusions can act after its stages; without, it is to refuse those that do.
    """
    torch.manual_seed(0)
    encoder = make_encoder(name, 2, NoFusion(), frozen_statistics=False).double()
    randomise_norms(encoder)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    assert len(encoder.channels) == len(encoder.strides) == 4
    assert encoder.stem_weights
    assert all(name in encoder.state_dict() for name in encoder.stem_weights)
    features = encoder.eval()(x)
    for feature, channels, stride in zip(features, encoder.channels, encoder.strides, strict=True):
        assert feature.shape == (4, channels, size // stride, size // stride)

    # Without exchange no modality sees another, in training either.
    for mode in (False, True):
        encoder.train(mode)
        moved = torch.cat([x[:2], 2 * x[2:]])
        for one, other in zip(encoder(x), encoder(moved), strict=True):
            torch.testing.assert_close(one[:2], other[:2])
            assert not torch.equal(one[2:], other[2:])

    frozen = make_encoder(name, 2, NoFusion(), frozen_statistics=True).train()
    norms = [module for module in frozen.modules() if isinstance(module, ExchangeNorm)]
    assert norms
    # Others have no statistics to freeze.
    assert not any(norm.training for norm in norms if isinstance(norm, ExchangeBatchNorm2d))

    # Where the fusion replaces every channel of its own share, modalities meet.
    exchanging = make_encoder(name, 2, Exchange(threshold=1e9), frozen_statistics=False).double().eval()
    assert list(exchange_points(exchanging))
    exchanging.load_state_dict(encoder.state_dict())
    assert any(
        not torch.equal(one[:2], other[:2])
        for one, other in zip(exchanging(x), exchanging(moved), strict=True)
    )

    # A fusion after a stage leaves one stream for the next ones, and one feature each for the decoder.
    if not has_stages:
        with pytest.raises(ValueError, match="cannot serve ConcatOnce"):
            make_encoder(name, 2, ConcatOnce(stage=2))
        return
    joining = make_encoder(name, 2, ConcatOnce(stage=2), frozen_statistics=False).double()
    joining.fusion_stages["2"].reduce.weight.data.normal_()
    for mode in (False, True):
        features = joining.train(mode)(x)
        assert [len(feature) for feature in features] == [2, 2, 2, 2]
        for stage, (one, other) in enumerate(zip(features, joining(moved), strict=True), 1):
            assert torch.equal(one, other) is (stage < 2)
