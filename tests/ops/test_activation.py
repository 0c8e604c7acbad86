"""The activations' own definition: values, derivatives, and what torch does at the kinks."""

from __future__ import annotations

import pytest
import torch

import cen_ext
from cen_ext.ops.activation import ACTIVATIONS, NAMES
from tests.helpers import formulas
from tests.helpers.covered import activations_of

SLOPE = 0.2
POINTS = torch.tensor(
    [-torch.inf, -7.0, -1e-3, -0.0, 0.0, 1e-3, 3.0, 6.0, 6.5, torch.inf], dtype=torch.float64
)


@pytest.mark.parametrize("name", NAMES)
def test_the_values_are_the_formulas(name):
    finite = POINTS[POINTS.isfinite()]
    assert torch.equal(ACTIVATIONS[name].value(finite, SLOPE), formulas.activated(finite, name, SLOPE))
    assert ACTIVATIONS[name].value(torch.tensor(torch.nan), SLOPE).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_is_that_of_autograd_at_kinks_too(name):
    u = POINTS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].value(u, SLOPE).sum(), u)
    assert torch.equal(ACTIVATIONS[name].derivative(POINTS, SLOPE), expected)
    assert torch.equal(formulas.derivative(POINTS, name, SLOPE), expected)


@pytest.mark.parametrize("backend", [n for n, s in cen_ext.available_backends().items() if s == "ok"])
@pytest.mark.parametrize(("name", "gradients"), [("relu", [0, 1, 1]), ("relu6", [0, 1, 0])])
def test_the_gradient_at_a_kink_is_zero(backend, name, gradients):
    if name not in activations_of(backend):
        pytest.skip(f"the compiled part does not know {name} yet")
    x = torch.tensor([[0.0], [3.0], [6.0]], requires_grad=True)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    x, one, zero = (t.detach().to(device) for t in (x, one, zero))
    y = cen_ext.norm_exchange(
        x.requires_grad_(), one, zero, zero, one, eps=0.0, activation=name, backend=backend
    )
    assert y.flatten().tolist() == [0, 3, 6]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.flatten().tolist() == gradients
