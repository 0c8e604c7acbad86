"""FID and KID: how far the Inception features of generated images are from those of the target's images.

FID is the Fréchet distance of two Gaussians (Heusel et al. 2017), KID an unbiased squared MMD (Bińkowski et
al. 2018). Both depend on how images reach the network; ``PREPARATIONS`` has the two ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from models.training.config import setting
from models.training.errors import UsageError
from models.training.settings import require, require_at_least
from models.translation.metrics.inception import FEATURES, SIZE, Inception, load_inception

FEATURE_SCORES = ("fid", "kid")
_DRAWN = 500  # height and width of the released code's files


@dataclass(frozen=True)
class FidSettings:
    """FID and KID."""

    weights: Path | None = setting(
        None, "FID's Inception weights, .pth or .safetensors; none: neither FID nor KID", resumable=True
    )
    preparation: Literal["clean", "released"] = setting(
        "clean",
        "clean: resize with antialiasing; released: each image stretched by itself, resized without, as the "
        "released code",
        resumable=True,
    )
    kid_subsets: int = setting(100, "random subsets that KID is averaged over; 0: no KID", resumable=True)
    kid_subset_size: int | None = setting(
        100, "images in each subset; none: all, 1000 at most, as the released code", resumable=True
    )
    kid_seed: int = setting(0, "seeds the choice of the subsets", resumable=True)

    def __post_init__(self) -> None:
        require_at_least(0, self, "kid_subsets")
        require_at_least(2, self, "kid_subset_size")
        require(0 <= self.kid_seed < 2**32, f"kid_seed must be from 0 to 2**32 - 1, got {self.kid_seed}")

    def check_images(self, count: int) -> None:
        """Check that so many images are enough; to be asked before work starts.

        Raises:
            UsageError: they are not.
        """
        if count < 2:
            raise UsageError(f"FID needs the covariance of 2 images or more, and there is {count}")
        if self.kid_subsets and self.subset_size(count) > count:
            raise UsageError(
                f"eval.fid.kid_subset_size={self.kid_subset_size}: there are only {count} images; "
                f"expected 2 to {count}, or eval.fid.kid_subsets=0 for no KID"
            )

    def subset_size(self, count: int) -> int:
        """The size of KID's subsets of so many images."""
        return min(1000, count) if self.kid_subset_size is None else self.kid_subset_size

    def load(self) -> Inception:
        """The network of ``weights``, which are set, on the CPU.

        Raises:
            UsageError: the file is missing or holds something else.
        """
        assert self.weights is not None, "asked for where there are weights"
        try:
            return load_inception(self.weights)
        except UsageError as error:
            raise UsageError(f"eval.fid.weights: {error}") from None


def quantize(images: Tensor) -> Tensor:
    """Images in [-1, 1] as an 8-bit file gives them back: rounded to multiples of 1/255 in [0, 1]."""
    return (127.5 * (images + 1)).round().clamp(0, 255) / 255


def clean(images: Tensor) -> Tensor:
    """Resize as Parmar et al. (2022, "clean-fid") do: ``[N, 3, 299, 299]`` for the Inception.

    8 bits, as losslessly saved; bicubic resizing with antialiasing (a = -1/2), in floating point, clipped and
    not rounded again. Their network reads (v - 128) / 128 of gray values v, hence the last factor.
    """
    resized = F.interpolate(
        quantize(images), (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.clamp(0, 1) * (255 / 256)


def released(images: Tensor) -> Tensor:
    """Prepare as the authors' released code does: ``[N, 3, 500, 500]`` for the Inception.

    It scores files. In each image, real ones too, the least value of all channels becomes 0 and the largest
    255, and what is between is cut off to 8 bits, not rounded; matplotlib draws it at 500×500. Its resampling
    is that of early 2019, the nearest pixel, the lower one of two (from version 3.2 on it is a windowed
    filter). The Inception resizes that bilinearly without antialiasing. An image of one value is black.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shares = (images - low) / torch.where(high == low, 1, high - low)
    drawn, places = (255 * shares).floor(), torch.arange(_DRAWN, device=images.device)
    for dim in (2, 3):
        drawn = drawn.index_select(dim, ((2 * places + 1) * images.shape[dim] - 1) // (2 * _DRAWN))
    return drawn / 255


PREPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {"clean": clean, "released": released}


class FeatureStatistics:
    """The moments of feature vectors, summed up in float64 on their device, and the vectors themselves.

    Args:
        dim: D, the vectors' length.
        keep: keep the vectors, which KID reads: 4 D bytes each.
        device: that of the features.
    """

    def __init__(self, dim: int = FEATURES, keep: bool = True, device: torch.device | str = "cpu") -> None:
        self.keep = keep
        self.vectors: list[Tensor] = []
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.products = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add ``[N, D]`` features."""
        x = features.double()
        self.count += len(x)
        self.total += x.sum(0)
        self.products.addmm_(x.T, x)
        if self.keep:
            self.vectors.append(features)

    def reduce(self) -> None:
        """Join what the processes of the default group have seen; all call it once, after the last update.

        Of n processes, the i-th is taken to have seen every n-th image from the i-th on: vectors are put in
        the images' order, so that KID draws the subsets that one process draws.
        """
        count = torch.tensor(self.count, device=self.total.device)
        for moment in (count, self.total, self.products):
            distributed.all_reduce(moment)
        self.count = int(count)
        if self.keep and self.count:
            processes = distributed.get_world_size()
            parts: list[list[Tensor]] = [[]] * processes
            distributed.all_gather_object(parts, [vectors.cpu() for vectors in self.vectors])
            seen = {process: torch.cat(part) for process, part in enumerate(parts) if part}
            places = [torch.arange(len(part)) * processes + process for process, part in seen.items()]
            vectors = torch.cat(list(seen.values()))[torch.cat(places).argsort()]
            self.vectors = [vectors.to(self.total.device)]

    def mean(self) -> Tensor:
        """``[D]``, float64."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """``[D, D]``, float64, unbiased; singular with D images or fewer."""
        return (self.products - torch.outer(self.total, self.total) / self.count) / (self.count - 1)


def frechet_distance(mean_a: Tensor, root_a: Tensor, mean_b: Tensor, root_b: Tensor) -> Tensor:
    """The squared Fréchet distance of two Gaussians, FID on Inception features; 0-d.

    |μ_a - μ_b|² + tr Σ_a + tr Σ_b - 2 tr (Σ_a Σ_b)^½. With Σ = R Rᵀ, the last trace is the sum of the
    singular values of R_aᵀ R_b; roots of the product's eigenvalues would do as well, but turn a rounding
    error ε of those that are 0 into √ε.

    Args:
        mean_a, mean_b: μ, ``[D]``.
        root_a, root_b: ``[D, r]`` of any r, by ``covariance_root``.
    """
    spread = root_a.square().sum() + root_b.square().sum()
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    distance: Tensor = (mean_a - mean_b).square().sum() + spread - 2 * overlap
    return distance


def covariance_root(covariance: Tensor) -> Tensor:
    """``[D, r]`` root R with R Rᵀ = Σ ``[D, D]``, by eigenvalues; r is the rank, up to rounding."""
    values, vectors = torch.linalg.eigh(covariance)
    positive = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, positive] * values[positive].sqrt()
    return root


def kernel_distance(a: Tensor, b: Tensor, subsets: int, subset_size: int, seed: int) -> Tensor:
    """KID: the unbiased squared MMD of k(x, y) = (x·y / D + 1)³, averaged over random subsets; 0-d.

    Args:
        a, b: features ``[N, D]`` and ``[N', D]``.
        subsets: how many pairs of subsets.
        subset_size: of each; drawn without replacement.
        seed: of the draws.
    """
    a, b = a.double(), b.double()
    generator = torch.Generator().manual_seed(seed)

    def draw(features: Tensor) -> Tensor:
        chosen = torch.randperm(len(features), generator=generator)[:subset_size]
        return features[chosen.to(features.device)]

    return torch.stack([squared_mmd(draw(a), draw(b)) for _ in range(subsets)]).mean()


def squared_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared MMD of ``[m, D]`` and ``[n, D]`` features with KID's kernel; 0-d, may be below 0."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        similarities = kernel(x, x)
        return (similarities.sum() - similarities.diag().sum()) / (len(x) * (len(x) - 1))

    return mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean()


class FeatureScores:
    """FID and KID of several outputs against one target over a data set.

    Args:
        count: the number of outputs.
        inception: maps images ``[N, 3, H, W]`` in [0, 1] to features ``[N, 2048]``: ``load_inception``'s.
        settings: how to prepare images, and KID's subsets.
        device: that of the Inception and the images.
    """

    def __init__(
        self,
        count: int,
        inception: Callable[[Tensor], Tensor],
        settings: FidSettings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.inception = inception
        self.settings = settings
        keep = settings.kid_subsets > 0
        self.target, *self.outputs = (FeatureStatistics(keep=keep, device=device) for _ in range(count + 1))

    @torch.no_grad()
    def update(self, outputs: Sequence[Tensor], target: Tensor) -> None:
        """Add a batch: ``[N, C, H, W]`` in [-1, 1] of every output and of the target, C 1 or 3.

        The Inception runs in float32, whatever autocast says; single channels are tiled.
        """
        images = torch.cat([target, *outputs]).float().expand(-1, 3, -1, -1)
        with torch.autocast(images.device.type, enabled=False):
            features = self.inception(PREPARATIONS[self.settings.preparation](images))
        for statistics, part in zip((self.target, *self.outputs), features.split(len(target)), strict=True):
            statistics.update(part)

    def reduce(self) -> None:
        """Join what the processes of the default group have seen; all call it once, after the last update."""
        for statistics in (self.target, *self.outputs):
            statistics.reduce()

    def compute(self) -> list[dict[str, float]]:
        """Compute every output's ``fid``, and ``kid`` times 100 as in the paper; NaN if an image has any.

        Raises:
            UsageError: too few images, see ``FidSettings.check_images``.
        """
        self.settings.check_images(self.target.count)
        mean, root = self.target.mean(), covariance_root(self.target.covariance())
        return [{"fid": self._fid(output, mean, root)} | self._kid(output) for output in self.outputs]

    def _fid(self, output: FeatureStatistics, mean: Tensor, root: Tensor) -> float:
        covariance = output.covariance()
        if not covariance.isfinite().all():  # a decomposition would raise
            return nan
        return float(frechet_distance(output.mean(), covariance_root(covariance), mean, root))

    def _kid(self, output: FeatureStatistics) -> dict[str, float]:
        chosen = self.settings
        if not chosen.kid_subsets:
            return {}
        pair = torch.cat(output.vectors), torch.cat(self.target.vectors)
        size = chosen.subset_size(output.count)
        # Subsets of all images differ in nothing but their order.
        subsets = chosen.kid_subsets if size < output.count else 1
        distance = kernel_distance(*pair, subsets, size, chosen.kid_seed)
        return {"kid": 100 * float(distance)}


def feature_scores(
    settings: FidSettings, outputs: int, images: int, device: torch.device | str = "cpu"
) -> FeatureScores | None:
    """FID and KID as the settings have them, with nothing counted yet; None without weights.

    Args:
        settings: the weights' file is read.
        outputs: the number of outputs.
        images: how many images there will be.
        device: that of the images.

    Raises:
        UsageError: the weights cannot be loaded; too few images.
    """
    if settings.weights is None:
        return None
    settings.check_images(images)
    return FeatureScores(outputs, settings.load().to(device), settings, device)
