"""The activations' own definition: values, derivatives, and what torch does at the kinks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cen_ext
from cen_ext.ops.activation import ACTIVATIONS, NAMES
from cen_ext.ops.norm_exchange.reference import Options
from tests.helpers import formulas
from tests.helpers.cases import Shape, make_inputs, reaching_six
from tests.helpers.covered import BACKENDS, every_kind
from tests.helpers.tolerance import Call, check

SLOPE = 0.2
SHAPES = [Shape(1, 2, 6, (5, 7)), Shape(2, 2, 21, (11, 13)), Shape(3, 2, 40, (5, 9))]
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
both_layouts = pytest.mark.parametrize("channels_last", [False, True])
POINTS = torch.tensor(
    [-torch.inf, -7.0, -3.0, -1e-3, -0.0, 0.0, 1e-3, 3.0, 6.0, 6.5, torch.inf], dtype=torch.float64
)


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_formulas(name):
    finite = POINTS[POINTS.isfinite()]
    expected = formulas.activated(finite, name, SLOPE)
    torch.testing.assert_close(ACTIVATIONS[name].value(finite, SLOPE), expected, rtol=1e-13, atol=1e-15)
    assert ACTIVATIONS[name].value(torch.tensor(torch.nan), SLOPE).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_is_that_of_autograd_at_kinks_too(name):
    points = POINTS[POINTS.isfinite()] if name in formulas.SMOOTH else POINTS  # 0 * inf in theirs
    u = points.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].value(u, SLOPE).sum(), u)
    for derivative in (ACTIVATIONS[name].derivative(points, SLOPE), formulas.derivative(points, name, SLOPE)):
        torch.testing.assert_close(derivative, expected, rtol=1e-13, atol=1e-15)


@both_layouts
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "gradients"), [("relu", [0, 0, 1, 1, 1]), ("relu6", [0, 0, 1, 0, 0])])
def test_the_gradient_at_a_kink_is_zero_and_nan_stays(backend, name, gradients, channels_last):
    """Where x is its mean, the argument is the bias; statistics are given, so dx is the derivative."""
    bias = torch.tensor([[-1.0, 0.0, 3.0, 6.0, 7.0]])
    one = torch.ones_like(bias)
    x = torch.zeros(2, 5, 4, 4).to(memory_format=LAYOUTS[channels_last])
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    x, one, bias = (t.to(device) for t in (x, one, bias))

    def run(x: Tensor) -> Tensor:
        return cen_ext.norm_exchange(
            x, one, bias, torch.zeros_like(one), one, eps=0.0, activation=name, backend=backend
        )

    y = run(x.requires_grad_())
    assert torch.equal(y[0, :, 0, 0].cpu(), ACTIVATIONS[name].value(bias[0].cpu(), SLOPE))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[0, :, 0, 0].tolist() == gradients
    assert run(x.detach() + torch.nan).isnan().all()


@both_layouts
@every_kind()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_relu6_on_both_sides_of_its_kinks(given, with_residual, shape, backend, norm, dtype, channels_last):
    torch.manual_seed(0)
    i = reaching_six(make_inputs(shape, dtype, channels_last))
    statistics = (i.mean, i.var) if given else (None, None)
    options = Options(2.0**-6, norm=norm, activation="relu6")
    call = Call(i.x, i.weight, i.bias, *statistics, i.residual if with_residual else None, options)
    y = check(backend, call, i.dy).y
    assert (y == 0).any()
    assert (y == 6).any()
    assert ((y > 0) & (y < 6)).any()
