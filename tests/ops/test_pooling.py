"""Max pooling on every backend: values and gradients, what is kept, how it compiles, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import cen_ext
from bench.harness.memory import tensor_bytes
from cen_ext import max_pool_same
from cen_ext.ops import dispatch
from cen_ext.ops.norm_exchange.reference import DTYPES, memory_format
from tests.helpers.alone import check_instruction_set, other_instruction_sets, run_alone
from tests.ops.test_contract import layouts

BACKENDS = [name for name, backend in dispatch.BACKENDS["max_pool_same"].items() if backend.why_not() is None]
INTERPRETED = dispatch._INTERPRETED
DEVICE = "cuda" if "triton" in BACKENDS and not INTERPRETED else "cpu"

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
not_reference = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")


LARGE = [(2, 70, 23, 19), (1, 3, 130, 131), (1, 2100, 6, 9)]


def on_device_of(backend: str, x: Tensor) -> Tensor:
    return x.to(DEVICE) if backend == "triton" else x


def definition(x: Tensor, size: int, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx in float64, which tells apart and orders whatever the smaller types do."""
    x = x.double().requires_grad_()
    y = max_pool_same(x, size, backend="reference")
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def run(backend: str, x: Tensor, size: int, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = on_device_of(backend, x.detach()).requires_grad_()
    y = max_pool_same(x, size, backend=backend)
    return y.detach().cpu(), torch.autograd.grad(y, x, on_device_of(backend, dy))[0].cpu()


def check(backend: str, x: Tensor, size: int, dy: Tensor) -> None:
    y, dx = run(backend, x, size, dy)
    expected_y, expected_dx = definition(x, size, dy)
    assert y.dtype == dx.dtype == x.dtype
    if x.is_contiguous() or memory_format(x) != torch.contiguous_format:
        assert y.is_contiguous(memory_format=memory_format(x))
    torch.testing.assert_close(y.double(), expected_y, rtol=0, atol=0, equal_nan=True)
    # dx sums up to size**2 values of dy: rounded once by the kernels, as often as it adds by PyTorch.
    eps = torch.finfo(x.dtype).eps * (size**2 if backend == "reference" else 2)
    atol = eps * max(dy.abs().max().item(), 1) * size
    torch.testing.assert_close(dx.double(), expected_dx, rtol=eps, atol=atol)


@st.composite
def images(draw, dtype: torch.dtype) -> Tensor:
    """Any shape and layout; numbers with ties, NaN and infinities among them."""
    channels = draw(st.integers(1, 40))
    sides = [draw(st.integers(1, side)) for side in (9, 24)]
    shape = [draw(st.integers(1, 3)), channels, *(sides if draw(st.booleans()) else reversed(sides))]
    torch.manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape)
    kind = draw(st.sampled_from(["any", "ties", "nothing", "special"]))
    if kind == "ties":
        x = x.round()
    if kind == "nothing":
        x = torch.full_like(x, -torch.inf)
    if kind == "special":
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.where(torch.rand(shape) < 0.2, value, x)
    return draw(layouts(x.to(dtype)))


@every_backend
@every_dtype
@settings(max_examples=4 if INTERPRETED else 150, deadline=None, derandomize=True)
@given(data=st.data())
def test_values_and_gradients(backend, dtype, data):
    x = data.draw(images(dtype))
    check(backend, x, data.draw(st.sampled_from([1, 3, 5, 7])), data.draw(layouts(torch.randn_like(x))))


@every_backend
@every_dtype
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", LARGE[:1] if INTERPRETED else LARGE, ids=str)
def test_large(backend, dtype, shape, channels_last):
    """More than one band of rows, more than one tile of a row, work for more than one thread."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape).to(dtype).to(memory_format=layout)
    check(backend, x, 5, torch.randn(shape).to(dtype))


@every_backend
@pytest.mark.parametrize("size", [3, 5, 15])
def test_is_max_pool2d_where_nothing_ties(backend, size):
    x = torch.randperm(2 * 3 * 17 * 9, dtype=torch.float64).view(2, 3, 17, 9).requires_grad_()
    dy = torch.randn(x.shape, dtype=torch.float64)
    expected = F.max_pool2d(x, size, stride=1, padding=size // 2)
    y, dx = run(backend, x, size, dy)
    assert torch.equal(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled part is missing")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float32_gradients_are_those_of_the_definition_to_the_last_bit(layout):
    x = torch.randn(2, 20, 33, 18).round().to(memory_format=layout)
    dy = torch.randn_like(x)
    assert torch.equal(run("cpu", x, 5, dy)[1], run("reference", x, 5, dy)[1])


@every_backend
def test_gradcheck(backend):
    x = on_device_of(backend, torch.randperm(2 * 3 * 5 * 4).double().view(2, 3, 5, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool_same(x, 3, backend=backend), x)


@not_reference
@every_dtype
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(backend, dtype, layout):
    prefix = "triton_" if backend == "triton" else ""
    ops = torch.ops.cen_ext
    max_pool_same(on_device_of(backend, torch.ones(1, 1, 1, 1)), 3, backend=backend)  # defines Triton's
    x = on_device_of(backend, torch.randn(2, 6, 4, 5).to(dtype).to(memory_format=layout))
    forward = getattr(ops, f"{prefix}max_pool_same").default
    torch.library.opcheck(forward, (x.clone().requires_grad_(), 3))
    _, winners = forward(x, 3)
    backward = getattr(ops, f"{prefix}max_pool_same_backward").default
    torch.library.opcheck(backward, (torch.randn_like(x), winners, 3))


@not_reference
@not_interpreted
def test_compiles_in_one_graph(backend):
    def call(x: Tensor) -> Tensor:
        return max_pool_same(2 * x, 5, backend=backend).square()

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 9, 7), (3, 6, 8, 11)):
        x = on_device_of(backend, torch.randn(shape)).requires_grad_()
        results = [(y := f(x), torch.autograd.grad(y.sum(), x)[0]) for f in (call, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled part is missing")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_byte_an_element_is_kept(layout):
    x = torch.randn(2, 16, 32, 32).to(memory_format=layout).requires_grad_()
    held, peak = tensor_bytes(lambda: max_pool_same(x, 5, backend="cpu"))
    assert held == peak == x.numel() * (4 + 1)


@every_backend
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_bits_for_any_number_of_threads(backend, layout):
    x, dy = (torch.randn(2, 20, 53, 31).to(memory_format=layout) for _ in range(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(backend, x, 5, dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_backend
def test_autocast_leaves_the_type_as_it_is(backend):
    x = on_device_of(backend, torch.randn(1, 3, 5, 5))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert max_pool_same(x, 3, backend=backend).dtype == torch.float32


@every_backend
def test_an_empty_batch(backend):
    x = on_device_of(backend, torch.empty(0, 3, 5, 4)).requires_grad_()
    y = max_pool_same(x, 3, backend=backend)
    assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@not_reference
def test_a_second_gradient_is_refused(backend):
    x = on_device_of(backend, torch.randn(1, 2, 3, 3)).requires_grad_()
    y = max_pool_same(x, 3, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice .*use backend='reference'"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "size", "error", "message"),
    [
        ([1.0], 3, TypeError, "x must be a tensor, got list"),
        (torch.ones(1, 1, 2, 2, dtype=torch.int64), 3, TypeError, "x must be float16"),
        (torch.ones(3, 4, 5), 3, ValueError, r"x must be \[N, C, H, W\]"),
        (torch.ones(1, 2, 0, 5), 3, ValueError, "at least 1"),
        (torch.ones(1, 1, 2, 2), 3.0, TypeError, "size must be an integer, got float"),
        (torch.ones(1, 1, 2, 2), 4, ValueError, "size must be odd and from 1 to 15, got 4"),
        (torch.ones(1, 1, 2, 2), 17, ValueError, "size must be odd and from 1 to 15, got 17"),
        (torch.ones(1, 1, 2, 2), -1, ValueError, "size must be odd and from 1 to 15, got -1"),
    ],
)
def test_bad_arguments_are_named(x, size, error, message):
    with pytest.raises(error, match=message):
        max_pool_same(x, size)


def test_backends_by_name():
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="backend must be one of 'triton', 'cpu', 'reference' or None"):
        max_pool_same(x, 3, backend="fast")
    if "triton" not in BACKENDS:
        with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
            max_pool_same(x, 3, backend="triton")


@not_interpreted
@pytest.mark.parametrize("instruction_set", other_instruction_sets())
def test_every_other_instruction_set(instruction_set):
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip("the compiled part is missing")
    check_instruction_set("test_pooling", "cpu and (values or large)", instruction_set)


@not_interpreted
def test_through_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    result = run_alone(
        ["test_pooling"],
        "triton and (values or large)",
        "-p",
        "tests.helpers.interpreted_triton",
        TRITON_INTERPRET="1",
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) == 12
