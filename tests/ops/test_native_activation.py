"""An activation beyond relu and leaky_relu in the compiled CPU kernels, called as an op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cen_ext
from cen_ext.functional import DTYPES
from cen_ext.reference import Options
from tests.helpers.cases import Shape, make_inputs
from tests.helpers.covered import NORMS
from tests.helpers.relu6 import assert_is_relu6, away_from_kinks, reaching_both_kinks
from tests.helpers.tolerance import Call, Results

if cen_ext.available_backends()["cpu"] != "ok":
    pytest.skip(cen_ext.available_backends()["cpu"], allow_module_level=True)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_layouts = pytest.mark.parametrize("channels_last", [False, True])
SHAPES = [Shape(1, 2, 6, (5, 7)), Shape(2, 2, 21, (11, 13)), Shape(3, 2, 40, (5, 9))]


def run_op(call: Call, dy: Tensor) -> Results:
    leaves = [t.detach().requires_grad_() for t in (call.x, call.weight, call.bias)]
    residual = None if call.residual is None else call.residual.detach().requires_grad_()
    y, mean, var = torch.ops.cen_ext.norm_exchange(
        *leaves, call.mean, call.var, residual, *call.options, "auto"
    )
    gradients = torch.autograd.grad(y, leaves if residual is None else [*leaves, residual], dy)
    return Results(y.detach(), mean, var, *gradients)


@every_dtype
@both_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("statistics", [*NORMS, "given"])
def test_relu6(statistics, with_residual, shape, channels_last, dtype):
    torch.manual_seed(0)
    i = reaching_both_kinks(make_inputs(shape, dtype, channels_last))
    given = (i.mean, i.var) if statistics == "given" else (None, None)
    options = Options(2.0**-6, norm="instance" if statistics == "instance" else "batch", activation="relu6")
    call = Call(i.x, i.weight, i.bias, *given, i.residual if with_residual else None, options)
    dy = away_from_kinks(call, i.dy)
    assert_is_relu6(run_op(call, dy), call, dy)


@both_layouts
@every_dtype
def test_relu6_has_no_derivative_at_its_kinks_and_keeps_nan(dtype, channels_last):
    """Without a deviation y is relu6 of the bias; the statistics are given, so dx is the derivative."""
    bias = [-1.0, 0.0, 3.0, 6.0, 7.0]
    x = torch.zeros(2, 5, 4, 4, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    table = torch.float64 if dtype == torch.float64 else torch.float32
    weight, shift = torch.ones(1, 5, dtype=table), torch.tensor([bias], dtype=table)
    options = Options(norm="batch", eps=0.0, activation="relu6")
    call = Call(x, weight, shift, torch.zeros_like(weight), weight, options=options)
    found = run_op(call, torch.ones_like(x))
    assert found.y[0, :, 0, 0].tolist() == [0, 0, 3, 6, 6]
    assert found.dx[0, :, 0, 0].tolist() == [0, 0, 1, 0, 0]
    assert run_op(call._replace(x=x + torch.nan), torch.ones_like(x)).y.isnan().all()


def test_an_unknown_activation_is_refused():
    x, table = torch.zeros(2, 3), torch.ones(1, 3)
    with pytest.raises(RuntimeError, match="unknown activation 'mish'"):
        run_op(Call(x, table, table, options=Options(activation="mish")), x)
