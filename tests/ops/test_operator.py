"""Every backend against the formulas, in float64: values, gradients, statistics, all flags."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

import cen_ext
from tests.helpers import cases, formulas
from tests.helpers.cases import Shape, in_order, make_inputs, modality_major
from tests.helpers.covered import BACKENDS, NORMS, every_kind, skip_if_refused

CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # float64; sums of at most a few hundred values of size one


def call_in_order(order: str, x: Tensor, weight: Tensor, *rest: Tensor | None, **options: object) -> Tensor:
    """``norm_exchange`` of the same rows in the given order; tensors of x's size are modality-major."""
    m, residual = len(weight), options.pop("residual")
    options["residual"] = None if residual is None else in_order(residual, m, order)
    y = cen_ext.norm_exchange(in_order(x, m, order), weight, *rest, order=order, **options)
    return modality_major(y, m, order)


@pytest.mark.parametrize("shape", cases.SMALL, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, training, norm, channels_last, shape):
    if norm == "instance" and training and math.prod(shape.spatial) == 1:
        pytest.skip("instance norm needs more than one value per row")
    given = make_inputs(shape, channels_last=channels_last)
    skip_if_refused(backend, given.x, norm=norm)
    flags = cases.every_flag(shape)
    orders = itertools.cycle(["modality", "sample", "sample"])  # each with every flag
    for region, criterion, activation, with_residual in flags:
        options = dict(
            threshold=0.02,
            region=region,
            criterion=criterion,
            norm=norm,
            activation=activation,
            negative_slope=0.2,
        )
        residual = given.residual if with_residual else None
        stats = (None, None) if training else (given.mean, given.var)
        leaves = [given.x, given.weight, given.bias] + ([residual] if with_residual else [])
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        y = call_in_order(
            next(orders),
            *leaves[:3],
            *stats,
            residual=leaves[3] if with_residual else None,
            training=training,
            backend=backend,
            **options,
        )
        expected, _ = formulas.forward(given.x, given.weight, given.bias, *stats, residual, **options)
        torch.testing.assert_close(y, expected, **CLOSE)
        assert y.stride() == given.x.stride()
        gradients = torch.autograd.grad(y, leaves, given.dy)
        expected = formulas.backward(given.dy, given.x, given.weight, given.bias, *stats, residual, **options)
        for name, ours, theirs in zip(("x", "weight", "bias", "residual"), gradients, expected, strict=False):
            torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, n=name: f"d{n}: {text}")


@every_kind(dtypes=[torch.float64])
@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("order", ["modality", "sample"])
@pytest.mark.parametrize("momentum", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["number", "tensor"])
def test_running_statistics_are_torchs(backend, norm, dtype, modalities, momentum, order):
    given = make_inputs(Shape(modalities, 4, 6, (5, 3)))
    mean, var = given.mean.clone(), given.var.clone()
    x, weight, bias = given.x, given.weight, given.bias
    options = dict(norm=norm, momentum=momentum, backend=backend)
    # The exchange has no part in the statistics.
    call = functools.partial(call_in_order, order, x, weight, bias, mean, var, residual=None, **options)
    call(training=True, threshold=0.02)
    y = call()
    layer = torch.nn.BatchNorm2d if norm == "batch" else torch.nn.InstanceNorm2d
    for m, part in enumerate(x.chunk(modalities)):
        theirs = layer(6, momentum=0.3, affine=True, track_running_stats=True, dtype=dtype)
        theirs.load_state_dict(
            dict(weight=weight[m], bias=bias[m], running_mean=given.mean[m], running_var=given.var[m]),
            strict=False,
        )
        theirs(part)
        torch.testing.assert_close(mean[m], theirs.running_mean, **CLOSE)
        torch.testing.assert_close(var[m], theirs.running_var, **CLOSE)
        torch.testing.assert_close(y.chunk(modalities)[m], theirs.eval()(part).detach(), **CLOSE)


@every_kind(dtypes=[torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(backend, norm, dtype, training, channels_last):
    given = make_inputs(Shape(3, 2, 4, (2, 3)), dtype, channels_last)
    stats = () if training else (given.mean, given.var)

    def call(x, weight, bias, residual):
        return cen_ext.norm_exchange(
            x,
            weight,
            bias,
            *stats,
            residual=residual,
            threshold=0.02,
            norm=norm,
            training=training,
            activation="leaky_relu",
            backend=backend,
        )

    leaves = [t.requires_grad_() for t in (given.x, given.weight, given.bias, given.residual)]
    # A replaced channel's scale has no gradient by definition (the mask is a constant), which finite
    # differences confirm as long as no scale lies within their step of the threshold.
    assert ((given.weight.abs() - 0.02).abs() > 1e-5).all()
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replaced_channel_is_detached_and_its_partners_are_not(backend):
    given = make_inputs(Shape(3, 2, 6, (4, 4)), small_scales=0.0)
    with torch.no_grad():
        given.weight[1, 2] = 0.001  # channel 2 lies in modality 1's own share
    x = given.x.requires_grad_()
    y = cen_ext.norm_exchange(
        x, given.weight, given.bias, training=True, threshold=0.02, activation="identity", backend=backend
    )
    (dx,) = torch.autograd.grad(y.view(3, 2, 6, 4, 4)[1, :, 2].pow(2).sum(), x)
    dx = dx.view(3, 2, 6, 4, 4)
    assert (dx[1] == 0).all()
    assert (dx[0, :, 2] != 0).any()
    assert (dx[2, :, 2] != 0).any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_of_another_floating_type_is_cast_to_that_of_x(backend, autocast):
    for dtype, other in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        given = make_inputs(Shape(2, 2, 6, (4, 4)), dtype)
        leaves = [given.x.requires_grad_(), given.residual.to(other).requires_grad_()]
        cast = [given.x, leaves[1].detach().to(dtype).requires_grad_()]
        results = []
        for x, residual in (leaves, cast):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = cen_ext.norm_exchange(
                    x,
                    given.weight,
                    given.bias,
                    training=True,
                    threshold=0.02,
                    activation="relu",
                    residual=residual,
                    backend=backend,
                )
            results.append([y, *torch.autograd.grad(y, (x, residual), given.dy)])
        (y, dx, dresidual), expected = results
        assert (y.dtype, dx.dtype, dresidual.dtype) == (dtype, dtype, other)
        assert torch.equal(y, expected[0])
        assert torch.equal(dx, expected[1])
        assert torch.equal(dresidual, expected[2].to(other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_zero_and_one_modality_replace_nothing(backend):
    for shape, threshold in ((Shape(2, 2, 6, (4, 4)), 0.0), (Shape(1, 2, 6, (4, 4)), 0.5)):
        given = make_inputs(shape)
        given.weight.fill_(-0.01)
        for criterion in ("abs", "signed"):
            options = dict(threshold=threshold, region="all", criterion=criterion)
            assert not cen_ext.replaced_channels(given.weight, **options).any()
            y = cen_ext.norm_exchange(
                given.x, given.weight, given.bias, given.mean, given.var, backend=backend, **options
            )
            plain, _ = formulas.forward(given.x, given.weight, given.bias, given.mean, given.var, None)
            torch.testing.assert_close(y, plain, **CLOSE)


@pytest.mark.parametrize("region", ["own", "all"])
@pytest.mark.parametrize("criterion", ["abs", "signed"])
@pytest.mark.parametrize("table", [(1, 4), (2, 8), (3, 7), (5, 11), (4, 3)])
def test_replaced_channels(table, criterion, region):
    weight = torch.randn(table) * 0.03
    weight[0, 0] = 0.02  # on the threshold: kept by "abs" (|w| < t), replaced by "signed" (w <= t)
    ours = cen_ext.replaced_channels(weight, 0.02, region, criterion)
    assert torch.equal(ours, formulas.replaced(weight, weight.new_tensor(0.02).item(), region, criterion))


def test_backends_are_named_and_refusals_explained():
    states = cen_ext.available_backends()
    assert states["reference"] == "ok"
    x = torch.randn(4, 6, 3, 3)
    layer = cen_ext.ExchangeBatchNorm2d(6, 2)
    call = (x, layer.weight, layer.bias, layer.running_mean, layer.running_var)
    with pytest.raises(ValueError, match="backend must be one of"):
        cen_ext.norm_exchange(*call, backend="cudnn")
    elsewhere = [t.to("meta") for t in call]
    if states["cpu"] == "ok":
        with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run this call: x is on meta"):
            cen_ext.norm_exchange(*elsewhere, backend="cpu")
    assert cen_ext.norm_exchange(*elsewhere).is_meta


BAD = [
    (dict(x=[torch.zeros(2, 6)]), TypeError, "x must be a tensor, got list"),
    (dict(x=torch.zeros(4, 6, 3, 3, dtype=torch.int32)), TypeError, "x must be float16"),
    (dict(x=torch.zeros(6)), ValueError, r"x must be .M\*N, C, \*spatial. .* got .6,."),
    (dict(x=torch.zeros(4, 6, 1, 1, 1, 1)), ValueError, "x must be .* 0 to 3 spatial dimensions"),
    (dict(x=torch.zeros(3, 6, 3, 3)), ValueError, "3 rows, not divisible by 2"),
    (dict(x=torch.zeros(4, 5, 3, 3)), ValueError, "weight has 6 channels, but x has 5"),
    (dict(weight=torch.ones(6)), ValueError, "weight must be .M, C."),
    (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (dict(weight=torch.ones(3, 6)), ValueError, "4 rows, not divisible by 3 modalities"),
    (dict(weight=torch.ones(0, 6)), ValueError, "weight must be .M, C. with M >= 1"),
    (dict(weight=torch.ones(2, 6).half()), TypeError, "weight must be torch.float32, got torch.float16"),
    (dict(x=torch.zeros(4, 6, 3, 3).double()), TypeError, "weight must be torch.float64, got torch.float32"),
    (
        dict(x=torch.zeros(4, 6, 3, 3).bfloat16(), weight=torch.ones(2, 6).bfloat16()),
        TypeError,
        "weight must",
    ),
    (dict(weight=torch.ones(2, 6, device="meta")), ValueError, "weight must be on cpu as x is, got meta"),
    (dict(bias=torch.ones(6)), ValueError, "bias must have shape"),
    (dict(bias=None), TypeError, "bias must be a tensor"),
    (dict(bias=torch.ones(2, 6).double()), TypeError, "bias must be torch.float32"),
    (dict(bias=torch.ones(2, 6, device="meta")), ValueError, "bias must be on cpu"),
    (dict(running_mean=torch.ones(3, 6)), ValueError, "running_mean must have shape"),
    (dict(running_var=torch.ones(6)), ValueError, "running_var must have shape"),
    (dict(running_var=torch.ones(2, 6).double()), TypeError, "running_var must be torch.float32"),
    (dict(running_mean=torch.ones(2, 6, device="meta")), ValueError, "running_mean must be on cpu"),
    (dict(running_var=torch.ones(2, 6, device="meta")), ValueError, "running_var must be on cpu"),
    (dict(running_mean=None), ValueError, "must be given together"),
    (dict(running_mean=[0.0]), TypeError, "running_mean must be a tensor, got list"),
    (dict(running_mean=None, running_var=None), ValueError, "required with training=False"),
    (dict(residual=torch.zeros(4, 6, 3, 2)), ValueError, "residual must have shape"),
    (dict(residual=torch.zeros(4, 6, 3, 3).int()), TypeError, "residual must be torch.float32"),
    (dict(residual=torch.zeros(4, 6, 3, 3, device="meta")), ValueError, "residual must be on cpu"),
    (dict(residual=1.0), TypeError, "residual must be a tensor, got float"),
    (dict(region="mine"), ValueError, "region must be one of 'own', 'all', got 'mine'"),
    (dict(criterion="l2"), ValueError, "criterion must be one of"),
    (dict(norm="weight"), ValueError, "norm must be one of"),
    (dict(order="row"), ValueError, "order must be one of 'modality', 'sample', got 'row'"),
    (dict(activation="mish"), ValueError, "activation must be one of"),
    (dict(threshold=-0.1), ValueError, "threshold must not be negative"),
    (dict(threshold=float("nan")), ValueError, "threshold must not be negative"),
    (dict(eps=-1e-5), ValueError, "eps must not be negative"),
    (dict(eps=float("nan")), ValueError, "eps must not be negative"),
    (dict(threshold="0.02"), TypeError, "threshold must be a number, got str"),
    (dict(eps=None), TypeError, "eps must be a number, got NoneType"),
    (dict(negative_slope=None), TypeError, "negative_slope must be a number, got NoneType"),
    (dict(momentum=None), TypeError, "momentum must be a number, got NoneType"),
    (dict(training=True, momentum=torch.ones(6)), ValueError, "momentum must be a number or a 0-d tensor"),
    (dict(training=True, x=torch.zeros(2, 6, 1, 1)), ValueError, "more than one value per channel"),
    (
        dict(training=True, norm="instance", x=torch.zeros(4, 6)),
        ValueError,
        "more than one value per channel",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, error, message):
    good = dict(
        x=torch.randn(4, 6, 3, 3),
        weight=torch.ones(2, 6),
        bias=torch.zeros(2, 6),
        running_mean=torch.zeros(2, 6),
        running_var=torch.ones(2, 6),
        residual=None,
    )
    cen_ext.norm_exchange(**good)
    with pytest.raises(error, match=message):
        cen_ext.norm_exchange(**{**good, **change})
    assert not good["running_mean"].any()


def test_stack_and_unstack():
    parts = [torch.randn(2, 3, 4) for _ in range(3)]
    x = cen_ext.stack_modalities(parts)
    assert x.shape == (6, 3, 4)
    back = cen_ext.unstack_modalities(x, 3)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))
    assert all(view.data_ptr() == x[2 * m].data_ptr() for m, view in enumerate(back))
    with pytest.raises(ValueError, match="must not be empty"):
        cen_ext.stack_modalities([])
    for bad in (None, parts[0]):
        with pytest.raises(TypeError, match="modalities must be a sequence of tensors"):
            cen_ext.stack_modalities(bad)
    with pytest.raises(TypeError, match="modality 1 must be a tensor, got int"):
        cen_ext.stack_modalities([parts[0], 1])
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        cen_ext.unstack_modalities([x], 3)
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        cen_ext.replaced_channels([[1.0]], 0.1)
    with pytest.raises(ValueError, match=r"modality 1 is .* but modality 0 is"):
        cen_ext.stack_modalities([parts[0], parts[1][:1]])
    with pytest.raises(ValueError, match="not divisible by 4 modalities"):
        cen_ext.unstack_modalities(x, 4)
    with pytest.raises(ValueError, match="num_modalities must be at least 1"):
        cen_ext.unstack_modalities(x, 0)
