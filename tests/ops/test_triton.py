"""The Triton backend: through Triton's interpreter, compiled ahead of time, traced by compilers, on a GPU."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cen_ext
from cen_ext.ops import dispatch
from cen_ext.ops.activation import NAMES
from cen_ext.ops.norm_exchange.options import ACROSS_CHANNELS
from cen_ext.ops.norm_exchange.reference import DTYPES, Options, statistics_dtype
from tests.helpers.alone import run_alone
from tests.helpers.cases import SMALL, Shape, make_inputs
from tests.helpers.covered import NORMS, every_kind
from tests.helpers.tolerance import (
    Call,
    Results,
    assert_within,
    bounds,
    check,
    run,
    run_definition,
    without_kinks,
)
from tests.ops.test_contract import EMPTY, LARGE, calls, check_any_call, divisors

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cen_ext.ops.norm_exchange.triton import backward, forward, launch, layer  # noqa: E402
from cen_ext.ops.norm_exchange.triton.plan import (  # noqa: E402
    PROGRAMS_PER_MULTIPROCESSOR,
    WHOLE_VALUES,
    Geometry,
    Plan,
    layer_pass_plan,
    layer_plan,
    layer_programs,
    pass_constants,
    pass_plan,
    whole_plan,
)
from cen_ext.ops.triton import INTERPRETED  # noqa: E402

THRESHOLD = 2.0**-6
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in processes of test_through_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
STATE = "kernels are interpreted" if INTERPRETED else cen_ext.available_backends()["triton"]


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(STATE != "ok", reason=STATE)(test))


EVERY_NORM = (*NORMS, *ACROSS_CHANNELS)
both_layouts = pytest.mark.parametrize("channels_last", [False, True])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- through the interpreter, in processes of their own: it must be asked for before kernels are defined ---

SELECTED = {
    # Channels in one piece: every kind of call.
    "whole": "triton and ("
    "interpreted or empty or twice or autocast or any_batch or test_pixel_shift and (values or adjoint)"
    " or test_numerics and not long and (True-triton-batch-float32 or instance-bfloat16)"
    " or test_every_norm and (rounding and float32 or far))",
    # Channels in pieces: what sums over pieces have to do with.
    "PASSES": "triton and (interpreted_values"
    " or test_numerics and not long and not a_channel and False-triton-batch-float32)",
}


def run_selected(mode: str) -> subprocess.CompletedProcess[str]:
    files = [
        f"test_{name}" for name in ("triton", "contract", "numerics", "compile", "pixel_shift", "every_norm")
    ]
    environment = {"TRITON_INTERPRET": "1", mode: "1"}
    return run_alone(files, SELECTED[mode], "-p", "tests.helpers.interpreted_triton", **environment)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Side by side."""
    with ThreadPoolExecutor() as pool:
        yield {mode: pool.submit(run_selected, mode) for mode in SELECTED}


@not_interpreted
@pytest.mark.parametrize("mode", SELECTED)
def test_through_the_interpreter(mode, runs):
    result = runs[mode].result()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 20


# Hypothesis draws the same calls for every type: the others, which differ from float32 in loads and stores
# alone, get the first of them. Several programs a channel take longer to interpret; as do many rows, and many
# modalities, which kernels go over one by one: test_interpreted_more_modalities_than_eight has eleven.
EXAMPLES, OF_OTHER_TYPES = (8, 4) if "PASSES" in os.environ else (16, 6)


@interpreted
@every_kind(norms=EVERY_NORM, names=["triton"] if INTERPRETED else [])
def test_interpreted_values_and_gradients(backend, norm, dtype):
    examples = EXAMPLES if dtype == torch.float32 else OF_OTHER_TYPES

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(data=st.data())
    def any_call(data):
        check_any_call(backend, *data.draw(calls(norm, dtype, most_modalities=5, most_rows=3)))

    any_call()


@interpreted
@both_layouts
@pytest.mark.parametrize("statistics_given", [False, True])
def test_interpreted_more_modalities_than_eight(channels_last, statistics_given):
    i = make_inputs(Shape(11, 2, 13, (3, 4)), torch.float32, channels_last)
    statistics = (i.mean, i.var) if statistics_given else (None, None)
    options = Options(THRESHOLD, "all", activation="leaky_relu")
    check("triton", Call(i.x, i.weight, i.bias, *statistics, i.residual, options), i.dy)


@interpreted
@both_layouts
@pytest.mark.parametrize(
    ("norm", "order"),
    [
        ("batch", "modality"),
        ("batch", "sample"),
        ("instance", "sample"),
        ("group", "sample"),
        ("layer", "modality"),
        ("layer", "sample"),
    ],
)
def test_interpreted_with_offsets_of_64_bits(norm, order, channels_last, monkeypatch):
    i = make_inputs(Shape(2, 3, 6, (5, 7)), torch.float32, channels_last)
    options = Options(THRESHOLD, norm=norm, order=order, num_groups=groups_of(norm))
    call = Call(i.x, i.weight, i.bias, residual=i.residual, options=options)
    narrow = run("triton", call, i.dy)
    monkeypatch.setattr(Geometry, "values", 2**31)
    assert_same_bits(run("triton", call, i.dy), narrow)


def groups_of(norm: str) -> int:
    return 2 if norm == "group" else 1


@interpreted
@pytest.mark.parametrize(
    ("norm", "statistics_given"),
    [*itertools.product(NORMS, [False, True]), ("layer", False), ("group", False)],
)
def test_interpreted_opcheck(norm, statistics_given):
    i = make_inputs(Shape(2, 2, 6, (4, 5)), torch.float32, channels_last=statistics_given)
    mean, var = (i.mean, i.var) if statistics_given else (None, None)
    order = "sample" if statistics_given else "modality"
    options = Options(THRESHOLD, norm=norm, activation="relu", order=order, num_groups=groups_of(norm))
    leaves = [t.clone().requires_grad_() for t in (i.x, i.weight, i.bias)]
    residual = i.residual.requires_grad_()
    torch.library.opcheck(launch.triton_norm_exchange, (*leaves, mean, var, residual, *options))
    if mean is None or var is None:
        _, mean, var = launch.triton_norm_exchange(i.x, i.weight, i.bias, None, None, None, *options)
    torch.library.opcheck(
        launch.triton_norm_exchange_backward,
        (i.dy, i.x, i.weight, i.bias, mean, var, i.residual.detach(), not statistics_given, *options),
    )


def assert_same_bits(a: Results, b: Results) -> None:
    for name in Results._fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


# --- why it cannot run ---


@not_interpreted
def test_refuses_what_it_cannot_run():
    x = torch.randn(2, 3, 4)
    reason = "x is not on a GPU"
    assert dispatch.why_not_triton(x) == reason
    table = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run this call: {reason}"):
        cen_ext.norm_exchange(x, table, table, table, table, backend="triton")
    if not torch.cuda.is_available():
        assert cen_ext.available_backends()["triton"] == "there is no GPU"


# --- how calls are cut ---


def alone(g: Geometry) -> bool:
    """Whether x has a single line."""
    return g.channels_last and g.step == 1


geometries = st.builds(
    Geometry,
    modalities=st.integers(1, 12),
    units=st.integers(1, 64),
    channels=st.integers(1, 4096),
    lines=st.integers(1, 64),
    positions=st.integers(1, 300_000),
    channels_last=st.booleans(),
    step=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 1, 3, 8]),
).map(lambda g: replace(g, channels=g.channels * g.group, lines=1 if alone(g) else g.lines))


@given(geometries, st.sampled_from(DTYPES), st.sampled_from([2048, 4096]), st.sampled_from([20, 132]))
@settings(derandomize=True)
def test_passes_cover_x_and_keep_the_device_busy(g, dtype, values, multiprocessors):
    plan = pass_plan(g, dtype, values, multiprocessors)
    assert_powers_of_two(plan)
    assert plan.chunks(g) * plan.tiles >= plan.pieces(g) > (plan.chunks(g) - 1) * plan.tiles
    tile = plan.channels * plan.lines * plan.positions
    assert tile * g.modalities <= max(values, 256 * g.modalities)
    if plan.tiles > 1:
        assert plan.programs(g) >= PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    assert pass_plan(g, dtype, values, multiprocessors, 4).tiles <= 4


@given(geometries, st.sampled_from(DTYPES), st.sampled_from([1, 2]))
@settings(derandomize=True)
def test_whole_channels_fit_a_program(g, dtype, tensors):
    plan = whole_plan(g, dtype, tensors)
    if plan is None:
        one = triton.next_power_of_2(g.lines) * triton.next_power_of_2(g.positions) * g.modalities * tensors
        least = max(triton.next_power_of_2(g.group), 32 // dtype.itemsize if g.channels_last else 1)
        assert one * least > WHOLE_VALUES // 2
        return
    assert_powers_of_two(plan)
    assert plan.pieces(g) == plan.chunks(g) == 1
    places = triton.next_power_of_2(g.group)
    assert plan.channels % places == 0
    groups_of_all = plan.programs(g) // g.units * (plan.channels // places)
    assert 0 <= groups_of_all - g.channels // g.group < plan.channels // places
    tile = plan.channels * plan.lines * plan.positions * g.modalities * tensors
    assert tile <= WHOLE_VALUES
    assert tile <= 64 * 32 * plan.warps * (2 if plan.warps < 16 else 1)


@given(geometries, st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.sampled_from([20, 132]))
@settings(derandomize=True)
def test_positions_of_layer_norm_fit_a_program_and_are_all_there(g, dtype, tensors, multiprocessors):
    plan = layer_plan(g, dtype, tensors, multiprocessors)
    assert_powers_of_two(plan)
    tile = plan.channels * plan.lines * plan.positions * g.modalities * tensors
    programs = layer_programs(g, plan, multiprocessors)
    if plan.channels >= g.channels:
        assert tile <= WHOLE_VALUES
        assert tile <= 32 * 32 * plan.warps * (2 if plan.warps == 16 else 1)
        assert programs == plan.pieces(g) or programs * plan.warps >= 16 * multiprocessors
    else:
        assert tile <= max(4096, 256 * tensors * g.modalities)
        assert programs == plan.pieces(g)


def assert_powers_of_two(plan: Plan) -> None:
    for size in (plan.channels, plan.lines, plan.positions, plan.tiles, plan.warps):
        assert size == triton.next_power_of_2(size)


# --- ahead of time, for GPUs that need not be there ---

KERNELS = {
    "statistics": forward.statistics_kernel,
    "join": forward.join_kernel,
    "forward": forward.forward_kernel,
    "forward_whole": forward.forward_whole_kernel,
    "backward_sums": backward.backward_sums_kernel,
    "backward": backward.backward_kernel,
    "backward_whole": backward.backward_whole_kernel,
    "layer": layer.layer_kernel,
    "layer_whole": layer.layer_whole_kernel,
    "layer_backward": layer.layer_backward_kernel,
    "layer_backward_whole": layer.layer_backward_whole_kernel,
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
TENSORS = ("x", "y", "dy", "dx", "residual", "dresidual")


def geometry_of(shape: Shape, channels_last: bool, order: str, group: int = 1) -> Geometry:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape.full, device="meta", memory_format=layout)
    return Geometry.of(x, shape.num_modalities, 1 if group == 1 else shape.batch, order, group)


def planned(name: str, g: Geometry, dtype: torch.dtype) -> Plan:
    if not name.endswith("whole"):
        return (layer_pass_plan if name.startswith("layer") else pass_plan)(g, dtype, 2048, 132)
    tensors = 2 if "backward" in name else 1
    plan = layer_plan(g, dtype, tensors, 132) if name.startswith("layer") else whole_plan(g, dtype, tensors)
    assert plan is not None
    return plan


def compile_ahead(
    name: str,
    capability: int,
    dtype: torch.dtype,
    shape: Shape,
    channels_last: bool,
    options: Options,
    routed: bool = False,
    group: int = 1,
) -> str:
    """The PTX of a kernel as it would be launched for a call with a residual, and with a route if routed."""
    g = geometry_of(shape, channels_last, options.order, group)
    plan = planned(name, g, dtype)
    cut = pass_constants(g, plan) | dict(GROUP=group, BLOCK_G=4, MEMBERS=4)
    constants = launch.call_constants(options, shape.num_modalities, routed) | cut
    constants |= {} if routed else dict(route=None)
    sizes = dict(zip(("units", "C", "L", "P", "chunks"), (*g.sizes, plan.chunks(g)), strict=True))

    signature, compiled_in, attributes = {}, {}, {}
    kernel = KERNELS[name]
    for index, argument in enumerate(kernel.arg_names):
        if sizes.get(argument, 1) > 1:
            signature[argument] = "i32"
            aligned = sizes[argument] % 16 == 0
        elif argument in sizes or argument in constants:  # a size of 1 is made a constant
            signature[argument], compiled_in[argument] = "constexpr", (constants | sizes)[argument]
            aligned = False
        else:
            table = {"partials": "fp64", "route": "i32"}.get(argument, TYPES[statistics_dtype(dtype)])
            signature[argument] = "*" + (TYPES[dtype] if argument in TENSORS else table)
            aligned = True
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, compiled_in, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": plan.warps}
    )
    return compiled.asm["ptx"]


@not_interpreted
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("capability", "dtype", "modalities", "channels_last"),
    [
        (80, torch.float32, 2, False),
        (80, torch.bfloat16, 3, True),
        (90, torch.bfloat16, 2, False),
        (90, torch.float16, 1, False),
        (90, torch.float64, 2, False),
    ],
    ids=str,
)
def test_compiles_ahead_of_time(name, capability, dtype, modalities, channels_last):
    order = "sample" if dtype == torch.bfloat16 else "modality"
    options = Options(THRESHOLD, activation="leaky_relu", order=order)
    shape = Shape(modalities, 3, 20, (5, 7))
    group = 5 if dtype == torch.bfloat16 else 1
    routed = modalities == 3
    ptx = compile_ahead(name, capability, dtype, shape, channels_last, options, routed, group)
    assert f".target sm_{capability}" in ptx


@not_interpreted
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", [Shape(2, 6, 1, (1, 1)), Shape(2, 1, 5, (1, 4))], ids=str)
def test_sizes_of_one_compile(name, shape):
    """Triton makes constants of them."""
    assert compile_ahead(name, 90, torch.float32, shape, False, Options(THRESHOLD, activation="relu"))


# Tensors of the size of x that a tile is read of.
READ = {
    "forward": 2,
    "backward": 3,
    "backward_sums": 3,
    "statistics": 1,
    "layer": 3,
    "layer_whole": 2,
    "layer_backward": 6,
    "layer_backward_whole": 3,
}


@not_interpreted
@both_layouts
@pytest.mark.parametrize(
    ("dtype", "order"),
    [(torch.float32, "modality"), (torch.bfloat16, "modality"), (torch.float32, "sample")],
    ids=str,
)
@pytest.mark.parametrize("name", READ)
def test_tensors_of_even_sizes_are_read_and_written_by_16_bytes(name, dtype, order, channels_last):
    shape = Shape(2, 6, 64, (64, 64))
    options = Options(THRESHOLD, activation="relu", order=order)
    ptx = compile_ahead(name, 90, dtype, shape, channels_last, options)
    loads, stores = (re.findall(rf"{way}\.global\S*", ptx) for way in ("ld", "st"))
    # A thread's vectors of a tile.
    plan = planned(name, geometry_of(shape, channels_last, order), dtype)
    values = shape.num_modalities * plan.channels * plan.lines * plan.positions
    vectors = values // (32 * plan.warps) * dtype.itemsize // 16
    tensors = READ[name]
    assert sum("v4.b32" in load for load in loads) >= vectors * tensors
    if name != "statistics":  # whose results are tables
        assert sum("v4.b32" in store for store in stores) >= vectors
    if name in ("forward", "backward"):  # the others store tables, too
        assert all("v4.b32" in store for store in stores)


# --- traced, as torch.compile does ---


@not_interpreted
@pytest.mark.parametrize(
    ("shape", "norm", "statistics_given", "kernels"),
    [
        # Statistics, their join and y; sums of gradients, and dx.
        (Shape(2, 2, 6, (160, 160)), "batch", False, 5),
        (Shape(2, 2, 6, (16, 16)), "batch", False, 2),
        (Shape(2, 2, 6, (160, 160)), "batch", True, 2),
        (Shape(2, 2, 6, (160, 160)), "group", False, 5),
        (Shape(2, 2, 6, (16, 16)), "group", False, 2),
        (Shape(2, 2, 6, (16, 16)), "layer", False, 2),
        (Shape(2, 2, 20_000, (2, 2)), "layer", False, 2),
    ],
    ids=str,
)
def test_compilers_see_the_kernels(shape, norm, statistics_given, kernels, monkeypatch):
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._subclasses import FakeTensorMode

    options = Options(THRESHOLD, norm=norm, activation="relu", num_groups=groups_of(norm))

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor]:
        statistics = (bias.detach(), weight.detach()) if statistics_given else (None, None)
        return (launch.triton_norm_exchange(x, weight, bias, *statistics, residual, *options)[0],)

    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", device)  # there need be none
    with FakeTensorMode():
        i = make_inputs(shape, torch.float32)
        leaves = [t.requires_grad_() for t in (i.x, i.weight, i.bias, i.residual)]
        graph = aot_export_joint_simple(call, leaves, trace_joint=True).graph
    launches = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(launches) == kernels
    inputs = {node for node in graph.nodes if node.op == "placeholder"}
    for node in launches:  # nothing but what was allocated for results is written
        written = node.kwargs["tensors_to_clone"]
        assert written
        assert not inputs & {node.kwargs["kwargs"][name] for name in written}


# --- on a GPU ---


def check_on_gpu(call: Call, dy: Tensor) -> None:
    """The bounds are those of the definition on the CPU."""
    dy = without_kinks(call, dy)
    *tensors, route = (t if t is None else t.cuda() for t in (*call[:6], call.route))
    there = Call(*tensors, call.options, route)
    found = Results(*(t if t is None else t.cpu() for t in run("triton", there, dy.cuda())))
    assert_within(found, run_definition(call, dy), bounds(call, dy))


def draw_kinds() -> Iterator[tuple[Shape, bool, bool, torch.dtype, str, str]]:
    """Every combination of options compiles kernels of its own: shapes and layouts draw one each."""
    draw = random.Random(0).choice
    for shape, channels_last, statistics_given in itertools.product(
        [*SMALL, *LARGE], [False, True], [False, True]
    ):
        activation = draw(NAMES)
        norm = draw(NORMS if statistics_given else EVERY_NORM)
        yield shape, channels_last, statistics_given, draw(DTYPES), norm, activation


@on_a_gpu
@pytest.mark.parametrize(
    ("shape", "channels_last", "statistics_given", "dtype", "norm", "activation"), list(draw_kinds()), ids=str
)
def test_values_on_a_gpu(shape, channels_last, statistics_given, dtype, norm, activation):
    if norm == "instance" and not statistics_given and not shape.spatial:
        pytest.skip("instance norm needs more than one value per row")
    i = make_inputs(shape, dtype, channels_last)
    statistics = (i.mean, i.var) if statistics_given else (None, None)
    groups = divisors(shape.channels)[-2:][0] if norm == "group" else 1
    options = Options(THRESHOLD, norm=norm, activation=activation, num_groups=groups)
    for residual in (None, i.residual):
        check_on_gpu(Call(i.x, i.weight, i.bias, *statistics, residual, options), i.dy)


@on_a_gpu
@pytest.mark.parametrize("norm", EVERY_NORM)
@every_dtype
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_on_a_gpu(norm, dtype, data):
    check_on_gpu(*data.draw(calls(norm, dtype)))


@on_a_gpu
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_on_a_gpu(shape):
    x = torch.empty(shape, device="cuda", requires_grad=True)
    weight, bias = (torch.rand(2, shape[1], device="cuda", requires_grad=True) for _ in range(2))
    y = cen_ext.norm_exchange(x, weight, bias, training=True, threshold=1.0, backend="triton")
    assert y.shape == shape
    for leaf, gradient in zip(
        (x, weight, bias), torch.autograd.grad(y.sum(), (x, weight, bias)), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def gpu_step(shape: Shape, dtype: torch.dtype, channels_last: bool, norm: str = "batch"):
    """Leaves on the GPU, and a function of them that gives y and all gradients."""
    i = make_inputs(shape, dtype, channels_last)
    leaves = [t.cuda().requires_grad_() for t in (i.x, i.weight, i.bias, i.residual)]
    dy = i.dy.cuda()

    def step(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        y = cen_ext.norm_exchange(
            x,
            weight,
            bias,
            residual=residual,
            threshold=THRESHOLD,
            training=True,
            activation="relu",
            backend="triton",
            norm=norm,
            num_groups=2 if norm == "group" else None,
        )
        return [y, *torch.autograd.grad(y, (x, weight, bias, residual), dy)]

    return leaves, step


# In pieces, and whole.
STEPS = pytest.mark.parametrize("shape", [Shape(2, 2, 64, (130, 131)), Shape(2, 3, 20, (17, 19))], ids=str)


@on_a_gpu
@STEPS
@both_layouts
def test_compiled_on_a_gpu(shape, channels_last):
    leaves, _ = gpu_step(shape, torch.float32, channels_last)

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = cen_ext.norm_exchange(
            2 * x, weight, bias, residual=residual, threshold=THRESHOLD, training=True, backend="triton"
        )
        return y.square()

    torch.compiler.reset()
    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    torch.testing.assert_close(results[1], results[0])


@on_a_gpu
@STEPS
@both_layouts
def test_captured_in_a_cuda_graph(shape, channels_last):
    leaves, step = gpu_step(shape, torch.float32, channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.flip(0))
    graph.replay()
    for ours, theirs in zip(captured, step(*leaves), strict=True):
        assert torch.equal(ours, theirs)


@on_a_gpu
@STEPS
@both_layouts
@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_a_gpu(dtype, norm, shape, channels_last):
    leaves, step = gpu_step(shape, dtype, channels_last, norm)
    first = step(*leaves)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(*leaves), first, strict=True))


@on_a_gpu
@both_layouts
def test_more_than_two_billion_values(channels_last):
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(
        2 * 9, 64, 1400, 1400, dtype=torch.bfloat16, device="cuda", memory_format=layout
    ).normal_()
    assert x.numel() > 2**31
    table = torch.randn(4, 2, 64, device="cuda")
    options = Options(0.5, region="all")
    weight, bias, mean, var = table[0], table[1], table[2], table[3].square() + 0.1
    run_triton, run_reference = (
        dispatch.choose("norm_exchange", name, x, options).run for name in ("triton", "reference")
    )
    y = run_triton(x, weight, bias, mean, var, None, options)[0]
    rows = [8, 17]  # the last of each modality
    expected = run_reference(x[rows], weight, bias, mean, var, None, options)[0]
    torch.testing.assert_close(y[rows], expected)
    _, found_mean, found_var = run_triton(x, weight, bias, None, None, None, options)
    wanted_var, wanted_mean = torch.var_mean(x[9:, 63].float(), correction=0)
    torch.testing.assert_close(found_mean[1, 63], wanted_mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_var[1, 63], wanted_var, rtol=1e-5, atol=0)
