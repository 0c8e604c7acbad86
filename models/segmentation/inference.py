"""A network's scores and labels of images, by every branch and by the ensemble.

Images are evaluated in several sizes (``eval.scales``), mirrored as well (``eval.flip``), and through a
window that slides over each size (``eval.window``). The paper's multi-scale evaluation (section 4.1) says
neither its scales nor what it averages. Here it is the logits, not the probabilities: the ensemble is affine
in the branches' logits (Eq. 4, and ``fusion="concat"``), so that the mean of the views' ensembles is the
ensemble of the branches' means.

Every view is kept as coarse as the network leaves it, a sixteenth of the image's pixels for RefineNet, and
enlarged for one output at a time: of M + 1 outputs of K channels only one is held at label size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.data.kinds import SPARSE, is_mixed, kind_by_name
from models.segmentation.losses import outputs
from models.segmentation.settings import SegmentationRecipe
from models.training.precision import at_least_float32, autocast

Place = tuple[slice, slice]  # rows and columns


def predict_labels(
    net: nn.Module,
    images: Tensor,
    size: Sequence[int],
    recipe: SegmentationRecipe,
    kinds: Sequence[str | None] = (),
) -> list[Tensor]:
    """Labels ``[N, H, W]`` of every branch and of the ensemble; arguments as for ``scores``."""
    found = scores(net, images, size, recipe, kinds)
    return [found.labels(output) for output in range(len(found))]


@torch.no_grad()
def scores(
    net: nn.Module,
    images: Tensor,  # [M*N, C, h, w]
    size: Sequence[int],
    recipe: SegmentationRecipe,
    kinds: Sequence[str | None] = (),
) -> Scores:
    """Run the network; the mean logits of each branch and, last, of the ensemble.

    Args:
        net: in evaluation mode; takes images of any size.
        images: stacked modality-major, on the network's device; of the present modalities alone within
            ``cen_ext.present``.
        size: H and W, that of the labels; logits are resized to it.
        recipe: ``eval`` gives the views, and ``run.precision`` what the network computes in; logits are
            averaged in float32 at least.
        kinds: of the M modalities in images, which decide how each is resized and mirrored; empty: those
            that ``data.modalities`` has by name.
    """
    kinds = kinds or [kind_by_name(name) for name in recipe.data.modalities]
    images = images.unflatten(0, (len(kinds), -1))
    views = [_evaluate(net, resized(images, scale, kinds), recipe, kinds) for scale in recipe.eval.scales]
    return Scores(views, (size[0], size[1]), recipe.eval.interpolation)


@dataclass(frozen=True)
class Scores:
    """A network's logits of images, as coarse as it left them; an output's are enlarged when asked for.

    Enlarging an output and choosing its classes takes a CPU as long as a small network takes for all of them.
    Iterating gives ``logits`` of each in turn.
    """

    views: list[_View]
    size: tuple[int, int]
    interpolation: str

    def __len__(self) -> int:
        return len(self.views[0].logits)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.logits, range(len(self)))

    @torch.no_grad()
    def logits(self, output: int) -> Tensor:
        """An output's mean logits ``[N, K, H, W]`` over all views."""
        total = self.views[0].score(output, self.size, self.interpolation)
        for view in self.views[1:]:
            total += view.score(output, self.size, self.interpolation)
        return total.div_(len(self.views))

    def labels(self, output: int) -> Tensor:
        """An output's labels ``[N, H, W]``."""
        return self.logits(output).argmax(1)


def resized(images: Tensor, scale: float, kinds: Sequence[str | None]) -> Tensor:
    """``[M, N, C, h, w]`` images with sides of ``scale`` times the length, made as in training.

    Kinds that may be averaged are resized bilinearly. Depth and what comes of it takes the nearest value:
    nothing lies between an object and the wall behind it, and 0 (missing) is no distance. Distances stay what
    they are.
    """
    if scale == 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    return torch.stack([_resized(image, size, kind) for image, kind in zip(images, kinds, strict=True)])


def _resized(image: Tensor, size: Sequence[int], kind: str | None) -> Tensor:
    """Resize as ``models.data.kinds.resized`` does, but ``[N, C, h, w]``."""
    if not is_mixed(kind):
        return F.interpolate(image, size, mode="nearest-exact")
    linear = F.interpolate(image, size, mode="bilinear")
    if kind != SPARSE:
        return linear
    known = (image != 0).any(1, keepdim=True).to(image.dtype)
    share = F.interpolate(known, size, mode="bilinear")
    there = F.interpolate(known, size, mode="nearest-exact") > 0
    return torch.where(there, linear / share, 0)


def mirrored(images: Tensor, kinds: Sequence[str | None]) -> Tensor:
    """``[M, N, C, h, w]`` images of the mirrored scene; its normals point the other way along x.

    Points keep their sign, as in ``models.data.kinds.mirrored``.
    """
    flipped = images.flip(-1)
    for index, kind in enumerate(kinds):
        if kind == "normals":
            flipped[index, :, 0].neg_()
    return flipped


def places(size: Sequence[int], side: int | None, overlap: float) -> list[Place]:
    """Windows that cover an image of ``size``, row by row.

    They are squares of ``side``, cut down to an image that is smaller. The first and the last lie at edges
    and the others evenly between them, so that neighbors share at least ``overlap`` of a window. With
    ``side=None`` the whole image is the only one.
    """
    rows, columns = (_spans(length, side or length, overlap) for length in size)
    return [(row, column) for row in rows for column in columns]


def _spans(length: int, side: int, overlap: float) -> list[slice]:
    if length <= side:
        return [slice(0, length)]
    room, stride = length - side, max(1, int(side * (1 - overlap)))
    steps = -(-room // stride)
    starts = [step * room // steps for step in range(steps + 1)]
    return [slice(start, start + side) for start in starts]


class _View(NamedTuple):
    """The network's logits of images in one size."""

    size: tuple[int, int]
    places: list[Place]
    logits: Tensor  # [M+1, windows, N, K, h', w']

    def score(self, output: int, size: Sequence[int], interpolation: str) -> Tensor:
        """One output's logits ``[N, K, H, W]``; where windows overlap, their mean."""

        def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
            # A CPU finds the largest of 40 channels 3.6 times as fast where they lie side by side.
            coarse = logits.contiguous(memory_format=torch.channels_last)
            return F.interpolate(coarse, tuple(size), mode=interpolation, align_corners=False)

        windows = self.logits[output]
        if len(windows) == 1:
            return enlarged(windows[0], size)
        canvas = torch.empty(
            (*windows.shape[1:3], *self.size),
            dtype=windows.dtype,
            device=windows.device,
            memory_format=torch.channels_last,
        ).zero_()
        count = windows.new_zeros(self.size)
        for (rows, columns), window in zip(self.places, windows, strict=True):
            part = canvas[..., rows, columns]
            part += enlarged(window, part.shape[-2:])
            count[rows, columns] += 1
        return enlarged(canvas.div_(count), size)


def _evaluate(
    net: nn.Module, images: Tensor, recipe: SegmentationRecipe, kinds: Sequence[str | None]
) -> _View:
    height, width = images.shape[-2:]
    size = (height, width)
    found = places(size, recipe.eval.window, recipe.eval.overlap)
    at_once = max(1, recipe.eval.batch_size // images.shape[1])
    logits = []
    for first in range(0, len(found), at_once):
        some = found[first : first + at_once]
        windows = torch.cat([images[..., rows, columns] for rows, columns in some], 1)
        logits.append(_logits(net, windows, recipe, kinds).unflatten(1, (len(some), -1)))
    return _View(size, found, torch.cat(logits, 1))


def _logits(
    net: nn.Module, images: Tensor, recipe: SegmentationRecipe, kinds: Sequence[str | None]
) -> Tensor:
    """``[M+1, N, K, h', w']`` of ``[M, N, C, h, w]``; with ``flip`` the mean with the mirrored images'."""

    def run(images: Tensor) -> Tensor:
        # Convolutions are fastest in the format that loaders make; cut and mirrored images have lost it.
        stacked = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with autocast(recipe.run.precision, images.device):
            output = net(stacked)
        return outputs(at_least_float32(output))

    logits = run(images)
    if recipe.eval.flip:
        logits.add_(run(mirrored(images, kinds)).flip(-1)).div_(2)
    return logits
