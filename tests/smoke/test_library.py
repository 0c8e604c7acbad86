"""The library as installed: compiled kernels, layers and conversion. Needs torch and pytest alone.

These files import nothing else of the tests, because .ci/smoke.py runs copies of them outside the checkout.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cen_ext

M, N, C, SIDE = 2, 3, 32, 9
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}
FORMATS = (torch.contiguous_format, torch.channels_last)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """What a function returns, and the gradients of its inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, noise(*y.shape, dtype=y.dtype))]


def test_version() -> None:
    assert importlib.metadata.version("cen_ext") == cen_ext.__version__


def test_the_compiled_part_was_built_for_any_python_and_torch() -> None:
    assert cen_ext.available_backends()["cpu"] == "ok"
    from cen_ext import _C

    assert Path(_C.__file__).name.startswith("_C.abi3.")
    assert _C.build_info()["instruction_set"] in _C.build_info()["instruction_sets"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("norm", ["batch", "instance", "layer", "group"])
def test_norm_exchange_is_as_defined(
    norm: str, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    x = noise(M * N, C, SIDE, SIDE, dtype=dtype).contiguous(memory_format=memory_format)
    tables = torch.float64 if dtype == torch.float64 else torch.float32
    weight = noise(M, C, dtype=tables)
    bias = weight.flip(1) / 4

    def run(backend: str) -> list[Tensor]:
        options = {"threshold": 0.5, "norm": norm, "num_groups": 4 if norm == "group" else 1}
        function = partial(
            cen_ext.norm_exchange, training=True, activation="silu", backend=backend, **options
        )
        return results(function, x, weight, bias)

    assert cen_ext.replaced_channels(weight, 0.5).any()
    for found, expected in zip(run("cpu"), run("reference"), strict=True):
        scale = max(
            1.0, expected.abs().max().item()
        )  # of sums over all positions, for the affine's gradients
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_other_operators_are_as_defined() -> None:
    x = noise(M * N, C, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    weight, bias = noise(C, C, 3, 3) / 8, noise(C)
    found = {
        "conv3x3": results(partial(cen_ext.conv3x3, backend="cpu"), x, weight, bias),
        "max_pool_same": results(partial(cen_ext.max_pool_same, size=5, backend="cpu"), x),
        "pixel_shift": results(partial(cen_ext.pixel_shift, num_modalities=M, backend="cpu"), x),
    }
    expected = {
        "conv3x3": results(partial(F.conv2d, padding=1), x, weight, bias),
        "max_pool_same": results(partial(F.max_pool2d, kernel_size=5, stride=1, padding=2), x),
        "pixel_shift": results(partial(cen_ext.pixel_shift, num_modalities=M, backend="reference"), x),
    }
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_a_layer_without_exchange_is_batch_norm_by_modality() -> None:
    x = noise(M * N, C, SIDE, SIDE)
    layer, plain = cen_ext.ExchangeBatchNorm2d(C, M), [nn.BatchNorm2d(C) for _ in range(M)]
    for training in (True, False):
        layer.train(training)
        expected = [
            norm.train(training)(part)
            for norm, part in zip(plain, cen_ext.unstack_modalities(x, M), strict=True)
        ]
        torch.testing.assert_close(layer(x), torch.cat(expected))
    torch.testing.assert_close(layer.running_var, torch.stack([norm.running_var for norm in plain]))


def test_a_converted_network_learns_and_is_exported() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1))
    net = cen_ext.make_multimodal(net, num_modalities=M, threshold=0.02)
    x = cen_ext.stack_modalities([noise(N, 3, 16, 16), noise(N, 3, 16, 16).flip(3)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(net(x), x[:, :2]) + 1e-3 * cen_ext.sparsity_penalty(net)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    net.eval()
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        torch.testing.assert_close(program.module()(x), net(x))
    assert any("cen_ext" in str(node.target) for node in program.graph.nodes)
