"""What a call with relu6 has to give, from the definition without an activation, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.cases import Inputs
from tests.helpers.tolerance import Call, Results, assert_within, bounds, run_definition


def reaching_both_kinks(i: Inputs) -> Inputs:
    """The inputs with every scale that is not small multiplied, so that arguments lie on both sides of 6."""
    return i._replace(weight=torch.where(i.weight.abs() < 0.1, i.weight, 4 * i.weight))


def linear(call: Call) -> Call:
    """The same call without its activation."""
    return call._replace(options=call.options._replace(activation="identity"))


def argument(call: Call) -> Tensor:
    """u, what the activation is applied to."""
    return run_definition(linear(call), torch.zeros_like(call.x)).y


def away_from_kinks(call: Call, dy: Tensor) -> Tensor:
    """dy with zeros where a rounding error decides on which side of 0 or 6 the argument lies."""
    u, error = argument(call), bounds(linear(call), torch.zeros_like(call.x)).y
    near = (u.abs() <= error) | ((u - 6).abs() <= error)
    return torch.where(near, 0.0, dy)


def assert_is_relu6(found: Results, call: Call, dy: Tensor) -> None:
    """Asserts that the results of ``call`` lie within the bounds; dy comes from ``away_from_kinks``.

    The derivative is 0 or 1, so the gradients are those without an activation of dy where it is 1, and errors
    of y are no larger than those of u.
    """
    u = argument(call)
    assert (u < 0).any()
    assert (u > 6).any()
    passed = torch.where((u > 0) & (u < 6), dy, 0.0).to(dy.dtype)
    expected = run_definition(linear(call), passed)._replace(y=u.clamp(0, 6))
    assert_within(found, expected, bounds(linear(call), passed))
