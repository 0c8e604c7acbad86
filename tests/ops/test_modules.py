"""The layers and the penalty, against torch's own layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, sparsity_penalty
from tests.helpers.same import assert_same

LAYERS = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d]
KINDS = [(ExchangeBatchNorm2d, nn.BatchNorm2d), (ExchangeInstanceNorm2d, nn.InstanceNorm2d)]


@pytest.mark.parametrize("tracked", [None, False, True])
@pytest.mark.parametrize(("layer_class", "torch_class"), KINDS)
def test_without_exchange_it_is_one_torch_layer_a_modality(layer_class, torch_class, tracked):
    options = {"momentum": 0.3, "eps": 1e-3, "dtype": torch.float64}
    if tracked is not None:
        options["track_running_stats"] = tracked
    ours = layer_class(5, 3, **options)
    theirs = [torch_class(5, affine=True, **options) for _ in range(3)]
    with torch.no_grad():
        ours.weight.uniform_(-1, 1)
        ours.bias.uniform_(-1, 1)
        for m, layer in enumerate(theirs):
            layer.weight.copy_(ours.weight[m])
            layer.bias.copy_(ours.bias[m])
    for step in range(4):
        for layer in (ours, *theirs):
            layer.train(step < 3)
        x = torch.randn(6, 5, 4, 3, dtype=torch.float64) * 3 + 1
        expected = torch.cat([layer(part) for layer, part in zip(theirs, x.chunk(3), strict=True)])
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    assert set(ours.state_dict()) == set(theirs[0].state_dict())
    for m, layer in enumerate(theirs):
        if layer.running_mean is not None:
            torch.testing.assert_close(ours.running_mean[m], layer.running_mean)
            torch.testing.assert_close(ours.running_var[m], layer.running_var)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_the_cumulative_average_weighs_all_batches_alike(layer_class):
    layer = layer_class(4, 2, momentum=None, track_running_stats=True)
    batches = [torch.randn(4, 4, 3, 3) + 5 * step for step in range(3)]
    for x in batches:
        layer(x)
    means = [x.view(2, 2, 4, 9).mean((1, 3)) for x in batches]
    torch.testing.assert_close(layer.running_mean, sum(means) / 3)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("layer_class", LAYERS)
def test_calls_that_update_nothing_do_not_count(layer_class):
    layer = layer_class(4, 2, momentum=None, track_running_stats=True)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(0, 4, 3, 3))
    with pytest.raises(ValueError, match="weight has 4 channels"):
        layer(torch.randn(2, 5, 3, 3))
    layer.eval()(torch.randn(2, 4, 3, 3))
    assert_same(layer.state_dict(), before)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_without_tracking_eval_uses_the_batch(layer_class):
    layer = layer_class(4, 2, track_running_stats=False)
    x = torch.randn(4, 4, 3, 3)
    assert torch.equal(layer(x), layer.eval()(x))
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(("layer_class", "torch_class"), KINDS)
def test_a_single_modality_checkpoint_loads_into_every_modality(layer_class, torch_class):
    options = {"track_running_stats": True}
    source = torch_class(4, affine=True, **options)
    nn.init.uniform_(source.weight)
    source(torch.randn(8, 4, 3, 3))
    layer = layer_class(4, 3, threshold=0.02, **options)
    layer.load_state_dict(source.state_dict())
    for m in range(3):
        assert torch.equal(layer.weight[m], source.weight)
        assert torch.equal(layer.running_var[m], source.running_var)
    again = layer_class(4, 3, **options)
    again.load_state_dict(layer.state_dict())
    assert_same(again.state_dict(), layer.state_dict())
    assigned = layer_class(4, 3, **options)
    assigned.load_state_dict(source.half().state_dict(), assign=True)
    assigned(torch.randn(6, 4, 3, 3))  # float32, and each modality's statistics in their own memory
    with torch.no_grad():
        assigned.weight[0, 0] = 7
    assert assigned.weight[1, 0] == source.weight[0]
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer_class(5, 3, **options).load_state_dict(source.state_dict())


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize(("layer_class", "torch_class"), KINDS)
def test_a_checkpoint_without_the_number_of_batches_loads_as_in_torch(layer_class, torch_class, metadata):
    """Files older than torch 0.4.1, and dicts of tensors alone, leave the number; others must have it."""
    options = dict(affine=True, track_running_stats=True)
    source, theirs = torch_class(4, **options), torch_class(4, **options)
    source(torch.randn(8, 4, 3, 3))
    state = source.state_dict()  # says that it is of version 2
    del state["num_batches_tracked"]
    for layer in (layer_class(4, 2, track_running_stats=True), theirs):
        layer.num_batches_tracked.fill_(3)
        if metadata:
            with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
                layer.load_state_dict(state)
        else:
            layer.load_state_dict(dict(state))
        assert layer.num_batches_tracked == 3
        assert torch.equal(layer.running_mean.flatten()[:4], source.running_mean)
    with torch.device("meta"):
        layer = layer_class(4, 2, track_running_stats=True)
    layer.load_state_dict(dict(state), assign=True)
    assert torch.equal(layer.num_batches_tracked, torch.tensor(0))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_residual_and_activation_follow_the_exchange(layer_class):
    layer = layer_class(4, 2, threshold=0.02, activation="relu", track_running_stats=True).eval()
    with torch.no_grad():
        layer.weight[0, 1] = 0.0
        layer.bias[1, 1] = 0.5
    x, residual = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    y = layer(x, residual)
    expected = torch.relu(x[2:, 1] / (1 + 1e-5) ** 0.5 + 0.5 + residual[:2, 1])
    torch.testing.assert_close(y[:2, 1], expected)
    assert layer.replaced().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("layer_class", LAYERS)
def test_sparsity_penalty_is_the_own_share_of_exchanging_layers(layer_class):
    net = nn.Sequential(
        layer_class(4, 2, threshold=0.02),
        layer_class(4, 2),  # does not exchange
        nn.Sequential(layer_class(7, 3, threshold=0.01, region="all")),
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


BAD = [
    ({"num_features": 0}, ValueError, "num_features must be at least 1, got 0"),
    ({"num_modalities": 0}, ValueError, "num_modalities must be at least 1, got 0"),
    ({"num_modalities": 2.0}, TypeError, "num_modalities must be an integer, got float"),
    ({"threshold": -0.1}, ValueError, "threshold must not be negative"),
    ({"threshold": "0.1"}, TypeError, "threshold must be a number, got str"),
    ({"region": "mine"}, ValueError, "region must be one of 'own', 'all', got 'mine'"),
    ({"criterion": "l2"}, ValueError, "criterion must be one of"),
    ({"activation": "mish"}, ValueError, "activation must be one of"),
    ({"negative_slope": None}, TypeError, "negative_slope must be a number"),
    ({"eps": float("nan")}, ValueError, "eps must not be negative"),
    ({"momentum": "0.1"}, TypeError, "momentum must be a number, got str"),
    ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_mistakes_are_refused_at_construction(layer_class, change, error, message):
    with pytest.raises(error, match=message):
        layer_class(**{"num_features": 4, "num_modalities": 2, **change})


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_half_precision_network_keeps_its_norms_in_float32(layer_class, half):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), layer_class(4, 2, threshold=0.02, activation="relu", track_running_stats=True)
    )
    with torch.no_grad():
        net[1].weight.uniform_(-0.1, 0.1)
        net[1].running_mean.uniform_(-1, 1)
    before = copy.deepcopy(net[1].state_dict())
    net.to(half)
    assert net[0].weight.dtype == half
    assert_same(net[1].state_dict(), before)  # not rounded either
    x = torch.randn(4, 3, 6, 6, dtype=half, requires_grad=True)
    y = net(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, net[1].weight.grad.dtype) == (half, half, torch.float32)
    assert layer_class(4, 2, dtype=half, track_running_stats=True).running_var.dtype == torch.float32
    assert net.double()[1].weight.dtype == torch.float64
    assert net.to(half)[1].weight.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_autocast_leaves_x_and_the_parameters_as_they_are(layer_class, training):
    layer = layer_class(4, 2, threshold=0.02, activation="relu", track_running_stats=True).train(training)
    x, residual = torch.randn(4, 4, 5, 5), torch.randn(4, 4, 5, 5)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = (x.to(dtype), residual.to(dtype))
        expected = copy.deepcopy(layer)(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            y = copy.deepcopy(layer)(*inputs)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, 3, 5, 5))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
@pytest.mark.parametrize("layer_class", LAYERS)
def test_copies_and_pickles_do_what_the_layer_does(layer_class, duplicate):
    layer = layer_class(4, 2, threshold=0.05, region="all", activation="leaky_relu", track_running_stats=True)
    nn.init.normal_(layer.weight, std=0.1)
    layer(torch.randn(4, 4, 3, 3))
    layer.eval()
    other = duplicate(layer)
    x = torch.randn(4, 4, 3, 3)
    assert torch.equal(other(x), layer(x))
    assert_same(other.state_dict(), layer.state_dict())
    if duplicate is not copy.copy:
        assert other.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("layer_class", LAYERS)
def test_the_meta_device_gives_shapes(layer_class):
    layer = layer_class(4, 2, threshold=0.02, track_running_stats=True).to(device="meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    y = layer(torch.empty(4, 4, 3, 3, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((4, 4, 3, 3), torch.bfloat16, "meta")
    back = layer.to_empty(device="cpu")
    back.load_state_dict(layer_class(4, 2, track_running_stats=True).state_dict())
    assert torch.equal(back.weight, torch.ones(2, 4))
