"""Rows in sample order: the same results in other rows, and batches that are split and joined."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, make_multimodal
from tests.helpers.cases import Shape, in_order, make_inputs, modality_major
from tests.helpers.covered import BACKENDS, NORMS
from tests.helpers.tolerance import run
from tests.ops.test_contract import calls

CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # float64; sums of at most a few thousand values of size one
LAYERS = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d]


def stacked(*modalities: Tensor) -> Tensor:
    return cen_ext.stack_modalities(modalities, order="sample")


def unstacked(x: Tensor, num_modalities: int = 2) -> list[Tensor]:
    return cen_ext.unstack_modalities(x, num_modalities, order="sample")


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_definition_is_that_of_the_other_order(norm, data):
    call, dy = data.draw(calls(norm, torch.float64))
    m = len(call.weight)
    call = call._replace(options=call.options._replace(order="modality"))
    expected = run("reference", call, dy)
    x, residual, dy = (t if t is None else in_order(t, m, "sample") for t in (call.x, call.residual, dy))
    options = call.options._replace(order="sample")
    found = run("reference", call._replace(x=x, residual=residual, options=options), dy)
    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        if name in ("y", "dx", "dresidual") and ours is not None:
            ours = modality_major(ours, m, "sample")
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stack_and_unstack(layout):
    parts = [torch.randn(2, 5, 4, 3).contiguous(memory_format=layout) for _ in range(3)]
    x = stacked(*parts)
    assert x.is_contiguous(memory_format=layout)
    for row, wanted in enumerate([parts[m][n] for n in range(2) for m in range(3)]):
        assert torch.equal(x[row], wanted)
    for m, (view, part) in enumerate(zip(unstacked(x, 3), parts, strict=True)):
        assert torch.equal(view, part)
        assert view.data_ptr() == x[m].data_ptr()


@pytest.mark.parametrize(
    "call",
    [
        lambda **order: cen_ext.stack_modalities([torch.ones(2, 4)], **order),
        lambda **order: cen_ext.unstack_modalities(torch.ones(2, 4), 2, **order),
        lambda **order: ExchangeBatchNorm2d(4, 2, **order),
        lambda **order: make_multimodal(nn.BatchNorm2d(4), 2, **order),
    ],
    ids=["stack", "unstack", "layer", "network"],
)
def test_an_unknown_order(call):
    call(order="sample")
    with pytest.raises(ValueError, match="order must be one of 'modality', 'sample', got 'rows'"):
        call(order="rows")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("norm", "training"), [("batch", False), ("instance", False), ("instance", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_can_be_split_between_any_samples(backend, norm, training, channels_last):
    """Where rows have no statistics in common."""
    i = make_inputs(Shape(3, 7, 10, (5, 9)), channels_last=channels_last)
    x, residual = (in_order(t, 3, "sample") for t in (i.x, i.residual))
    statistics = () if training else (i.mean, i.var)
    options = dict(norm=norm, training=training, threshold=0.02, activation="relu", order="sample")

    def call(rows: slice) -> Tensor:
        tables = i.weight, i.bias, *statistics
        return cen_ext.norm_exchange(x[rows], *tables, residual=residual[rows], backend=backend, **options)

    parts = [call(slice(3 * begin, 3 * end)) for begin, end in pairwise([0, 1, 4, 4, 7])]
    torch.testing.assert_close(torch.cat(parts), call(slice(None)), **CLOSE)
    with pytest.raises(ValueError, match="4 rows, not divisible by 3 modalities"):
        call(slice(4))


class Siamese(nn.Module):
    """Joins two images on the batch axis, as change detection does, and splits what it made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
        )

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        one, other = self.encoder(torch.cat([before, after])).chunk(2)
        return one - other


def test_a_network_that_joins_two_images_is_itself_for_each_modality():
    net = Siamese().double()
    both, alone = make_multimodal(net, 2, threshold=0.0, order="sample"), [net, copy.deepcopy(net)]
    images = torch.randn(2, 2, 3, 3, 8, 8, dtype=torch.float64)  # before and after, modalities, samples
    found = unstacked(both(*(stacked(*modalities) for modalities in images)))
    for m, (y, one) in enumerate(zip(found, alone, strict=True)):
        torch.testing.assert_close(y, one(images[0, m], images[1, m]), **CLOSE)
        torch.testing.assert_close(both.encoder[1].running_var[m], one.encoder[1].running_var, **CLOSE)


@pytest.mark.parametrize("layer_class", LAYERS)
def test_data_parallel_needs_it(layer_class):
    net = nn.DataParallel(nn.Sequential(layer_class(6, 2)))
    with pytest.raises(RuntimeError, match=r"DataParallel splits the batch axis.*order='sample'"):
        net.module[0]._replicate_for_data_parallel()
    layer_class(6, 1)._replicate_for_data_parallel()
    layer = layer_class(6, 2, threshold=2.0, track_running_stats=True, order="sample").eval()
    replica, x = layer._replicate_for_data_parallel(), torch.randn(8, 6, 3, 3)
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.clone())  # as it does on each device
    torch.testing.assert_close(torch.cat([replica(rows) for rows in x.chunk(2)]), layer(x))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_layers_say_their_order_and_older_ones_have_the_first(layer_class):
    assert "order='sample'" in repr(layer_class(6, 2, order="sample"))
    layer = layer_class(6, 2)
    assert "order" not in repr(layer)
    assert pickle.loads(pickle.dumps(layer_class(6, 2, order="sample"))).order == "sample"
    del layer.__dict__["order"]  # as layers were pickled before they had one
    x = torch.randn(4, 6, 3, 3)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer_class(6, 2)(x))
