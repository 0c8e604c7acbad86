"""3x3 convolutions: values and gradients, gradients of gradients, compilers, what is refused.

How far from the definition (PyTorch's in float64) the compiled kernels may be follows from what they compute
(``csrc/cpu/conv3x3/winograd.h``). Their result is a sum of products of transformed numbers, ``A'[U * V]A``
summed over channels, and ``spread`` is the same sum of absolute values. Sums of n terms err by
``(4 + sqrt(n)) u`` of it (as in ``tolerance``); the transformations by one rounding unit u an addition,
twelve in all.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import cen_ext
from bench.harness.memory import tensor_bytes
from cen_ext import Conv3x3, conv3x3
from cen_ext.ops.conv3x3 import _why_not_cpu
from tests.helpers.alone import check_instruction_set, other_instruction_sets
from tests.ops.test_contract import layouts

pytestmark = pytest.mark.skipif(cen_ext.available_backends()["cpu"] != "ok", reason="no compiled part")
tuned = pytest.mark.skipif("tuned" in (_why_not_cpu(*torch.ones(2, 1, 1, 1, 1)) or ""), reason="no vectors")
OPS = torch.ops.cen_ext
ONES = torch.ones(1, 1, 3, 3)
U = torch.finfo(torch.float32).eps / 2

# Sizes of B', G, A' of F(2x2, 3x3), absolute values.
INPUT = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]).double()
KERNEL = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]]).double()
OUTPUT = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).double()


def squares(images: Tensor, side: int) -> Tensor:
    """``[N, C, down, across, side, side]``: a tile's 2x2 pixels, or the 4x4 about it; zeros outside."""
    height, width = images.shape[-2:]
    halo = (side - 2) // 2
    padded = F.pad(images, (halo, halo + width % 2, halo, halo + height % 2))
    return padded.unfold(2, side, 2).unfold(3, side, 2)


def both_ways(matrix: Tensor, squares: Tensor) -> Tensor:
    return matrix @ squares @ matrix.T


def spread_of_y(x: Tensor, weight: Tensor) -> Tensor:
    """Of absolute values, the sums that a result consists of."""
    height, width = x.shape[-2:]
    values = both_ways(INPUT, squares(x.abs(), 4))
    kernels = both_ways(KERNEL, weight.abs())
    products = torch.einsum("ncyxij,kcij->nkyxij", values, kernels)
    tiles = both_ways(OUTPUT, products)
    return tiles.transpose(3, 4).flatten(4).flatten(2, 3)[..., :height, :width]


def spread_of_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    values = both_ways(INPUT, squares(x.abs(), 4))
    gradients = both_ways(OUTPUT.T, squares(dy.abs(), 2))
    return both_ways(KERNEL.T, torch.einsum("nkyxij,ncyxij->kcij", gradients, values))


def grids(images: Tensor, dilation: int) -> list[Tensor]:
    """Those that have pixels; a dilated convolution is one of its own on each."""
    down, across = (range(min(dilation, length)) for length in images.shape[-2:])
    return [images[..., i::dilation, j::dilation] for i in down for j in across]


def spread_on_grids(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    spread = torch.empty(x.shape[0], weight.shape[0], *x.shape[2:], dtype=torch.float64)
    for grid, part in zip(grids(spread, dilation), grids(x, dilation), strict=True):
        grid.copy_(spread_of_y(part, weight))
    return spread


def assert_within(actual: Tensor, expected: Tensor, spread: Tensor, terms: int) -> None:
    bound = U * ((4 + math.sqrt(terms) + 12) * spread + expected.abs()) + 1e-38
    error = (actual.double() - expected).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{worst} times the error allowed"


def check(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, dilation: int) -> None:
    """The ops against the definition in float64."""
    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    y64 = F.conv2d(x64, weight64, None if bias is None else bias.double(), 1, dilation, dilation)
    dx64, dweight64 = torch.autograd.grad(y64, (x64, weight64), dy.double())
    x64, weight64, y64, dy64 = x64.detach(), weight64.detach(), y64.detach(), dy.double()
    images, channels, height, width = x.shape

    y = OPS.conv3x3(x, weight, bias, dilation)
    spread = spread_on_grids(x64, weight64, dilation)
    if bias is not None:
        spread += bias.double().abs()[:, None, None]
    assert_within(y, y64, spread, channels)

    dx = OPS.conv3x3_backward(dy, weight, dilation)
    turned = weight64.flip(2, 3).transpose(0, 1)
    assert_within(dx, dx64, spread_on_grids(dy64, turned, dilation), len(weight))

    dweight = OPS.conv3x3_weight_gradient(dy, x, dilation)
    parts = zip(grids(dy64, dilation), grids(x64, dilation), strict=True)
    spread = sum((spread_of_weight_gradient(*part) for part in parts), torch.zeros_like(weight64))
    assert_within(dweight, dweight64, spread, images * height * width)

    for result in (y, dx, dweight):
        assert result.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_values(data):
    """Any size, dilation and layout; bias or none; numbers far from zero."""
    sides = st.integers(1, 19)
    images, height, width, dilation = (
        data.draw(s) for s in (st.integers(1, 3), sides, sides, st.integers(1, 4))
    )
    channels, outputs = (data.draw(st.sampled_from([32, 64, 96])) for _ in range(2))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    scale, shift = data.draw(st.sampled_from([(1.0, 0.0), (1.0, 100.0), (1e-20, 0.0), (1e15, 0.0)]))
    x, dy = (
        data.draw(layouts(torch.randn(images, c, height, width) * scale + shift)) for c in (channels, outputs)
    )
    weight = data.draw(layouts(torch.randn(outputs, channels, 3, 3)))
    bias = data.draw(st.sampled_from([None, torch.randn(outputs)]))
    check(x, weight, bias, dy, dilation)


# More than one block of tiles, part of channels and chunk of outputs; the last of each not whole.
LARGE = [(2, 64, 96, 61, 45, 1), (1, 544, 160, 17, 14, 1), (1, 32, 576, 40, 33, 3), (1, 1056, 288, 3, 2, 1)]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_values_large(case):
    images, channels, outputs, height, width, dilation = case
    x, dy = (torch.randn(images, c, height, width) for c in (channels, outputs))
    check(x, torch.randn(outputs, channels, 3, 3), torch.randn(outputs), dy, dilation)


@pytest.mark.parametrize("instruction_set", other_instruction_sets())
def test_every_other_instruction_set(instruction_set):
    check_instruction_set("test_convolution", "test_values", instruction_set)


@pytest.mark.parametrize("channels", [96, 640])
def test_same_bits_for_any_number_of_threads(channels):
    """Few enough channels for one part with up to four threads, more with more; several slices."""
    x, dy = (torch.randn(2, c, 37, 29).to(memory_format=torch.channels_last) for c in (channels, 96))
    weight = torch.randn(96, channels, 3, 3).to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            y, dx = OPS.conv3x3(x, weight, None, 1), OPS.conv3x3_backward(dy, weight, 1)
            results.append((y, dx, OPS.conv3x3_weight_gradient(dy, x, 1)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight and bias that the kernels are chosen for."""
    tensors = [torch.randn(2, 32, 18, 15), torch.randn(64, 32, 3, 3), torch.randn(64)]
    x, weight, bias = (t.to(dtype) for t in tensors)
    last = torch.channels_last
    return [t.requires_grad_() for t in (x.to(memory_format=last), weight.to(memory_format=last), bias)]


@tuned
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_of_gradients(dilation):
    """Every op's own gradients: of x and weight, of dy and weight, of dy and x."""
    x, weight, bias = inputs()
    x64, weight64, bias64 = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    dy = torch.randn(2, 64, 18, 15)
    second = [torch.randn_like(x), torch.randn_like(weight), torch.randn_like(bias)]
    found = []
    for own, backend in (((x, weight, bias), "cpu"), ((x64, weight64, bias64), "reference")):
        own_dy = dy.to(own[0].dtype).requires_grad_()
        y = conv3x3(*own, dilation, backend=backend)
        first = torch.autograd.grad(y, own, own_dy, create_graph=True)
        total = sum((a * b.to(a.dtype)).sum() for a, b in zip(first, second, strict=True))
        found.append((y, *first, *torch.autograd.grad(total, (own[0], own[1], own_dy))))
    for own, expected in zip(*found, strict=True):
        error = (own.double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5


@tuned
def test_only_gradients_that_are_asked_for():
    x, weight, bias = inputs()
    alone = torch.autograd.grad(conv3x3(x, weight, bias).sum(), weight)[0]
    together = torch.autograd.grad(conv3x3(x.detach(), weight, None).sum(), weight)[0]
    assert torch.equal(alone, together)
    frozen = torch.autograd.grad(conv3x3(x, weight.detach(), bias.detach()).sum(), x)[0]
    assert frozen.shape == x.shape


def test_opcheck():
    x, weight, bias = inputs()
    dy = torch.randn(2, 64, 18, 15).requires_grad_()
    torch.library.opcheck(OPS.conv3x3.default, (x, weight, bias, 1))
    torch.library.opcheck(OPS.conv3x3.default, (x, weight, None, 2))
    torch.library.opcheck(OPS.conv3x3_backward.default, (dy, weight, 1))
    torch.library.opcheck(OPS.conv3x3_weight_gradient.default, (dy, x, 1))


@tuned
def test_compiles_in_one_graph():
    torch.compiler.reset()
    call = lambda *tensors: conv3x3(*tensors, backend="cpu").square()  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tensors = inputs()
    results = [(y := f(*tensors), *torch.autograd.grad(y.sum(), tensors)) for f in (call, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@tuned
def test_nothing_is_kept_but_the_arguments():
    x, weight, bias = inputs()
    held, peak = tensor_bytes(lambda: conv3x3(x, weight, bias))
    assert held == peak == 2 * 64 * 18 * 15 * 4


@tuned
def test_the_kernels_are_chosen_where_they_can_run_and_pay():
    x, weight, bias = (t.detach() for t in inputs())
    compiled = OPS.conv3x3(x, weight, bias, 1)
    assert torch.equal(conv3x3(x, weight, bias), compiled)
    assert not torch.equal(F.conv2d(x, weight, bias, padding=1), compiled)
    for other in (x.contiguous(), x[..., :9, :9].contiguous(memory_format=torch.channels_last)):
        assert torch.equal(conv3x3(other, weight, bias), F.conv2d(other, weight, bias, padding=1))
    double = [t.double() for t in (x, weight, bias)]
    assert torch.equal(conv3x3(*double), F.conv2d(*double, padding=1))
    far = F.conv2d(x, weight, bias, 1, 17, 17)  # 5 of 6 places that tiles cover are outside
    assert torch.equal(conv3x3(x, weight, bias, 17), far)
    few = (x[:, :20].contiguous(memory_format=torch.channels_last), weight[:, :20])
    assert torch.equal(conv3x3(*few), F.conv2d(*few, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("dilation", [17, 18, 19, 10**5, 2**32])
def test_taps_outside_the_image(dilation):
    x, weight, bias = (t.detach() for t in inputs())
    dy = torch.randn(2, 64, 18, 15)
    check(x, weight, bias, dy, min(dilation, 18))
    assert torch.equal(
        OPS.conv3x3(x, weight, None, dilation), OPS.conv3x3(x, weight, None, min(dilation, 18))
    )


def test_values_that_are_not_finite_reach_no_further():
    """y of a single infinity: not finite where a tap touches it, exact elsewhere."""
    x, weight, _ = (t.detach() for t in inputs())
    y = OPS.conv3x3(x, weight, None, 1)
    x[0, 3, 8, 7] = torch.inf
    changed = OPS.conv3x3(x, weight, None, 1)
    touched = torch.zeros(2, 1, 18, 15, dtype=torch.bool)
    touched[0, :, 7:10, 6:9] = True
    assert torch.equal(changed.isfinite(), (~touched).expand_as(changed))
    assert torch.equal(changed.masked_fill(touched, 0), y.masked_fill(touched, 0))


@tuned
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, weight, bias: (x.contiguous(), weight, bias), "x is not channels_last"),
        (lambda x, weight, bias: (x.double(), weight, bias), "x is torch.float64, needed is float32"),
        (lambda x, weight, bias: (x, weight, bias.half()), "bias is torch.float16"),
        (lambda x, weight, bias: (x, weight[:40], None), "multiples of 32, got 32 and 40"),
    ],
)
def test_a_refusal_says_why(change, message):
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run this call: .*{message}"):
        conv3x3(*change(*inputs()), backend="cpu")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], ONES), TypeError, "x must be a tensor, got list"),
        ((ONES, None), TypeError, "weight must be a tensor, got NoneType"),
        ((ONES[0], ONES), ValueError, r"x must be \[N, C, H, W\]"),
        ((ONES.repeat(1, 2, 1, 1), ONES), ValueError, r"weight must be .* C=2"),
        ((ONES, torch.ones(1, 1, 5, 5)), ValueError, r"weight must be \[K, C, 3, 3\]"),
        ((torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(2)), ValueError, r"bias must be \[K\]"),
        (
            (torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), None, 0),
            ValueError,
            "dilation must be at least 1",
        ),
        (
            (torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), None, 1.0),
            TypeError,
            "dilation must be an integer",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        conv3x3(*arguments)


def test_backends_by_name():
    with pytest.raises(ValueError, match="backend must be one of 'cpu', 'reference' or None, got 'fast'"):
        conv3x3(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3), backend="fast")


@pytest.mark.parametrize("shape", [(0, 32, 5, 4), (2, 32, 0, 4)], ids=str)
def test_nothing_in_nothing_out(shape):
    x, weight = torch.empty(shape).requires_grad_(), torch.randn(64, 32, 3, 3).requires_grad_()
    y = OPS.conv3x3(x, weight, None, 1)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (shape[0], 64, *shape[2:])
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert dweight.is_contiguous(memory_format=torch.channels_last)


def test_no_channels_are_refused():
    for x, weight in (((1, 0, 4, 4), (32, 0, 3, 3)), ((1, 32, 4, 4), (0, 32, 3, 3))):
        with pytest.raises(RuntimeError, match="multiples of 32"):
            OPS.conv3x3(torch.randn(x), torch.randn(weight), None, 1)


def test_the_module_is_a_conv2d():
    ours, theirs = Conv3x3(32, 64, dilation=2), torch.nn.Conv2d(32, 64, 3, padding=2, dilation=2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 32, 20, 20).to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    torch.manual_seed(0)
    ours = Conv3x3(32, 64, bias=False)
    torch.manual_seed(0)
    assert torch.equal(ours.weight, torch.nn.Conv2d(32, 64, 3, bias=False).weight)
