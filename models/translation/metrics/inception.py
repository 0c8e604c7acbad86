"""The Inception-v3 network in whose features FID and KID compare images (Szegedy et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.encoders.weights import read_state_dict, some
from models.training.errors import UsageError

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # under which the converted TensorFlow weights go round
SIZE = 299  # height and width of what the network reads
FEATURES = 2048
_CLASSES = 1008  # torchvision's own Inception-v3 has 1000


class Conv(NamedTuple):
    """A ``ConvNorm`` of a branch: its name there, and its arguments."""

    name: str
    width: int
    kernel: int | tuple[int, int]
    stride: int = 1
    same: bool = True


Fork = tuple[Conv, Conv]  # both read the same tensor; their results are concatenated
Pool = Callable[[Tensor], Tensor]

_average: Pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum: Pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve: Pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU; ``same`` pads the convolution to keep the size."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        same: bool = True,
    ) -> None:
        super().__init__()
        padding = "same" if same else "valid"
        self.conv = nn.Conv2d(in_channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions, forks and pools, concatenated along the channels.

    Args:
        in_channels: channels of the input.
        branches: the chains, in the order of the concatenation. The convolutions' names are the modules'.
    """

    def __init__(self, in_channels: int, *branches: Sequence[Conv | Fork | Pool]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = in_channels
            for convs in (_convs(step) for step in branch if not callable(step)):
                for conv in convs:
                    self.add_module(conv.name, ConvNorm(width, *conv[1:]))
                width = sum(conv.width for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._chain(branch, x) for branch in self.branches], 1)

    def _chain(self, branch: Sequence[Conv | Fork | Pool], x: Tensor) -> Tensor:
        for step in branch:
            if callable(step):
                x = step(x)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in _convs(step)], 1)
        return x


def _convs(step: Conv | Fork) -> Sequence[Conv]:
    return (step,) if isinstance(step, Conv) else step


def block_a(in_channels: int, pool_width: int) -> Mixed:
    """Branches at 35×35: 1×1, 5×5, twice 3×3, average pool."""
    return Mixed(
        in_channels,
        [Conv("branch1x1", 64, 1)],
        [Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5)],
        [Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)],
        [_average, Conv("branch_pool", pool_width, 1)],
    )


def block_b(in_channels: int) -> Mixed:
    """Reduction from 35×35 to 17×17."""
    return Mixed(
        in_channels,
        [Conv("branch3x3", 384, 3, 2, same=False)],
        [
            Conv("branch3x3dbl_1", 64, 1),
            Conv("branch3x3dbl_2", 96, 3),
            Conv("branch3x3dbl_3", 96, 3, 2, same=False),
        ],
        [_halve],
    )


def block_c(in_channels: int, width: int) -> Mixed:
    """Branches at 17×17: 1×1, 7×7 and twice 7×7 in factors, average pool."""
    return Mixed(
        in_channels,
        [Conv("branch1x1", 192, 1)],
        [Conv("branch7x7_1", width, 1), Conv("branch7x7_2", width, (1, 7)), Conv("branch7x7_3", 192, (7, 1))],
        [
            Conv("branch7x7dbl_1", width, 1),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ],
        [_average, Conv("branch_pool", 192, 1)],
    )


def block_d(in_channels: int) -> Mixed:
    """Reduction from 17×17 to 8×8."""
    return Mixed(
        in_channels,
        [Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, 2, same=False)],
        [
            Conv("branch7x7x3_1", 192, 1),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, 2, same=False),
        ],
        [_halve],
    )


def block_e(in_channels: int, pool: Pool) -> Mixed:
    """Branches at 8×8: 1×1, 3×3 and twice 3×3 with the last one's factors side by side, pool."""
    return Mixed(
        in_channels,
        [Conv("branch1x1", 320, 1)],
        [
            Conv("branch3x3_1", 384, 1),
            (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
        ],
        [
            Conv("branch3x3dbl_1", 448, 1),
            Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ],
        [pool, Conv("branch_pool", 192, 1)],
    )


class Inception(nn.Module):
    """Inception-v3 as FID defines it: TensorFlow's network of 2015-12-05.

    It differs from torchvision's in average pools that do not count padding, a max pool in the last block,
    and 1008 classes. It is always to be used in evaluation mode, in which it is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, same=False)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b(288)
        self.Mixed_6b = block_c(768, 128)
        self.Mixed_6c = block_c(768, 160)
        self.Mixed_6d = block_c(768, 160)
        self.Mixed_6e = block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, _average)
        self.Mixed_7c = block_e(2048, _maximum)
        self.fc = nn.Linear(FEATURES, _CLASSES)  # no score reads it; its shape tells the right file
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """The pool3 features ``[N, 2048]`` of images ``[N, 3, H, W]`` in [0, 1].

        Other sizes than 299×299 are resized bilinearly without antialiasing, with ``align_corners=False``,
        which is what the common PyTorch port of FID does.
        """
        x = 2 * F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features: Tensor = x.mean((2, 3))
        return features


def load_inception(path: str | Path) -> Inception:
    """The network with FID's weights, on the CPU.

    Args:
        path: a local ``.pth`` or ``.safetensors`` file with the keys of ``pt_inception-2015-12-05``; nothing
            is downloaded. Batch counters may be missing: they play no part.

    Raises:
        UsageError: there is no such file, or it holds something else; the message says which file to get.
    """
    try:
        state = read_state_dict(path)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"{error}. {_ADVICE}") from None
    net = Inception()
    expected, found = _shapes(net.state_dict()), _shapes(state)
    wrong = [
        f"{key} is {found.get(key, 'missing')}, not {shape}"
        for key, shape in expected.items()
        if found.get(key) != shape
    ] + [f"{key} is unknown" for key in found if key not in expected]
    if wrong:
        raise UsageError(f"{path}: not the weights of FID's Inception: {some(wrong, 3)}. {_ADVICE}")
    net.load_state_dict(state, strict=False)
    return net


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith(".num_batches_tracked")}


_ADVICE = (
    f"FID and KID need the file {WEIGHTS} (TensorFlow's Inception of 2015-12-05 converted to PyTorch) at any "
    "local path, as .pth or .safetensors; torchvision's Inception has other weights"
)
