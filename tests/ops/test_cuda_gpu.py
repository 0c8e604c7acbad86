"""The CUDA kernels on a GPU, every plan, against the definition in float64 on the CPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import cen_ext
from cen_ext.ops.activation import NAMES
from cen_ext.ops.norm_exchange.reference import DTYPES, Options
from tests.helpers.cases import SMALL, Shape, make_inputs, make_route
from tests.helpers.covered import NORMS, proper_groups
from tests.helpers.tolerance import Call, Results, assert_within, bounds, run_definition, without_kinks

STATE = cen_ext.available_backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(STATE != "ok", reason=STATE)]

PLANS = ("auto", "stream", "cluster", "grid")
# What has statistics of x, and how: layer norm does it in one way.
STATISTICS = [*itertools.product((*NORMS, "group"), PLANS), ("layer", "auto")]
of_every_norm = pytest.mark.parametrize(("norm", "plan"), STATISTICS)
THRESHOLD = 2.0**-6
# Lines that begin anywhere within 16 bytes, several chunks, several strips, some of them partly empty.
LARGE = [
    Shape(2, 3, 64, (63, 61)),
    Shape(2, 2, 20, (130, 131)),
    Shape(3, 2, 72, (40, 40)),
    Shape(2, 8, 512, (2, 2)),
]


def on_gpu(tensor: Tensor | None) -> Tensor | None:
    """There, at the same strides."""
    return None if tensor is None else tensor.detach().to("cuda")


def run(call: Call, dy: Tensor, plan: str = "auto") -> Results:
    """Forward and backward by the ops themselves. Statistics that were given come back as they are."""
    x, weight, bias, mean, var, residual = map(on_gpu, call[:6])
    ops = torch.ops.cen_ext
    y, *found = ops.norm_exchange(
        x, weight, bias, mean, var, residual, *call.options, on_gpu(call.route), plan=plan
    )
    statistics = found if mean is None else (mean, var)
    gradients = ops.norm_exchange_backward(
        on_gpu(dy),
        x,
        weight,
        bias,
        *statistics,
        residual,
        mean is None,
        *call.options,
        on_gpu(call.route),
        plan=plan,
    )
    dresidual = None if residual is None else gradients[3].cpu()
    return Results(y.cpu(), *(t.cpu() for t in (*statistics, *gradients[:3])), dresidual)


@contextlib.contextmanager
def skipped_where_the_plan_does_not_fit() -> Iterator[None]:
    """Not every plan can be had for every problem on every device; other errors pass through."""
    try:
        yield
    except RuntimeError as error:
        if "plan asked for" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])


def check(call: Call, dy: Tensor, plan: str) -> None:
    """Skips where the plan does not fit this problem on this device."""
    dy = without_kinks(call, dy)
    with skipped_where_the_plan_does_not_fit():
        found = run(call, dy, plan)
    assert_within(found, run_definition(call, dy), bounds(call, dy))


def make_call(
    shape: Shape,
    dtype: torch.dtype,
    channels_last: bool,
    given: bool = False,
    residual: bool = False,
    **options: object,
) -> tuple[Call, Tensor]:
    i = make_inputs(shape, dtype, channels_last)
    if options.get("norm") == "group":
        options["num_groups"] = proper_groups(shape.channels)
    statistics = (i.mean, i.var) if given else (None, None)
    return Call(
        i.x, i.weight, i.bias, *statistics, i.residual if residual else None, Options(**options)
    ), i.dy


@of_every_norm
@pytest.mark.parametrize("order", ["modality", "sample"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
def test_statistics_of_x(shape, dtype, channels_last, order, norm, plan):
    if norm == "instance" and not shape.spatial:
        pytest.skip("one value per channel")
    options = dict(threshold=THRESHOLD, norm=norm, activation="relu", order=order)
    check(*make_call(shape, dtype, channels_last, residual=True, **options), plan)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
def test_given_statistics(shape, dtype, channels_last, norm):
    call, dy = make_call(
        shape, dtype, channels_last, given=True, threshold=THRESHOLD, norm=norm, region="all"
    )
    check(call, dy, "auto")


# Teams of one and of several warps, rows that are no whole vectors, and such that shared memory cannot keep.
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *(Shape(2, 4, 96, (28, 28)), Shape(2, 2, 768, (14, 14)), Shape(3, 2, 770, (5, 7))),
        *(Shape(2, 1, 3072, (7, 7)), Shape(5, 1, 4096, (3, 5)), Shape(2, 1, 40000, (2, 4))),
    ],
    ids=str,
)
def test_layer_norm(shape, dtype, channels_last, routed):
    call, dy = make_call(
        shape, dtype, channels_last, residual=True, threshold=THRESHOLD, norm="layer", activation="gelu"
    )
    check(call._replace(route=make_route(shape)) if routed else call, dy, "auto")


@of_every_norm
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [Shape(3, 2, 7, (4, 4)), Shape(2, 3, 64, (63, 61)), Shape(3, 2, 72, (40, 40))], ids=str
)
def test_routes(shape, dtype, channels_last, norm, plan):
    call, dy = make_call(shape, dtype, channels_last, residual=True, norm=norm, activation="relu")
    check(call._replace(route=make_route(shape)), dy, plan)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("region", "criterion"), [("own", "signed"), ("all", "abs")])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_flags(dtype, plan, region, criterion, residual, activation):
    for channels_last in (False, True):
        call, dy = make_call(
            Shape(4, 2, 40, (17, 16)),
            dtype,
            channels_last,
            residual=residual,
            threshold=THRESHOLD,
            region=region,
            criterion=criterion,
            activation=activation,
            negative_slope=0.2,
        )
        check(call, dy, plan)


@of_every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_that_are_not_aligned(dtype, norm, plan):
    call, dy = make_call(Shape(2, 2, 16, (12, 10)), dtype, False, threshold=THRESHOLD, norm=norm)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    x, dy = moved(on_gpu(call.x)), moved(on_gpu(dy))
    assert x.data_ptr() % 16 != 0
    weight, bias = map(on_gpu, call[1:3])
    ops = torch.ops.cen_ext
    for data, gradient in ((x, dy), (x.clone(), dy.clone())):
        with skipped_where_the_plan_does_not_fit():
            y, mean, var = ops.norm_exchange(data, weight, bias, None, None, None, *call.options, plan=plan)
        dx, dweight, dbias, _ = ops.norm_exchange_backward(
            gradient, data, weight, bias, mean, var, None, True, *call.options, plan=plan
        )
        found = Results(*(t.cpu() for t in (y, mean, var, dx, dweight, dbias)))
        assert_within(found, run_definition(call, dy.cpu()), bounds(call, dy.cpu()))


@of_every_norm
@pytest.mark.parametrize("make", ["offset", "1e30", "1e19", "outlier", "constant"])
def test_hard_numbers(make, norm, plan):
    shape = Shape(2, 4, 16, (30, 31))
    for channels_last in (False, True):
        call, dy = make_call(shape, torch.float32, channels_last, threshold=THRESHOLD, norm=norm)
        noise = torch.randn_like(call.x)
        x = {
            "offset": 1e3 + 0.1 * noise,
            "1e30": torch.full_like(noise, 1e30),
            "1e19": 1e18 * noise.clamp(-10, 10),
            "outlier": torch.where(torch.rand_like(noise) < 1e-4, 1e6 * noise, noise),
            "constant": torch.full_like(noise, -3.7),
        }[make]
        check(call._replace(x=x), dy, plan)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_running_statistics(norm, plan):
    i = make_inputs(Shape(2, 3, 24, (20, 20)), torch.float32)
    expected = i.mean.clone(), i.var.clone()
    cen_ext.norm_exchange(
        i.x, i.weight, i.bias, *expected, norm=norm, training=True, momentum=0.3, backend="reference"
    )
    x, weight, bias, mean, var = map(on_gpu, i[:5])
    with skipped_where_the_plan_does_not_fit():
        torch.ops.cen_ext.norm_exchange_updating(
            x, weight, bias, mean, var, None, 0.3, *Options(norm=norm), plan=plan
        )
    for found, wanted in zip((mean, var), expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


@of_every_norm
def test_the_same_bits_every_time(norm, plan):
    call, dy = make_call(
        Shape(2, 3, 64, (63, 61)), torch.float32, True, threshold=THRESHOLD, activation="relu", norm=norm
    )
    with skipped_where_the_plan_does_not_fit():
        first = run(call, dy, plan)
    for _ in range(5):
        for again, once in zip(run(call, dy, plan), first, strict=True):
            assert once is None or torch.equal(again, once)


def module_and_input() -> tuple[cen_ext.ExchangeBatchNorm2d, Tensor]:
    module = cen_ext.ExchangeBatchNorm2d(64, 2, threshold=THRESHOLD, activation="relu").cuda()
    with torch.no_grad():
        module.weight[:, ::3] = 0.001
    return module, torch.randn(8, 64, 28, 28, device="cuda")


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the step, and the result that it overwrites."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    return graph, y


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_one_graph_holds_norms_across_channels(norm):
    i = make_inputs(Shape(2, 4, 64, (28, 28)), torch.float32)
    leaves = [on_gpu(t).requires_grad_() for t in (i.x, i.weight, i.bias)]
    num_groups = proper_groups(64) if norm == "group" else 1

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = cen_ext.norm_exchange(*leaves, norm=norm, num_groups=num_groups, threshold=THRESHOLD)
        (y * y).sum().backward()
        return y

    graph, y = captured(step)
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    replayed = [t.clone() for t in (y, *(leaf.grad for leaf in leaves))]
    eager = step()
    for found, wanted in zip(replayed, (eager, *(leaf.grad for leaf in leaves)), strict=True):
        assert torch.equal(found, wanted)


def test_one_graph_holds_a_whole_step():
    """Captured once, replayed on new numbers: no synchronisation, no memory that goes away."""
    module, x = module_and_input()
    x.requires_grad_()

    def step() -> Tensor:
        module.zero_grad()
        x.grad = None
        y = module(x)
        (y * y).sum().backward()
        return y

    graph, y = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    before = module.running_mean.clone()
    graph.replay()
    replayed = [t.clone() for t in (y, x.grad, module.weight.grad, module.bias.grad)]
    after = module.running_mean.clone()
    assert not torch.equal(before, after)
    with torch.no_grad():
        module.running_mean.copy_(before)
    eager = step()
    for found, wanted in zip(replayed, (eager, x.grad, module.weight.grad, module.bias.grad), strict=True):
        assert torch.equal(found, wanted)


def test_work_goes_to_the_current_stream():
    module, x = module_and_input()
    expected = module(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows on another stream would not wait for it
        later = torch.randn_like(x).copy_(x)
        y = module(later)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_nothing_waits_for_the_gpu():
    module, x = module_and_input()
    x.requires_grad_()
    module(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_that_of_results():
    """Beyond outputs, tables of statistics only."""
    module, x = module_and_input()
    x = torch.randn(16, 64, 100, 100, device="cuda")
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        module(x)
        used = torch.cuda.max_memory_allocated() - before
    assert used <= 1.1 * x.numel() * x.element_size()


def test_compile_without_a_break():
    module, x = module_and_input()
    compiled = torch.compile(module, fullgraph=True)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y = module(a)
    module.running_mean.zero_()
    module.running_var.fill_(1)
    z = compiled(b)
    torch.testing.assert_close(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_autocast_leaves_x_and_keeps_parameters():
    module, x = module_and_input()
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert module.weight.dtype == torch.float32


def test_more_than_2_to_the_31_values():
    """Offsets do not fit in 32 bits; the last channels of the last rows are compared."""
    free, _ = torch.cuda.mem_get_info()
    rows, channels, side = 8, 512, 740  # 2.24e9 values of two bytes
    if free < 5 * rows * channels * side * side * 2:
        pytest.skip("needs 22 GB of the GPU's memory")
    x = torch.randn(rows, channels, side, side, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.ones(2, channels, device="cuda"), torch.randn(2, channels, device="cuda")
    last = slice(channels - 4, channels)  # of modality 1's own
    weight[1, last] = 0.1
    y = cen_ext.norm_exchange(x, weight, bias, training=True, threshold=0.5, backend="cuda")
    wanted = cen_ext.norm_exchange(
        *(t[:, last].cpu().double() for t in (x, weight, bias)),
        training=True,
        threshold=0.5,
        region="all",  # the slice's
        backend="reference",
    )
    torch.testing.assert_close(y[:, last].cpu().double(), wanted, rtol=2**-7, atol=1e-2)


def test_sanitizer_subset():
    """A little of everything, small enough for compute-sanitizer, which ``make gpu`` runs it under."""
    for norm, plan in STATISTICS:
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True):
                call, dy = make_call(
                    Shape(2, 2, 9 if dtype == torch.float32 else 16, (7, 6)),
                    dtype,
                    channels_last,
                    residual=True,
                    threshold=THRESHOLD,
                    norm=norm,
                    activation="leaky_relu",
                )
                try:
                    check(call, dy, plan)
                except pytest.skip.Exception:
                    continue
