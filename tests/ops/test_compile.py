"""torch.compile without a graph break, and torch.export: values, gradients and statistics as in eager."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

import cen_ext
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d
from tests.helpers.cases import Shape, make_inputs

LAYERS = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d]
BACKENDS = [name for name, state in cen_ext.available_backends().items() if state == "ok"]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def make_layer(layer_class: type[nn.Module], **options: object) -> nn.Module:
    layer = layer_class(
        6, 2, threshold=0.3, activation="relu", track_running_stats=True, dtype=torch.float64, **options
    )
    nn.init.uniform_(layer.weight, -1, 1)
    nn.init.normal_(layer.running_mean)
    return layer


def step(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output and all gradients of a call with a residual."""
    layer.zero_grad()
    x, residual = x.clone().requires_grad_(), x.flip(0).requires_grad_()
    y = layer(x, residual)
    y.square().sum().backward()
    return y.detach(), x.grad, residual.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_compiled_layer_does_what_the_layer_does(layer_class, momentum):
    eager = make_layer(layer_class, momentum=momentum)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    for training in (True, True, False):
        x = torch.randn(4, 6, 5, 4, dtype=torch.float64)
        expected = step(eager.train(training), x)
        compiled.train(training)
        torch.testing.assert_close(step(compiled, x), expected)
        torch.testing.assert_close(dict(twin.state_dict()), dict(eager.state_dict()))


@pytest.mark.parametrize("order", ["modality", "sample"])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_a_compiled_layer_routes_channels(layer_class, order):
    """The cheap half of compiling: that there is one graph, and that its gradients are right."""
    route = dict(replaced=torch.rand(3, 6) < 0.5, lender=((torch.arange(3)[:, None] + 1) % 3).expand(3, 6))
    options = dict(track_running_stats=True, dtype=torch.float64, order=order)
    eager = layer_class(6, 3, activation="relu", **options, **route)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", fullgraph=True)
    for training in (True, False):
        x = torch.randn(6, 6, 5, 4, dtype=torch.float64)
        expected = step(eager.train(training), x)
        compiled.train(training)
        torch.testing.assert_close(step(compiled, x), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_function_compiles_for_any_batch(backend):
    def call(x: Tensor, *rest: Tensor) -> Tensor:
        weight, bias, running_mean, running_var = rest
        y = cen_ext.norm_exchange(
            x, weight, bias, running_mean, running_var, training=True, threshold=0.02, backend=backend
        )
        options = dict(order="sample", backend=backend)
        return cen_ext.norm_exchange(y, weight, bias, running_mean, running_var, **options)

    # Without code generation, which takes half a minute for the reference with unknown sizes.
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        given = make_inputs(Shape(2, batch, 6, (5, 4)), channels_last=True)
        results = []
        for function in (call, compiled):
            leaves = [t.clone().requires_grad_() for t in (given.x, given.weight, given.bias)]
            running = [given.mean.clone(), given.var.clone()]
            torch._dynamo.mark_dynamic(leaves[0], 0)
            with torch.compiler.set_stance("fail_on_recompile" if batch == 3 else "default"):
                y = function(*leaves, *running)
            assert y.is_contiguous(memory_format=torch.channels_last)
            results.append([y, *running, *torch.autograd.grad(y, leaves, given.dy)])
        torch.testing.assert_close(results[1], results[0])


def test_synchronised_statistics_compile(tmp_path: Path):
    rendezvous = f"file://{tmp_path}/rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        eager = cen_ext.synchronise_statistics(make_layer(ExchangeBatchNorm2d))
        twin = copy.deepcopy(eager)
        x = torch.randn(4, 6, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(step(torch.compile(twin, fullgraph=True), x), step(eager, x))
        torch.testing.assert_close(dict(twin.state_dict()), dict(eager.state_dict()))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_export_in_eval_for_any_batch(layer_class, strict):
    layer = make_layer(layer_class, order="modality" if strict else "sample")
    net = nn.Sequential(nn.Conv2d(3, 6, 3, dtype=torch.float64), layer).eval()
    batch = 2 * torch.export.Dim("batch", max=64)  # of both modalities
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    program = torch.export.export(net, (x,), strict=strict, dynamic_shapes=({0: batch},))
    for rows in (4, 10):
        x = torch.randn(rows, 3, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), net(x))
