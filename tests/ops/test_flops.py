"""FLOP counts: of every kernel those of the definition, which are counted here by hand."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import cen_ext
import models
from cen_ext.ops import dispatch
from tests.helpers.paths import ROOT

compiled = pytest.mark.skipif(not dispatch.IS_COMPILED, reason="no compiled part")
TRITON = ("norm_exchange.triton.launch", "max_pool_same.triton", "pixel_shift.triton")
N, C, K, H, W = 2, 32, 64, 24, 20
LAYER = 2 * N * K * H * W * C * 9


def defined() -> set[str]:
    """The ops of ``torch.ops.cen_ext``, by name."""
    if dispatch._HAS_TRITON:
        for module in TRITON:
            importlib.import_module(f"cen_ext.ops.{module}")
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {op.partition(".")[0] for space, _, op in names if space == "cen_ext"}


def flops(counter: FlopCounterMode) -> dict[str, int]:
    """The counts that are not 0, by op."""
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if count}


def runs_native() -> bool:
    """Whether convolutions take the compiled kernels here."""
    images = torch.randn(4, 32, 16, 16).to(memory_format=torch.channels_last)
    return dispatch.BACKENDS["conv3x3"]["cpu"].why_not(images, torch.randn(32, 32, 3, 3)) is None


def test_every_op_has_a_formula() -> None:
    found = defined()
    ours = {"conv3x3", "norm_exchange", "norm_exchange_backward", "max_pool_same", "pixel_shift"}
    assert found >= (ours if dispatch.IS_COMPILED else set())
    assert found >= ({f"triton_{op}" for op in ours - {"conv3x3"}} if dispatch._HAS_TRITON else set())
    registry = flop_counter.flop_registry
    without = sorted(op for op in found if getattr(torch.ops.cen_ext, op) not in registry)
    assert not without, f"cen_ext.ops.flops.register has not been given formulas of {without}"


def test_the_counter_is_imported_by_who_counts() -> None:
    """It imports Triton, and is longer about it than all of cen_ext."""
    code = """
import sys
import cen_ext
assert "torch.utils.flop_counter" not in sys.modules
assert "triton" not in sys.modules
before = len(sys.meta_path)
from torch.utils.flop_counter import flop_registry
import torch
assert len(sys.meta_path) == before - 1
if cen_ext.available_backends()["cpu"] == "ok":
    assert torch.ops.cen_ext.conv3x3 in flop_registry
    assert torch.ops.cen_ext.norm_exchange in flop_registry
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@compiled
@pytest.mark.parametrize(("of_x", "of_weight"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_convolution(backend: str, of_x: bool, of_weight: bool) -> None:
    if backend == "cpu" and not runs_native():
        pytest.skip("the kernels are not for this processor")
    x = torch.randn(N, C, H, W).to(memory_format=torch.channels_last).requires_grad_(of_x)
    weight = torch.randn(K, C, 3, 3, requires_grad=of_weight)
    with FlopCounterMode(display=False) as counter:
        y = cen_ext.conv3x3(x, weight, torch.randn(K), dilation=2, backend=backend)
        assert counter.get_total_flops() == LAYER
        y.sum().backward()
    assert counter.get_total_flops() == LAYER * (1 + of_x + of_weight)
    assert all(op.startswith("cen_ext." if backend == "cpu" else "aten.") for op in flops(counter))


@contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def by_hand(net: nn.Module, images: Tensor) -> tuple[int, int]:
    """The FLOP of a network's convolutions, forward, and those of a backward pass.

    Each costs the same twice backward, but that of images, which have no gradient, once.
    """
    forward, backward = [], []

    def note(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        forward.append(2 * output.numel() * layer.weight[0].numel())
        backward.append(forward[-1] * (1 + inputs[0].requires_grad))

    hooks = [layer.register_forward_hook(note) for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    net(images)
    for hook in hooks:
        hook.remove()
    return sum(forward), sum(backward)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "context", [nullcontext, bfloat16, cen_ext.recompute_outputs], ids=["float32", "bfloat16", "recompute"]
)
def test_a_network(context: type[AbstractContextManager[None]], layout: torch.memory_format) -> None:
    """Norms, pooling and what is recomputed of them count nothing, as PyTorch's do."""
    net = models.refinenet("resnet18", 5, 2, width=32, frozen_statistics=False).to(memory_format=layout)
    images = torch.randn(4, 3, 64, 64).to(memory_format=layout)
    forward, backward = by_hand(net, images)
    with FlopCounterMode(display=False) as counter:
        with context():
            out = net(images)
        # The ensemble is a sum of products with its weights, not one of matrices.
        assert counter.get_total_flops() == forward
        (out.branches.float().square().mean() + out.ensemble.float().square().mean()).backward()
    assert counter.get_total_flops() == forward + backward
    native = any(op.startswith("cen_ext.conv3x3") for op in flops(counter))
    fits = layout == torch.channels_last and context is not bfloat16
    assert native == (fits and runs_native())


def test_a_forward_pass_that_runs_twice_counts_twice() -> None:
    layer = cen_ext.Conv3x3(C, K)
    x = torch.randn(N, C, H, W).to(memory_format=torch.channels_last).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert counter.get_total_flops() == 4 * LAYER


def test_pooling_and_shifts_count_nothing() -> None:
    x = torch.randn(N, C, H, W, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (cen_ext.max_pool_same(x, 5) + cen_ext.pixel_shift(x, 2)).sum().backward()
    assert counter.get_total_flops() == 0
