"""Whether a layer keeps the rows of a batch apart, and which norm it is, found by running it on noise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

_ROWS = 6  # even, for what mixes pairs, and rarely a number of channels
_CHANNELS = 8  # of a layer that does not tell


def mixes_rows(layer: nn.Module) -> bool | None:
    """Whether a row of a layer's output, or its state, depends on other rows; None if it cannot be run.

    A copy is run on noise of the shapes that the layer may take, in training and in eval mode, with hooks
    left out.
    """
    with torch.device("cpu"):  # wherever the network is built
        verdicts = [
            verdict
            for shape in _shapes(layer)
            for training in (True, False)
            if (verdict := _mixes(layer, shape, training)) is not None
        ]
    return any(verdicts) if verdicts else None


def _shapes(layer: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of input, with the rows first, that a layer may take."""
    if isinstance(layer, _ConvNd):
        extents = zip(layer.kernel_size, layer.dilation, strict=True)
        yield _ROWS, layer.in_channels, *(dilation * (size - 1) + 4 for size, dilation in extents)
        return
    if isinstance(shape := getattr(layer, "normalized_shape", None), tuple) and len(shape) > 1:
        yield _ROWS, *shape
        yield _ROWS, 5, *shape
        return
    channels = _channels(layer)
    yield _ROWS, channels
    yield _ROWS, channels, 7
    yield _ROWS, channels, 6, 7
    yield _ROWS, channels, 3, 4, 5
    yield _ROWS, 7, channels
    yield _ROWS, 6, 7, channels


def _channels(layer: Any) -> int:
    if isinstance(shape := getattr(layer, "normalized_shape", None), tuple):
        return int(shape[-1])
    for name in ("num_features", "num_channels", "in_channels", "in_features"):
        if isinstance(channels := getattr(layer, name, None), int):
            return channels
    own = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    return next((max(tensor.shape) for tensor in own if tensor.dim() > 0), _CHANNELS)


def _mixes(layer: nn.Module, shape: tuple[int, ...], training: bool) -> bool | None:
    noise = torch.Generator().manual_seed(0)
    x, changed = (torch.randn(shape, generator=noise) for _ in range(2))
    changed[0] = x[0]
    try:
        (y, state), (other_y, other_state) = (_run(layer, rows, training) for rows in (x, changed))
    except Exception:  # whatever code that is not ours may raise on an input that it does not take
        return None
    if not y:
        return None
    pairs = [(first[0], second[0]) for first, second in zip(y, other_y, strict=True)]
    pairs += zip(state, other_state, strict=True)
    return not all(same(first, second) for first, second in pairs)


def _run(layer: nn.Module, x: Tensor, training: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What a copy of the layer returns, of as many rows and dimensions as x, and its buffers afterwards."""
    layer = _on_cpu(copy.deepcopy(layer)).train(training)
    own = (*layer.parameters(), *layer.buffers())
    like = next((tensor for tensor in own if tensor.is_floating_point()), x)
    with _quietly():
        y = layer.forward(x.to(like.dtype))
    leaves = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.dim() == x.dim()]
    return [leaf for leaf in leaves if leaf.shape[0] == _ROWS], list(layer.buffers())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without gradients and warnings, and with the same random numbers every time."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        yield


def normalized_dim(norm: Any, parts: tuple[str, ...]) -> int | None:
    """The dimension of the channels, 1 or -1, if a layer or group norm with a forward of its own is torch's.

    A copy is run on noise, with scales and shifts that are noise, too, and compared with torch's function,
    and with what follows it in the layer. None if it computes anything else, or takes no such input.

    Args:
        norm: a LayerNorm of one dimension, or a GroupNorm.
        parts: names of the modules that are called after the norm.
    """
    channels = _channels(norm)
    extents = [size for size in (2, 3, 4) if size != channels][:2]
    dims = (1,) if isinstance(norm, nn.GroupNorm) else (1, -1)
    found: set[int] = set()
    with torch.device("cpu"):
        layer: Any = _on_cpu(copy.deepcopy(norm)).float()
        noise = torch.Generator().manual_seed(0)
        for table in (layer.weight, layer.bias):
            if table is not None:
                table.detach().uniform_(0.5, 1.5, generator=noise)
        for dim in dims:
            for count in (1, 2):
                x = torch.randn(_ROWS, *extents[:count], channels, generator=noise).movedim(-1, dim)
                # Where x is small, eps counts.
                x = x * torch.logspace(0, -5, _ROWS).view(-1, *(1,) * (count + 1))
                equal = [_is_torchs(layer.train(training), x, dim, parts) for training in (True, False)]
                if False in equal:
                    return None
                found.update({dim} if True in equal else ())
    return found.pop() if len(found) == 1 else None


def _is_torchs(norm: Any, x: Tensor, dim: int, parts: tuple[str, ...]) -> bool | None:
    """Whether torch's norm over a dimension gives the same; None if the layer does not take x."""
    try:
        with _quietly():
            y = norm.forward(x.clone())
    except Exception:  # whatever code that is not ours may raise on an input that it does not take
        return None
    with _quietly():
        if isinstance(norm, nn.GroupNorm):
            expected = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        else:
            last = F.layer_norm(x.movedim(dim, -1), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            expected = last.movedim(-1, dim)
        for part in parts:
            expected = getattr(norm, part)(expected)
    return isinstance(y, Tensor) and same(y, expected)


def _on_cpu(layer: nn.Module) -> nn.Module:
    tensors = [*layer.parameters(), *layer.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return layer.cpu()
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.detach().fill_(1)
    return layer


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two results are the same to rounding."""
    if first.shape != second.shape or not first.is_floating_point():
        return torch.equal(first, second)
    largest = first.abs().nan_to_num(0).amax().item() if first.numel() else 0.0
    rounding = 1e3 * torch.finfo(first.dtype).eps * largest
    return torch.allclose(first, second, rtol=0, atol=rounding, equal_nan=True)
