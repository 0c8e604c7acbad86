"""Exchange by the caller's own mask and lenders: ``replaced=`` and ``lender=`` of ``norm_exchange``."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import cen_ext
from cen_ext.ops.norm_exchange.options import OWN, Options
from tests.helpers import formulas
from tests.helpers.cases import Shape, make_inputs, make_route
from tests.helpers.covered import BACKENDS, every_kind
from tests.helpers.tolerance import Call, check, run

CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # as in test_operator.py
SHAPES = [Shape(1, 2, 4, (3, 5)), Shape(2, 3, 8, (7, 5)), Shape(3, 2, 19, (4, 4)), Shape(5, 1, 11, (3, 3))]


def as_arguments(route: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mask and the lenders of a route; what is not replaced has a lender, too, that nobody reads."""
    stays = route == OWN
    return dict(replaced=~stays, lender=torch.where(stays, -7, route).long())


@every_kind(dtypes=[torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, norm, dtype, channels_last, shape):
    torch.manual_seed(0)
    given = make_inputs(shape, channels_last=channels_last)
    both = as_arguments(make_route(shape))
    lender = torch.where(both["lender"] == -7, -1, both["lender"])
    routes = [
        both,
        dict(replaced=both["replaced"]),
        dict(threshold=0.02, region="all", lender=lender),
        dict(threshold=0.02, criterion="signed", lender=lender.int()),
    ]
    for i, route in enumerate(routes):
        options = dict(norm=norm, activation=("relu", "identity")[i % 2], **route)
        stats = (None, None) if i % 2 else (given.mean, given.var)
        leaves = [given.x, given.weight, given.bias, given.residual]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = cen_ext.norm_exchange(
            *leaves[:3], *stats, residual=leaves[3], training=stats[0] is None, backend=backend, **options
        )
        inputs = (given.x, given.weight, given.bias, *stats, given.residual)
        torch.testing.assert_close(y, formulas.forward(*inputs, **options)[0], **CLOSE)
        gradients = torch.autograd.grad(y, leaves, given.dy)
        expected = formulas.backward(given.dy, *inputs, **options)
        for name, ours, theirs in zip(("x", "weight", "bias", "residual"), gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, n=name: f"d{n}: {text}")


@every_kind()
@pytest.mark.parametrize("channels_last", [False, True])
def test_large(backend, norm, dtype, channels_last):
    """Several blocks of a kernel's, and a partial vector of channels."""
    torch.manual_seed(0)
    shape = Shape(3, 2, 20, (30, 61))
    i = make_inputs(shape, dtype, channels_last)
    options = Options(norm=norm, activation="leaky_relu", negative_slope=0.2)
    check(backend, Call(i.x, i.weight, i.bias, None, None, i.residual, options, make_route(shape)), i.dy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_swapping_twice_is_the_identity(backend, modalities):
    """AsymFusion's shuffle: each modality's tail comes from the next one, and back."""
    given = make_inputs(Shape(modalities, 2, 10, (4, 4)))
    tail = (torch.arange(10) >= 8).expand(modalities, 10)
    plain = torch.ones_like(given.weight), torch.zeros_like(given.bias)
    unit = torch.zeros_like(given.mean), torch.ones_like(given.var)
    m = torch.arange(modalities)[:, None].expand(modalities, 10)

    def swap(x, step):
        return cen_ext.norm_exchange(
            x, *plain, *unit, eps=0.0, replaced=tail, lender=(m + step) % modalities, backend=backend
        )

    shuffled = swap(given.x, 1)
    parts, moved = given.x.chunk(modalities), shuffled.chunk(modalities)
    for k in range(modalities):
        assert torch.equal(moved[k][:, :8], parts[k][:, :8])
        assert torch.equal(moved[k][:, 8:], parts[(k + 1) % modalities][:, 8:])
    assert torch.equal(swap(shuffled, -1), given.x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_modality_borrows_has_no_gradient_even_for_nan(backend):
    """Channel 1 of modality 0 is lent by 2 alone; NaN of 1, which is not its lender, stays out of it."""
    given = make_inputs(Shape(3, 2, 4, (3, 3)), small_scales=0.0)
    route = torch.full((3, 4), OWN)
    route[0, 1] = 2
    x = given.x.clone()
    x[:2, 1] = float("nan")  # replaced, and borrowed by nobody
    x[3, 1] = float("nan")  # of modality 1
    results = run(backend, Call(x, given.weight, given.bias, options=Options(), route=route.int()), given.dy)
    for name in ("y", "dx"):
        values = getattr(results, name)
        assert values[:2].isfinite().all(), name
        assert values[4:].isfinite().all(), name
    assert (results.dx[:2, 1] == 0).all()
    assert results.dweight[0].isfinite().all()


@every_kind(dtypes=[torch.float64])
def test_gradcheck(backend, norm, dtype):
    torch.manual_seed(0)
    shape = Shape(3, 2, 4, (2, 3))
    given = make_inputs(shape)
    route = as_arguments(make_route(shape))

    def call(x, weight, bias):
        return cen_ext.norm_exchange(x, weight, bias, training=True, norm=norm, backend=backend, **route)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in given[:3]])


@every_kind(dtypes=[torch.float32], norms=["batch"], names=[b for b in BACKENDS if b != "reference"])
def test_opcheck(backend, norm, dtype):
    shape = Shape(3, 2, 6, (4, 4))
    i = make_inputs(shape, dtype)
    op = {"triton": "triton_norm_exchange"}.get(backend, "norm_exchange")
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias)]
    torch.library.opcheck(
        getattr(torch.ops.cen_ext, op).default,
        (*leaves, None, None, None, *Options(norm=norm, activation="relu"), make_route(shape)),
    )


def test_layers_keep_the_route_out_of_their_state():
    """A route is the network's definition, so checkpoints of networks without one load."""
    tail, other = torch.arange(10) >= 8, torch.tensor([[1], [0]]).expand(2, 10)
    layer = cen_ext.ExchangeBatchNorm2d(10, 2, replaced=tail.expand(2, 10), lender=other)
    plain = cen_ext.ExchangeBatchNorm2d(10, 2)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer.replaced(), tail.expand(2, 10))
    assert layer.exchanges
    x = torch.randn(4, 10, 3, 3)
    y, expected = layer(x), plain(x)
    assert torch.equal(y[:2, :8], expected[:2, :8])
    assert torch.equal(y[:2, 8:], expected[2:, 8:])
    assert "replaced=mask" in repr(layer)


def routed(**options: object) -> cen_ext.ExchangeBatchNorm2d:
    """A layer that swaps two channels of ten; its tables are expanded views, as users make them."""
    tail, other = torch.arange(10, device="cpu") >= 8, torch.tensor([[1], [0]], device="cpu")
    return cen_ext.ExchangeBatchNorm2d(
        10, 2, replaced=tail.expand(2, 10), lender=other.expand(2, 10), **options
    )


def test_layers_own_their_route():
    """A view of the caller's, of which several elements are one, breaks what copies or broadcasts buffers."""
    mask = torch.zeros(2, 10, dtype=torch.bool)
    layer = cen_ext.ExchangeBatchNorm2d(10, 2, replaced=mask)
    mask.fill_(True)
    assert not layer.replaced().any()
    for table in (routed().replaced_mask, routed().lender):
        assert table.is_contiguous()
        assert torch.equal(table.clone().zero_(), torch.zeros_like(table))


def test_a_route_survives_the_meta_device():
    whole, x = routed(), torch.randn(4, 10, 3, 3)
    with torch.device("meta"):
        filled, assigned = routed(), routed()
    assert filled.replaced_mask.is_meta
    filled.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assigned.load_state_dict(whole.state_dict(), assign=True)
    for layer in (
        filled,
        assigned,
        copy.deepcopy(whole),
        pickle.loads(pickle.dumps(whole)),
        whole.double().float(),
    ):
        assert torch.equal(layer(x), routed()(x))
    with pytest.raises(ValueError, match="lender must have values, got a tensor on the meta device"):
        cen_ext.ExchangeBatchNorm2d(10, 2, lender=torch.ones(2, 10, dtype=torch.int64, device="meta"))


def test_layers_pickled_before_there_were_routes_work():
    layer = cen_ext.ExchangeBatchNorm2d(10, 2)
    state = layer.__getstate__()
    del state["_route"]
    state["_buffers"] = {k: v for k, v in state["_buffers"].items() if k not in ("replaced_mask", "lender")}
    older = cen_ext.ExchangeBatchNorm2d.__new__(cen_ext.ExchangeBatchNorm2d)
    older.__setstate__(state)
    x = torch.randn(4, 10, 3, 3)
    assert torch.equal(older.float().eval()(x), layer.eval()(x))


def test_the_penalty_leaves_out_layers_with_a_mask():
    both = torch.nn.Sequential(routed(), cen_ext.ExchangeBatchNorm2d(4, 2, threshold=0.1))
    assert cen_ext.sparsity_penalty(both) == 4  # scales of 1, of each modality's half of four channels


@pytest.mark.parametrize("backend", BACKENDS)
def test_lenders_that_are_not_checked_and_name_no_other_modality_give_the_mean(backend):
    given = make_inputs(Shape(3, 2, 4, (3, 3)), small_scales=0.0)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = True

    def call(lender):
        return cen_ext.norm_exchange(*given[:3], training=True, replaced=mask, lender=lender, backend=backend)

    expected = call(None)
    compiled = torch.compile(call, backend="eager")  # compilers check no values
    for wrong in (-2, -100, 0, 3, 2**32, 2**32 + 1):
        assert torch.equal(compiled(torch.full((3, 4), wrong)), expected), wrong


BAD = [
    (dict(replaced=torch.ones(2, 6)), TypeError, "replaced must be torch.bool, got torch.float32"),
    (dict(replaced=[True]), TypeError, "replaced must be a tensor, got list"),
    (dict(replaced=torch.ones(6, dtype=torch.bool)), ValueError, "replaced must have shape"),
    (dict(replaced="mask", threshold=0.1), ValueError, "threshold and replaced both say which"),
    (dict(replaced="mask", region="all"), ValueError, "region and replaced both say which"),
    (dict(replaced="mask", criterion="signed"), ValueError, "criterion and replaced both say which"),
    (dict(replaced="mask", lender=torch.ones(2, 6)), TypeError, "lender must be torch.int32 or torch.int64"),
    (dict(replaced="mask", lender=torch.ones(6).int()), ValueError, "lender must have shape"),
    (
        dict(replaced="mask", lender=torch.zeros(2, 6).int()),
        ValueError,
        "channel 0 of modality 0 must be ano",
    ),
    (dict(replaced="mask", lender=torch.full((2, 6), 2)), ValueError, "below 2, or -1 for the mean .* got 2"),
    (dict(replaced="mask", lender=torch.full((2, 6), -2)), ValueError, "or -1 for the mean .* got -2"),
    (dict(replaced=torch.ones(2, 6, dtype=torch.bool, device="meta")), ValueError, "replaced must be on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, error, message):
    mask = torch.ones(2, 6, dtype=torch.bool)
    if isinstance(change.get("replaced"), str):
        change = {**change, "replaced": mask}
    good = dict(x=torch.randn(4, 6, 3, 3), weight=torch.ones(2, 6), bias=torch.zeros(2, 6), training=True)
    cen_ext.norm_exchange(**good, replaced=mask)
    with pytest.raises(error, match=message):
        cen_ext.norm_exchange(**good, **change)
