"""Layer, group and no norm with exchange: every backend against the formulas, in float64, and its bounds."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import cen_ext
from cen_ext.ops.norm_exchange.options import Options
from tests.helpers import cases, formulas
from tests.helpers.cases import Inputs, Shape, in_order, make_inputs, make_route, modality_major
from tests.helpers.covered import BACKENDS, proper_groups, skip_if_refused
from tests.helpers.tolerance import Call, check, run

CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # float64; sums of at most a few hundred values of size one
NORMS = ("layer", "group", "none")


def options_of(norm: str, channels: int) -> dict[str, Any]:
    """A norm and, where it has them, a number of groups."""
    return {"norm": norm, "num_groups": proper_groups(channels)} if norm == "group" else {"norm": norm}


@pytest.mark.parametrize("shape", cases.SMALL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, norm, channels_last, shape):
    given = make_inputs(shape, channels_last=channels_last)
    kind = options_of(norm, shape.channels)
    skip_if_refused(backend, given.x, **kind)
    flags = cases.every_flag(shape)
    orders = itertools.cycle(["modality", "sample", "sample"])
    for region, criterion, activation, with_residual in flags:
        options = dict(threshold=0.02, region=region, criterion=criterion, activation=activation, **kind)
        assert_as_formulas(backend, given, next(orders), with_residual, **options)


@pytest.mark.parametrize("shape", [s for s in cases.SMALL if s.num_modalities > 1], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_routes(backend, norm, channels_last, shape):
    given = make_inputs(shape, channels_last=channels_last)
    kind = options_of(norm, shape.channels)
    skip_if_refused(backend, given.x, **kind)
    for order in ("modality", "sample"):
        route = make_route(shape)
        table = dict(replaced=route > -2, lender=route.clamp(min=-1))
        assert_as_formulas(backend, given, order, True, activation="gelu", **table, **kind)


def assert_as_formulas(backend: str, given: Inputs, order: str, with_residual: bool, **options: Any) -> None:
    m = len(given.weight)
    residual = given.residual if with_residual else None
    leaves = [given.x, given.weight, given.bias] + ([given.residual] if with_residual else [])
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = cen_ext.norm_exchange(
        in_order(leaves[0], m, order),
        *leaves[1:3],
        residual=in_order(leaves[3], m, order) if with_residual else None,
        order=order,
        backend=backend,
        **options,
    )
    y = modality_major(y, m, order)
    formula = functools.partial(formulas.forward, given.x, given.weight, given.bias, None, None, residual)
    torch.testing.assert_close(y, formula(**options)[0], **CLOSE)
    assert y.stride() == given.x.stride()
    gradients = torch.autograd.grad(y, leaves, given.dy)
    expected = formulas.backward(given.dy, given.x, given.weight, given.bias, None, None, residual, **options)
    for name, ours, theirs in zip(("x", "weight", "bias", "residual"), gradients, expected, strict=False):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, n=name: f"d{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_within_bounds(backend, norm, dtype):
    for shape, last in [
        (Shape(2, 2, 96, (5, 7)), True),
        (Shape(2, 2, 96, (5, 7)), False),
        (Shape(3, 3, 50, (6, 11)), True),
        (Shape(4, 1, 34, (3, 45)), False),
        (Shape(2, 33, 64, ()), False),
        (Shape(2, 1, 770, (2, 3)), True),
    ]:
        given = make_inputs(shape, dtype, last)
        options = Options(0.02, "all", activation="relu", **options_of(norm, shape.channels))
        skip_if_refused(backend, given.x, **options._asdict())
        for residual, route in itertools.product([None, given.residual], [None, make_route(shape)]):
            call = Call(given.x, given.weight, given.bias, residual=residual, options=options, route=route)
            check(backend, call, given.dy)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_far_from_zero_keep_their_digits(backend, norm):
    shape = Shape(2, 3, 64, (4, 5))
    given = make_inputs(shape, torch.float32, channels_last=True)
    options = Options(0.02, "all", **options_of(norm, shape.channels))
    skip_if_refused(backend, given.x, **options._asdict())
    # torch's gradient of a variance, which the reference has, takes a mean anew by a plain sum.
    far = 1e3 if backend != "reference" else 0.0
    for x in (far + 0.1 * given.x, torch.full_like(given.x, 7.0), 1e18 * given.x):
        check(backend, Call(x, given.weight, given.bias, options=options), given.dy)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_modality_borrows_has_no_gradient_even_for_nan(backend, norm, channels_last):
    """Channel 0 of modalities 0 and 1 is lent by 2, so what 0 has there counts for its statistics alone."""
    shape = Shape(3, 2, 8, (2, 3))
    given = make_inputs(shape, channels_last=channels_last)
    kind = options_of(norm, shape.channels)
    skip_if_refused(backend, given.x, **kind)
    given.x[:2, 0] = torch.nan
    route = torch.full((3, 8), -2, dtype=torch.int32)
    route[:2, 0] = 2
    call = Call(given.x, given.weight, given.bias, options=Options(**kind), route=route)
    results = run(backend, call, given.dy)
    for gradient in (results.dweight, results.dbias):
        assert (gradient[:2, 0] == 0).all()
        assert gradient[1:].isfinite().all()
    assert results.dweight[0].isnan().any()


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, norm):
    given = make_inputs(Shape(3, 2, 4, (2, 3)))
    kind = options_of(norm, 4)
    skip_if_refused(backend, given.x, **kind)
    call = functools.partial(
        cen_ext.norm_exchange, threshold=0.02, region="all", activation="silu", backend=backend, **kind
    )
    leaves = [t.requires_grad_() for t in (given.x, given.weight, given.bias, given.residual)]
    torch.autograd.gradcheck(lambda x, w, b, r: call(x, w, b, residual=r), leaves)


@pytest.mark.parametrize("norm", ["batch", "instance", *NORMS])
@pytest.mark.parametrize("rank", [2, 3, 4, 6])
def test_channels_may_be_the_last_dimension(norm, rank):
    shape = (4, *range(3, 3 + rank - 2), 6)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    if rank == 2 and norm == "instance":
        pytest.skip("instance norm needs more than one value per row")
    weight, bias = torch.randn(2, 2, 6, dtype=torch.float64)
    options = dict(options_of(norm, 6), training=True, threshold=0.5, activation="relu")
    y = cen_ext.norm_exchange(x, weight, bias, residual=residual, channel_dim=-1, **options)
    second = [t.reshape(4, -1, 6).transpose(1, 2) for t in (x, residual)]
    expected = cen_ext.norm_exchange(second[0], weight, bias, residual=second[1], **options)
    torch.testing.assert_close(y, expected.transpose(1, 2).reshape(shape), **CLOSE)
    assert y.is_contiguous()


def test_no_norm_is_the_exchange_alone():
    x, table = torch.randn(6, 4, 3, 3), torch.tensor([[True, False, False, True], [False, True, False, True]])
    y = cen_ext.norm_exchange(x, None, None, norm="none", replaced=table, training=True)
    a, b = x.chunk(2)
    column = table[:, :, None, None]
    assert torch.equal(y, torch.cat([torch.where(column[0], b, a), torch.where(column[1], a, b)]))
    scaled = cen_ext.norm_exchange(x, torch.full((2, 4), 2.0), None, norm="none")
    assert torch.equal(scaled, 2 * x)


def test_instance_norm_needs_no_running_statistics():
    given = make_inputs(Shape(2, 3, 4, (5, 5)))
    y = cen_ext.norm_exchange(given.x, given.weight, given.bias, norm="instance")
    trained = cen_ext.norm_exchange(given.x, given.weight, given.bias, norm="instance", training=True)
    assert torch.equal(y, trained)


X, TABLE = torch.zeros(4, 6, 3), torch.ones(2, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm="layer", num_groups=2), "num_groups=2 is for norm 'group'"),
        (dict(norm="group", num_groups=4), "num_groups must divide the 6 channels"),
        (dict(norm="group", num_groups=0), "num_groups must be at least 1"),
        (dict(norm="layer", channel_dim=2), "channel_dim must be 1 or -1"),
        (dict(norm="layer", running_mean=TABLE, running_var=TABLE), "of no use to norm 'layer'"),
        (dict(norm="none", running_mean=TABLE, running_var=TABLE), "of no use to norm 'none'"),
        (dict(norm="layer", residual=torch.zeros(4, 3, 6)), "residual must have shape"),
        (dict(norm="layer", channel_dim=-1, residual=torch.zeros(4, 3, 6)), "residual must be of shape"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cen_ext.norm_exchange(X, TABLE, TABLE, **options)


def test_no_norm_must_be_told_the_modalities():
    with pytest.raises(ValueError, match="must tell M"):
        cen_ext.norm_exchange(X, None, None, norm="none")
    with pytest.raises(ValueError, match="compares weight, which is None"):
        cen_ext.norm_exchange(X, None, TABLE, norm="none", threshold=0.1)


def test_empty_batches():
    for norm in NORMS:
        x = torch.zeros(0, 6, 3, requires_grad=True)
        y = cen_ext.norm_exchange(x, TABLE, TABLE, **options_of(norm, 6))
        y.sum().backward()
        assert y.shape == x.shape
        assert x.grad is not None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_bits_depend_on_neither_threads_nor_run(backend, norm, channels_last):
    # PyTorch splits the sums of the reference by threads, on some processors.
    shape = Shape(2, 3, 48, (23, 29))
    given = make_inputs(shape, torch.float32, channels_last)
    options = Options(0.02, "all", activation="silu", **options_of(norm, shape.channels))
    skip_if_refused(backend, given.x, **options._asdict())
    call = Call(given.x, given.weight, given.bias, residual=given.residual, options=options)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(run(backend, call, given.dy))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend, norm):
    given = make_inputs(Shape(2, 3, 8, (4, 5)), torch.float32)
    kind = options_of(norm, 8)
    skip_if_refused(backend, given.x, **kind)

    def call(x, weight, bias, residual):
        return cen_ext.norm_exchange(
            x, weight, bias, residual=residual, threshold=0.02, region="all", activation="gelu", **kind
        )

    leaves = [t.requires_grad_() for t in (given.x, given.weight, given.bias, given.residual)]
    with cen_ext.use_backend(backend):
        compiled = torch.compile(call, fullgraph=True)
        found, expected = compiled(*leaves), call(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        pairs = zip(*(torch.autograd.grad(y, leaves, given.dy) for y in (found, expected)), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
