"""The discriminator: pix2pix's PatchGAN, which says of every 70x70 patch whether it is real.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, with the instance
norms of Wang et al., NeurIPS 2020. All branches share it; each is scored beside its own input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.networks.backend import runs_on_backend, with_backend
from models.networks.systems.blocks import Down, initialize, instance_norm

LEAST = 24  # smaller images leave no patch


class PatchGAN(nn.Module):
    """``patchgan`` builds one and describes the arguments; ``discriminate`` calls it."""

    def __init__(self, in_channels: int, base_width: int) -> None:
        super().__init__()
        widths = [base_width << i for i in range(4)]
        self.in_channels = in_channels
        self.levels = nn.Sequential(
            Down(in_channels, widths[0]),
            Down(widths[0], widths[1], instance_norm(widths[1], 1)),
            Down(widths[1], widths[2], instance_norm(widths[2], 1)),
            Down(widths[2], widths[3], instance_norm(widths[3], 1), stride=1),
        )
        self.decide = nn.Conv2d(widths[3], 1, 4, padding=1)

    @runs_on_backend
    def forward(self, x: Tensor) -> Tensor:
        """Pairs ``[rows, in_channels, H, W]`` of an input and an image to logits ``[rows, 1, h, w]``.

        h and w are H/8 - 2 and W/8 - 2, rounded down: 30 for 256. Positive logits mean real.

        Raises:
            ValueError: other channels, or images of less than 24 x 24.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [rows, {self.in_channels}, H, W], got {tuple(x.shape)}")
        if min(x.shape[-2:]) < LEAST:
            height, width = x.shape[-2:]
            raise ValueError(f"x must be of at least {LEAST} x {LEAST} pixels, got {height} x {width}")
        logits: Tensor = self.decide(self.levels(x))
        return logits


def patchgan(in_channels: int = 6, base_width: int = 64, *, backend: str | None = None) -> PatchGAN:
    """A 70x70 PatchGAN discriminator, conditioned on the input of the branch that it scores.

    Args:
        in_channels: channels of a modality's input and of the image, together.
        base_width: channels of the first level; they double up to eightfold.
        backend: whose ops the forward pass runs, a name as for ``cen_ext.use_backend``; None for that of the
            context, or else the best that can run.

    Returns:
        A module from pairs to logits. Weights start as pix2pix's.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in (("in_channels", in_channels), ("base_width", base_width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    net = PatchGAN(in_channels, base_width)
    initialize(net)
    return with_backend(net, backend)


def discriminate(
    discriminator: Callable[[Tensor], Tensor],
    inputs: Tensor,  # [M*N, C, H, W], stacked modality-major
    *candidates: Tensor,
) -> tuple[Tensor, ...]:
    """The discriminator's logits for several sets of images beside the modalities' inputs, in one pass.

    Args:
        discriminator: a ``PatchGAN``, bare or wrapped.
        inputs: what the generator read.
        candidates: at least one set of images ``[M, N, C', H, W]``, one per branch, or ``[N, C', H, W]``, the
            same for all branches (real ones). Detach generated ones where the discriminator learns.

    Returns:
        For each candidate ``[M, N, 1, h, w]``.

    Raises:
        ValueError: a candidate's rows are not as many as the inputs'.
    """
    stacked = [_stacked(images, inputs.shape[0]) for images in candidates]
    pairs = torch.cat([torch.cat([inputs] * len(stacked)), torch.cat(stacked)], 1)
    batch = candidates[0].shape[-4]
    logits: Tensor = discriminator(pairs)
    split: Tensor = logits.unflatten(0, (len(stacked), -1, batch))
    return split.unbind()


def _stacked(images: Tensor, rows: int) -> Tensor:
    """``[M, N, C, H, W]`` or ``[N, C, H, W]`` as ``[M*N, C, H, W]`` of so many rows."""
    if images.dim() == 4 and len(images) and rows % len(images) == 0:
        images = images.expand(rows // len(images), *images.shape)
    if images.dim() != 5 or images.shape[0] * images.shape[1] != rows:
        raise ValueError(
            "a candidate must be [M, N, C, H, W], or [N, C, H, W] for all branches, with M*N the inputs' "
            f"{rows} rows, got {tuple(images.shape)}"
        )
    return images.flatten(0, 1)
