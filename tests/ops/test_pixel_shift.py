"""The pixel shift on every backend against its table, written with pads; its gradient against its adjoint."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import cen_ext
from cen_ext.ops import dispatch
from cen_ext.ops.norm_exchange.reference import DTYPES, memory_format
from cen_ext.ops.pixel_shift.functional import pixel_shift, run_reference
from tests.ops.test_contract import layouts

NAMES = [name for name, one in dispatch.BACKENDS["pixel_shift"].items() if one.why_not() is None]
every_backend = pytest.mark.parametrize("backend", NAMES)


def by_pads(x: Tensor, modalities: int, base: Tensor | None, groups: int = 5) -> Tensor:
    """Each group padded with zeros on the side where they enter, and cut on the other."""
    height, width = x.shape[2:]
    g = x.shape[1] // groups
    parts = x.chunk(modalities)
    shifted = []
    for m in range(modalities):
        a = parts[(m + 1) % modalities]
        shifted += [
            torch.cat(
                [
                    F.pad(a[:, :g], (0, 0, 1, 0))[:, :, :height],
                    F.pad(a[:, g : 2 * g], (1, 0, 0, 0))[..., :width],
                    F.pad(a[:, 2 * g : 3 * g], (0, 1, 0, 0))[..., 1:],
                    F.pad(a[:, 3 * g : 4 * g], (0, 0, 0, 1))[:, :, 1:],
                    torch.zeros_like(a[:, 4 * g :]),
                ],
                1,
            )
        ]
    result = torch.cat(shifted).double()
    return (result if base is None else base.double() + result).to(x.dtype)


@st.composite
def calls(draw, dtype: torch.dtype) -> tuple[Tensor, int, Tensor | None]:
    modalities, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    shape = (modalities * batch, draw(st.integers(1, 45)), draw(st.integers(1, 9)), draw(st.integers(1, 21)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    x, base = torch.randn(2, *shape).to(dtype)
    return draw(layouts(x)), modalities, draw(st.none() | layouts(base))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8 if "triton" in NAMES else 60, deadline=None, derandomize=True)
@given(data=st.data())
def test_values(backend, dtype, data):
    """To the bit: a sum of two numbers is rounded once."""
    x, modalities, base = data.draw(calls(dtype))
    y = pixel_shift(x, modalities, base=base, backend=backend)
    assert torch.equal(y, by_pads(x, modalities, base))
    if x.is_contiguous() or memory_format(x) != torch.contiguous_format:
        assert y.is_contiguous(memory_format=memory_format(x))


@every_backend
@pytest.mark.parametrize("channels_last", [False, True])
def test_large(backend, channels_last):
    """More than a thread's work, and results that bypass the cache."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, base = (t.contiguous(memory_format=layout) for t in torch.randn(2, 4, 64, 125, 131))
    assert torch.equal(pixel_shift(x, 2, base=base, backend=backend), by_pads(x, 2, base))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_gpu(backend, channels_last, dtype):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, base, dy = (t.to(dtype).contiguous(memory_format=layout) for t in torch.randn(3, 6, 21, 33, 35))
    leaves = [t.to("cuda").requires_grad_() for t in (x, base)]
    y = pixel_shift(leaves[0], 3, base=leaves[1], backend=backend)
    assert torch.equal(y.cpu(), by_pads(x, 3, base))
    dx, dbase = torch.autograd.grad(y, leaves, dy.to("cuda"))
    assert torch.equal(dx.cpu(), run_reference(dy, None, 3, 21 // 5, adjoint=True))
    assert torch.equal(dbase.cpu(), dy)


@every_backend
@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_is_the_adjoint(backend, modalities, channels_last):
    """<S(a), b> = <a, S*(b)>, for numbers whose products and sums are exact."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a, b = torch.randint(-8, 8, (2, 2 * modalities, 11, 4, 5)).double()
    a = a.contiguous(memory_format=layout).requires_grad_()
    base = torch.zeros_like(b).requires_grad_()
    y = pixel_shift(a, modalities, base=base, backend=backend)
    da, dbase = torch.autograd.grad((y * b).sum(), [a, base])
    assert torch.equal((a * da).sum(), (y * b).sum())
    assert torch.equal(dbase, b)
    # A matrix whose rows are the shift of unit tensors, transposed.
    units = torch.eye(a.numel(), dtype=a.dtype).view(-1, *a.shape)[:: 7 * modalities]
    for unit in units:
        assert torch.equal((da * unit).sum(), (by_pads(unit, modalities, None) * b).sum())


@every_backend
def test_gradcheck(backend):
    x, base = (torch.randn(4, 6, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, base):
        return pixel_shift(x * x, 2, base=base, backend=backend)

    assert torch.autograd.gradcheck(call, (x, base))
    assert torch.autograd.gradgradcheck(call, (x, base))


@pytest.mark.parametrize("backend", [name for name in NAMES if name != "reference"])
def test_opcheck(backend):
    op = {"triton": "triton_pixel_shift"}.get(backend, "pixel_shift")
    for base, layout in itertools.product([False, True], [torch.contiguous_format, torch.channels_last]):
        x, other = torch.randn(2, 4, 6, 3, 5).unbind()
        x, other = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, other))
        torch.library.opcheck(
            getattr(torch.ops.cen_ext, op).default, (x, other if base else None, 2, 1, False)
        )


@every_backend
def test_empty(backend):
    for shape in ((0, 6, 3, 4), (4, 0, 3, 4), (4, 6, 0, 4), (4, 6, 3, 0)):
        x = torch.empty(shape, requires_grad=True)
        y = pixel_shift(x, 2, base=x, backend=backend)
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_compiles_in_one_graph():
    def network(x):
        return cen_ext.pixel_shift(x.relu(), 2, base=x)

    x = torch.randn(4, 10, 5, 6, requires_grad=True)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(x), network(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], torch.autograd.grad(theirs.sum(), x)[0])


BAD = [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(x=torch.zeros(4, 6, 3, 3).int()), TypeError, "x must be float16"),
    (dict(x=torch.zeros(4, 6)), ValueError, r"x must be .M\*N, C, H, W."),
    (dict(num_modalities=3), ValueError, "4 rows, not divisible by 3"),
    (dict(num_modalities=0), ValueError, "num_modalities must be at least 1"),
    (dict(num_modalities=2.0), TypeError, "num_modalities must be an integer, got float"),
    (dict(groups=3), ValueError, "groups must be at least 4, got 3"),
    (dict(base=1.0), TypeError, "base must be a tensor, got float"),
    (dict(base=torch.zeros(4, 6, 3, 2)), ValueError, "base must have shape"),
    (dict(base=torch.zeros(4, 6, 3, 3).half()), TypeError, "base must be torch.float32 as x is"),
    (dict(base=torch.zeros(4, 6, 3, 3, device="meta")), ValueError, "base must be on cpu as x is, got meta"),
    (dict(backend="cudnn"), ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change, error, message):
    good = dict(x=torch.zeros(4, 6, 3, 3), num_modalities=2)
    cen_ext.pixel_shift(**good)
    with pytest.raises(error, match=message):
        cen_ext.pixel_shift(**{**good, **change})
