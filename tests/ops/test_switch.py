"""The choice of the backend: what names it, and what only the reference can do."""

from __future__ import annotations

import io
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import cen_ext
import models
from cen_ext import ExchangeBatchNorm2d, ExchangeInstanceNorm2d
from cen_ext.ops import dispatch

LAYERS = [ExchangeBatchNorm2d, ExchangeInstanceNorm2d]
STATES = cen_ext.available_backends()
compiled = pytest.mark.skipif(STATES["cpu"] != "ok", reason="the compiled part is missing")
on_cpus = pytest.mark.skipif(
    STATES["cpu"] != "ok" or STATES["cuda"] == "ok" or dispatch._INTERPRETED,
    reason="another backend than that of CPUs can run",
)
quiet = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that have run since the list was last cleared."""
    names: list[str] = []

    def noting(name, run):
        def noted(*arguments):
            names.append(name)
            return run(*arguments)

        return noted

    for op, table in dispatch.BACKENDS.items():
        noted = {name: entry._replace(run=noting(name, entry.run)) for name, entry in table.items()}
        monkeypatch.setitem(dispatch.BACKENDS, op, noted)
    return names


def make_layer(layer_class: type[nn.Module], **options: object) -> nn.Module:
    layer = layer_class(
        6, 2, threshold=0.5, activation="relu", track_running_stats=True, dtype=torch.float64, **options
    )
    nn.init.uniform_(layer.weight, -1, 1)
    nn.init.normal_(layer.bias)
    return layer.eval()


# Every op as a function of x [4, 6, 5, 4]; each in its best backend where none is named.
CALLS = {
    "norm_exchange": lambda x, **options: cen_ext.norm_exchange(
        x, x.new_ones(2, 6), x.new_zeros(2, 6), x.new_zeros(2, 6), x.new_ones(2, 6), **options
    ),
    "max_pool_same": lambda x, **options: cen_ext.max_pool_same(x, 3, **options),
    "pixel_shift": lambda x, **options: cen_ext.pixel_shift(x, 2, **options),
    "conv3x3": lambda x, **options: cen_ext.conv3x3(x, x.new_ones(2, 6, 3, 3), **options),
}
every_op = pytest.mark.parametrize("op", CALLS)


@every_op
def test_the_argument_precedes_the_context_and_that_the_best(ran, op):
    x = torch.randn(4, 6, 5, 4)
    CALLS[op](x)
    with cen_ext.use_backend("reference"):
        CALLS[op](x)
        with cen_ext.use_backend(None):
            CALLS[op](x)
        CALLS[op](x)
        with pytest.raises(ZeroDivisionError), cen_ext.use_backend(None):
            raise ZeroDivisionError
        CALLS[op](x)
    CALLS[op](x)
    best = ran[0]
    assert ran == [best, "reference", best, "reference", "reference", best]
    ran.clear()
    with cen_ext.use_backend("cuda"):
        CALLS[op](x, backend="reference")
    assert ran == ["reference"]


@on_cpus
def test_an_op_without_the_named_backend_runs_its_best(ran):
    x = torch.randn(4, 6, 5, 4)
    with cen_ext.use_backend("cpu"):
        for call in CALLS.values():
            call(x)
    # The kernels of conv3x3 take none of these channels; its choice is its own.
    assert ran == ["cpu", "cpu", "cpu", "reference"]
    ran.clear()
    with cen_ext.use_backend("cuda"):
        for op in ("norm_exchange", "pixel_shift"):
            with pytest.raises(RuntimeError, match=r"'cuda' cannot run this call: .*cen_ext\.use_backend"):
                CALLS[op](x)
        for op in ("max_pool_same", "conv3x3"):
            CALLS[op](x)
    assert ran == ["cpu", "reference"]


@on_cpus
def test_conv3x3_runs_its_kernels_unless_the_reference_is_named(ran):
    layer = cen_ext.Conv3x3(32, 32).to(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    if dispatch.BACKENDS["conv3x3"]["cpu"].why_not(x, layer.weight, layer.bias) is not None:
        pytest.skip("its kernels do not run on this processor")
    y = layer(x)
    with cen_ext.use_backend("reference"):
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
    with cen_ext.use_backend("cpu"):
        layer(x)
    layer.backend = "reference"
    layer(x)
    assert ran == ["cpu", "reference", "cpu", "reference"]


@pytest.mark.parametrize("layer_class", LAYERS)
def test_the_layer_precedes_the_context(ran, layer_class):
    x = torch.randn(4, 6, 5, 4, dtype=torch.float64)
    layer = make_layer(layer_class, backend="reference")
    with cen_ext.use_backend(None):
        layer(x)
    assert ran == ["reference"]
    net = nn.Sequential(nn.BatchNorm2d(6), nn.InstanceNorm2d(6)).double()
    cen_ext.make_multimodal(net, 2, backend="reference")(x)
    assert ran == ["reference"] * 3
    del layer.backend  # as in pickles from before there was one
    with cen_ext.use_backend("reference"):
        layer(x)
    assert ran == ["reference"] * 4


def test_a_decorated_function_of_this_thread(ran):
    x = torch.randn(4, 6, 5, 4)

    @cen_ext.use_backend("reference")
    def decorated(depth: int) -> None:
        CALLS["pixel_shift"](x)
        if depth > 0:
            decorated(depth - 1)

    decorated(1)
    context = cen_ext.use_backend("reference")
    with context, cen_ext.use_backend(None), context:
        CALLS["pixel_shift"](x)
        other = threading.Thread(target=CALLS["pixel_shift"], args=(x,))
        other.start()
        other.join()
    CALLS["pixel_shift"](x)
    assert ran[:3] == ["reference"] * 3
    assert (
        ran[3] == ran[4] == next(n for n, b in dispatch.BACKENDS["pixel_shift"].items() if not b.why_not(x))
    )


@pytest.mark.parametrize(
    "given",
    [
        lambda: cen_ext.use_backend("cudnn"),
        lambda: ExchangeBatchNorm2d(6, 2, backend="cudnn"),
        lambda: cen_ext.Conv3x3(6, 6, backend="triton"),
        lambda: cen_ext.make_multimodal(nn.BatchNorm2d(6), 2, backend="cudnn"),
    ],
)
def test_an_unknown_name_is_refused_where_it_is_given(given):
    with pytest.raises(ValueError, match=r"backend must be one of .* or None, got '(cudnn|triton)'"):
        given()


# --- derivatives ---


@every_op
def test_second_and_forward_derivatives_by_the_switch(op):
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    with cen_ext.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: CALLS[op](x * x), x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x: CALLS[op](x * x), x)


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_transforms_of_layers(layer_class, training, switched):
    """Compared with a backward pass and single calls; as in torch, statistics to update are passed."""
    lender = (1 - torch.arange(2)[:, None]).expand(2, 6)
    layer = make_layer(layer_class, **({} if training else {"lender": lender})).train(training)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x, residual, t = torch.randn(3, 4, 6, 5, 4, dtype=torch.float64)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return functional_call(layer, (parameters, buffers), (x, residual))

    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters.values())]
    y = call(dict(zip(parameters, leaves[1:], strict=True)), leaves[0])
    expected = torch.autograd.grad(y, leaves, t)
    with cen_ext.use_backend("reference" if switched else None):
        _, pull = torch.func.vjp(call, parameters, x)
        gradients, dx = pull(t)
        torch.testing.assert_close((dx, *gradients.values()), expected)
        _, pushed = torch.func.jvp(lambda x: call(parameters, x), (x,), (t,))
        torch.testing.assert_close((pushed * t).sum(), (expected[0] * t).sum())
        if not training:
            both = torch.stack([x, t], 3)
            mapped = torch.func.vmap(lambda x: call(parameters, x), in_dims=3)(both)
            torch.testing.assert_close(mapped, torch.stack([call(parameters, x), call(parameters, t)]))


@compiled
@quiet
@every_op
def test_what_only_the_reference_can_do_names_the_switch(op):
    x = torch.randn(4, 6, 5, 4)
    refused = r"'cpu' cannot run this call: .*; .*cen_ext\.use_backend\('reference'\)"
    for act in (
        lambda call: torch.func.vmap(call)(x[None]),
        lambda call: torch.func.jvp(call, (x,), (x,)),
        lambda call: torch.jit.trace(call, (x,)),
    ):
        with pytest.raises(RuntimeError, match=refused):
            act(lambda x: CALLS[op](x, backend="cpu"))


# --- compilers and tracers ---


def ops_of(program: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("cen_ext.")}


@compiled
def test_compiled_functions_follow_the_switch_in_one_graph():
    layer, found = make_layer(ExchangeBatchNorm2d), []
    x = torch.randn(4, 6, 5, 4, dtype=torch.float64)

    def backend(program, inputs):
        found.append(len(ops_of(program)))
        return program.forward

    def both(x):
        with cen_ext.use_backend("reference"):
            y = layer(x)
        return y, layer(x)

    compiled_layer = torch.compile(layer, backend=backend, fullgraph=True)
    for switched in (None, "reference", None):  # a graph of its own each, used again
        with cen_ext.use_backend(switched):
            torch.testing.assert_close(compiled_layer(x), layer(x))
    for function in (both, cen_ext.use_backend("reference")(layer.forward)):
        y = torch.compile(function, backend=backend, fullgraph=True)(x)
        torch.testing.assert_close(y, function(x))
    assert found == [1, 0, 1, 0]


def test_compiled_functions_have_gradients_by_the_switch():
    layer = make_layer(ExchangeBatchNorm2d)
    x = torch.randn(4, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    with cen_ext.use_backend("reference"):
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(layer(x).sum(), x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda call: lambda x: torch.func.grad(lambda x: call(x).square().sum())(x),
        lambda call: lambda x: torch.func.jvp(call, (x,), (x.cos(),))[1],
        lambda call: lambda x: torch.func.vmap(call)(torch.stack([x, x.sin()])),
    ],
)
def test_compiled_transforms_take_the_reference(transform):
    layer = make_layer(ExchangeBatchNorm2d)
    function = transform(layer)
    x = torch.randn(4, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


@compiled
def test_exported_programs_keep_the_kernels():
    net, x = nn.Sequential(make_layer(ExchangeBatchNorm2d)), torch.randn(4, 6, 5, 4, dtype=torch.float64)
    assert len(ops_of(torch.export.export(net, (x,)).graph_module)) == 1
    with cen_ext.use_backend("reference"):
        program = torch.export.export(net, (x,))
    assert ops_of(program.graph_module) == set()
    torch.testing.assert_close(program.module()(x), net(x))


def saved_and_loaded(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@quiet
@every_op
def test_traced_ops_take_other_sizes(op):
    traced = saved_and_loaded(torch.jit.trace(CALLS[op], (torch.randn(4, 6, 5, 4),)))
    for rows, width in ((4, 4), (2, 7)):
        x = torch.randn(rows, 6, 5, width)
        torch.testing.assert_close(traced(x), CALLS[op](x))


@quiet
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer_class", LAYERS)
def test_traced_layers_do_what_the_layer_does(layer_class, training):
    layer = make_layer(layer_class).train(training)
    x, residual, other = torch.randn(3, 4, 6, 5, 4, dtype=torch.float64)
    traced = saved_and_loaded(torch.jit.trace(layer, (x, residual), check_trace=False))
    for inputs in ((x, residual), (other[:2], residual[2:])):
        torch.testing.assert_close(traced(*inputs), layer(*inputs))


NETWORKS = {
    "refinenet": lambda **options: models.refinenet("resnet18", 3, width=8, **options),
    "pspnet": lambda **options: models.pspnet("resnet18", 3, width=8, aux=False, **options),
    "deeplabv3plus": lambda **options: models.deeplabv3plus("resnet18", 3, width=8, **options),
    "unet": lambda **options: models.unet(size=16, base_width=4, **options),
    "patchgan": lambda **options: models.patchgan(3, base_width=4, **options),
}


@on_cpus
@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_ops_run_the_backend_that_it_names(ran, name):
    build, x = NETWORKS[name], torch.randn(2, 3, 32, 32)
    net, usual = build(backend="reference").eval(), build().eval()
    usual.load_state_dict(net.state_dict())
    usual(x)
    assert "cpu" in ran
    ran.clear()
    net(x)
    assert set(ran) == {"reference"}
    with cen_ext.use_backend("reference"):
        torch.testing.assert_close(list(pytree.tree_leaves(usual(x))), list(pytree.tree_leaves(net(x))))
    with cen_ext.use_backend("cpu"):  # the network's own name comes first
        ran.clear()
        net(x)
        assert set(ran) == {"reference"}
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cudnn'"):
        build(backend="cudnn")
