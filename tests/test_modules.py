"""The layer and the penalty, against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, sparsity_penalty


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_exchange_it_is_one_batch_norm_a_modality(momentum):
    ours = ExchangeBatchNorm2d(5, 3, momentum=momentum, dtype=torch.float64)
    theirs = [nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        ours.weight.uniform_(-1, 1)
        ours.bias.uniform_(-1, 1)
        for m, layer in enumerate(theirs):
            layer.weight.copy_(ours.weight[m])
            layer.bias.copy_(ours.bias[m])
    for step in range(4):
        if step == 3:
            ours.eval()
            for layer in theirs:
                layer.eval()
        x = torch.randn(6, 5, 4, 3, dtype=torch.float64) * 3 + 1
        expected = torch.cat([layer(part) for layer, part in zip(theirs, x.chunk(3), strict=True)])
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    for m, layer in enumerate(theirs):
        torch.testing.assert_close(ours.running_mean[m], layer.running_mean)
        torch.testing.assert_close(ours.running_var[m], layer.running_var)
        assert ours.num_batches_tracked == layer.num_batches_tracked


def test_calls_that_update_nothing_do_not_count():
    layer = ExchangeBatchNorm2d(4, 2, momentum=None)
    layer(torch.randn(0, 4, 3, 3))
    with pytest.raises(ValueError, match="weight has 4 channels"):
        layer(torch.randn(2, 5, 3, 3))
    assert layer.num_batches_tracked == 0
    x = torch.randn(4, 4, 3, 3) + 5
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.view(2, 2, 4, 9).mean((1, 3)))


def test_without_tracking_eval_uses_the_batch():
    layer = ExchangeBatchNorm2d(4, 2, track_running_stats=False)
    x = torch.randn(4, 4, 3, 3)
    assert torch.equal(layer(x), layer.eval()(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_single_modality_checkpoint_loads_into_every_modality():
    source = nn.BatchNorm2d(4)
    nn.init.uniform_(source.weight)
    source(torch.randn(8, 4, 3, 3))
    layer = ExchangeBatchNorm2d(4, 3, threshold=0.02)
    layer.load_state_dict(source.state_dict())
    for m in range(3):
        assert torch.equal(layer.weight[m], source.weight)
        assert torch.equal(layer.running_var[m], source.running_var)
    again = ExchangeBatchNorm2d(4, 3)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.running_mean, layer.running_mean)
    assigned = ExchangeBatchNorm2d(4, 3)
    assigned.load_state_dict(source.state_dict(), assign=True)
    assigned(torch.randn(6, 4, 3, 3))  # updates the statistics of each modality in its own memory
    with torch.no_grad():
        assigned.weight[0, 0] = 7
    assert assigned.weight[1, 0] == source.weight[0]
    with pytest.raises(RuntimeError, match="size mismatch"):
        ExchangeBatchNorm2d(5, 3).load_state_dict(source.state_dict())


def test_residual_and_activation_follow_the_exchange():
    layer = ExchangeBatchNorm2d(4, 2, threshold=0.02, activation="relu").eval()
    with torch.no_grad():
        layer.weight[0, 1] = 0.0
        layer.bias[1, 1] = 0.5
    x, residual = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    y = layer(x, residual)
    expected = torch.relu(x[2:, 1] / (1 + 1e-5) ** 0.5 + 0.5 + residual[:2, 1])
    torch.testing.assert_close(y[:2, 1], expected)
    assert layer.replaced().nonzero().tolist() == [[0, 1]]


def test_sparsity_penalty_is_the_own_share_of_exchanging_layers():
    net = nn.Sequential(
        ExchangeBatchNorm2d(4, 2, threshold=0.02),
        ExchangeBatchNorm2d(4, 2),  # does not exchange
        nn.Sequential(ExchangeBatchNorm2d(7, 3, threshold=0.01, region="all")),
    )
    for p in net.parameters():
        nn.init.normal_(p)
    first, third = net[0].weight, net[2][0].weight
    expected = first[0, :2].abs().sum() + first[1, 2:].abs().sum()
    expected = expected + third[0, :2].abs().sum() + third[1, 2:4].abs().sum() + third[2, 4:].abs().sum()
    penalty = sparsity_penalty(net)
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    assert torch.equal(first.grad[0], torch.cat([first[0, :2].sign(), torch.zeros(2)]))
    assert net[1].weight.grad is None
    assert list(cen_ext.exchanging_layers(net)) == ["0", "2.0"]
    assert sparsity_penalty(nn.Conv2d(1, 1, 1)) == 0


@pytest.mark.parametrize("name", ["num_features", "num_modalities"])
def test_sizes_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ExchangeBatchNorm2d(**{"num_features": 4, "num_modalities": 2, name: 0})
