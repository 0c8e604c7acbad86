"""What is seen of a channel whose scale is 0, against the derivative of the network itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cen_ext import ExchangeBatchNorm2d, ExchangeGroupNorm, ExchangeInstanceNorm2d, ExchangeLayerNorm
from cen_ext.modules import ExchangeNorm
from models.analysis.observation import ObservedNorm, Seen, observe
from models.analysis.theorem import centered_norm, gradient_norm, shuffled_moments
from models.networks.fusion import Exchange, FixedPortion, GatedSum, named_exchange_points
from models.networks.fusion.base import mark
from models.networks.systems.unet import unet
from models.training.errors import UsageError

DOUBLE = torch.float64
SHAPE = (6, 8, 5, 4)  # [M*N, C, H, W], M = 2


def layers() -> dict[str, ExchangeNorm]:
    frozen = ExchangeBatchNorm2d(8, 2, activation="relu", dtype=DOUBLE).eval()
    frozen.running_mean.normal_()  # type: ignore[union-attr]
    return {
        "batch": ExchangeBatchNorm2d(8, 2, threshold=0.5, activation="relu", dtype=DOUBLE),
        "frozen": frozen,
        "instance": ExchangeInstanceNorm2d(8, 2, activation="leaky_relu", dtype=DOUBLE),
        "layer": ExchangeLayerNorm(8, 2, channel_dim=1, activation="gelu", dtype=DOUBLE),
        "layer, channels last": ExchangeLayerNorm(8, 2, dtype=DOUBLE),
        "group": ExchangeGroupNorm(2, 8, 2, dtype=DOUBLE),
    }


class Around(nn.Module):
    """A norm with a residual, and more on both of its sides."""

    def __init__(self, norm: ExchangeNorm) -> None:
        super().__init__()
        self.norm = mark(norm)
        for table in (norm.weight, norm.bias):
            nn.init.normal_(table.parameter)

    def forward(self, x: Tensor) -> Tensor:
        last = getattr(self.norm, "channel_dim", 1) == -1
        x = x.movedim(1, -1).contiguous() if last else x
        return self.norm(x.sin(), residual=x).tanh().square().sum()


@pytest.mark.parametrize("name", list(layers()))
def test_gradients_of_zeroed_scales(name: str) -> None:
    net = Around(layers()[name])
    x = torch.randn(SHAPE, dtype=DOUBLE)
    plain = copy.deepcopy(net)
    plain.norm.threshold = 0.0
    zeroed = {0: 5, 1: 2}
    with torch.no_grad():
        for m, channel in zeroed.items():
            plain.norm.weight[m, channel] = 0
    expected = plain(x)
    expected.backward()
    observed = observe(net)["norm"]
    observed.zeroed = zeroed
    loss = net(x)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for m, channel in zeroed.items():
        torch.testing.assert_close(observed.seen[m].gradient, plain.norm.weight.grad[m, channel])
    assert observed.normalizes_itself == (name in ("batch", "instance"))


@pytest.mark.parametrize("name", ["batch", "frozen", "instance"])
def test_what_it_is_compared_with(name: str) -> None:
    """By the definition: the elements of the channel, one by one."""
    observed = ObservedNorm(layers()[name])
    observed.zeroed = {1: 3}
    x, factor = torch.randn(SHAPE, dtype=DOUBLE), torch.randn(SHAPE, dtype=DOUBLE)
    (observed.forward(x, residual=x.abs() + 9) * factor).sum().backward()  # above all kinks
    gradient, own = factor[3:, 3].flatten(1), x[3:, 3].flatten(1)
    if name != "instance":
        gradient, own = gradient.reshape(1, -1), own.reshape(1, -1)
    if name == "frozen":
        layer = observed.layer
        assert isinstance(layer, ExchangeBatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        xhat = (own - layer.running_mean[1, 3]) / (layer.running_var[1, 3] + layer.eps).sqrt()
    else:
        xhat = (own - own.mean(1, keepdim=True)) / (own.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    seen = observed.seen[1]
    torch.testing.assert_close(seen.gradient, (gradient * xhat).sum())
    torch.testing.assert_close(seen.norm, gradient_norm(gradient))
    torch.testing.assert_close(seen.centered, centered_norm(gradient))
    torch.testing.assert_close(torch.stack(seen[4:]), torch.stack(shuffled_moments(gradient, xhat)))
    assert Seen._fields[4:] == ("mean", "deviation")
    assert abs(float((seen.shuffled - seen.mean) / seen.deviation)) < 5


def test_a_network_exchanges_nothing_when_observed() -> None:
    net = unet(num_modalities=2, size=32, base_width=4, dropout=0.0, fusion=Exchange(threshold=2.0))
    x = torch.randn(4, 3, 32, 32)
    exchanging = net(x).branches
    for point in named_exchange_points(net).values():
        point.threshold = 0.0
    expected = net(x).branches
    assert not torch.allclose(exchanging, expected)
    observe(net)
    torch.testing.assert_close(net(x).branches, expected)


@pytest.mark.parametrize("fusion", [GatedSum(), FixedPortion(), "late"])
def test_refusals(fusion: GatedSum | FixedPortion | str) -> None:
    if fusion == "late":
        with pytest.raises(UsageError, match="no norms at which the paper's exchanges"):
            observe(nn.Conv2d(1, 1, 1))
        return
    net = unet(num_modalities=2, size=32, base_width=4, fusion=fusion)
    with pytest.raises(UsageError, match="does more than to exchange channels by a threshold"):
        observe(net)
