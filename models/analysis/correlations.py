"""Whether feature maps follow an image's texture or the scene's boundaries, against random sets of channels.

Of its Figure 3 the paper says that RGB's channels prefer texture and depth's prefer boundaries (Wang et al.,
"Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020). It measures neither, so the measures are ours.
Both are taken of a scene's inputs, as the root of the mean square over each cell of the feature maps:

    texture     the Laplacian of the image's luminance
    boundaries  the differences of ln(depth) between neighbors, which no unit and no scale changes; cells
                without measured depth do not count
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.analysis.channel_sets import Layer
from models.analysis.feature_maps import FeatureMaps

TARGETS = ("texture", "boundaries")
QUANTITIES = ("normalized", "magnitude", "z", "rectified")
DRAWS = 20
_LUMINANCE = (0.299, 0.587, 0.114)
_ROUNDING = 1e-12  # of sums in float64, relative


@dataclass(frozen=True)
class Correlation:
    """The correlation of a modality's map, the mean over a set's channels, with a target.

    Attributes:
        modality: the map's.
        pair: the two modalities that the set belongs to.
        channels: the set's name.
        size: how many they are.
        quantity: what is averaged, of ``QUANTITIES``.
        target: of ``TARGETS``.
        value: Pearson's over the cells of a map, averaged over the images; None where the set is empty, or
            the map or the target constant in all of them.
        random: the same of each random set of as many channels.
    """

    modality: str
    pair: tuple[str, str]
    channels: str
    size: int
    quantity: str
    target: str
    value: float | None
    random: tuple[float, ...]

    @property
    def alone(self) -> bool:
        """Whether the modality uses the channels and the other one of its pair does not."""
        return self.channels == ("S10" if self.modality == self.pair[0] else "S01")

    @property
    def of(self) -> str:
        """The modality and the set, in words."""
        return f"{self.modality}, {self.channels} of {'/'.join(self.pair)}"

    @property
    def random_mean(self) -> float | None:
        """The random sets' mean."""
        return float(np.mean(self.random)) if self.random else None

    @property
    def random_spread(self) -> float | None:
        """The random sets' standard deviation."""
        return float(np.std(self.random, ddof=1)) if len(self.random) > 1 else None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "random_mean": self.random_mean, "random_spread": self.random_spread}


def texture(image: Tensor, std: Sequence[float]) -> NDArray[np.float64]:
    """The squared Laplacian of a color image's luminance, ``[H, W]``, colors from 0 to 1.

    Args:
        image: ``[3, H, W]`` as networks take it, red first.
        std: by which its colors were divided.
    """
    weights = torch.tensor(_LUMINANCE, dtype=torch.float64)
    scaled = weights * torch.tensor(std, dtype=torch.float64)
    luminance = (scaled[:, None, None] * image.double()).sum(0).numpy()  # but for a constant
    laplacian = cv2.Laplacian(luminance, cv2.CV_64F, borderType=cv2.BORDER_REPLICATE)
    return np.square(np.asarray(laplacian, np.float64))


def boundaries(depth: Tensor) -> NDArray[np.float64]:
    """The squared differences of ln(depth) to the right and lower neighbors, ``[H-1, W-1]``; NaN where one of
    the three was not measured.

    Args:
        depth: ``[H, W]``, in any unit, or disparity; 0 is missing.
    """
    values = depth.double().numpy()
    known = np.log(values, out=np.full_like(values, np.nan), where=values > 0)
    across, down = np.diff(known, axis=1)[:-1], np.diff(known, axis=0)[:, :-1]
    return np.asarray(across**2 + down**2)


def in_cells(squares: NDArray[np.float64], size: tuple[int, int]) -> Tensor:
    """The root of the mean of squares over the cells of a grid of ``size``, NaN where none is known."""
    known = np.isfinite(squares)
    planes = torch.from_numpy(np.stack([np.where(known, squares, 0.0), known]))
    total, share = F.adaptive_avg_pool2d(planes, size).unbind()
    return (total / share).sqrt()


def correlations(maps: Tensor, target: Tensor) -> Tensor:
    """Pearson's correlation of maps ``[..., P]`` with a target ``[P]`` over the places where it is known.

    NaN where either is constant but for rounding, or known in fewer than two places.
    """
    known = target.isfinite()
    maps, target = maps[..., known], target[known]
    varied = maps.var(-1, correction=0) > _ROUNDING**2 * maps.square().mean(-1)
    maps, target = maps - maps.mean(-1, keepdim=True), target - target.mean()
    found = (maps * target).sum(-1) / (maps.square().sum(-1) * target.square().sum()).sqrt()
    return found.where(varied, math.nan)


class Correlator:
    """Correlates the maps of a layer's sets, and of random sets, with targets over many images.

    Args:
        layer: with the sets, of which S00 is left out.
        modalities: their names.
        draws: random sets for each of them, of as many of the layer's channels, without replacement.
        seed: of the draws.
    """

    def __init__(self, layer: Layer, modalities: Sequence[str], draws: int = DRAWS, seed: int = 0) -> None:
        self.modalities = modalities
        self.keys = layer.drawn
        generator = torch.Generator().manual_seed(seed)
        weights = []
        for mean in layer.means():
            # The weights in a random order, those of an empty set included, are a random set's.
            orders = torch.rand(draws, len(mean), generator=generator).argsort(1)
            weights += [mean[None], mean[orders]]
        self.weights = torch.cat(weights)
        self.sizes = [layer.sizes(other)[name] for other, name in self.keys]
        self.found: dict[str, list[Tensor]] = {name: [] for name in TARGETS}

    def add(self, maps: FeatureMaps, targets: Mapping[str, Tensor]) -> None:
        """Count one image.

        Args:
            maps: of N = 1.
            targets: ``[h, w]`` by their names; those that are missing are not counted.
        """
        values = torch.stack([getattr(maps, name)[:, 0].flatten(2) for name in QUANTITIES])
        means = self.weights @ values.cpu()  # [Q, M, sets * (1 + draws), P]
        for name, target in targets.items():
            found = correlations(means, target.flatten())
            self.found[name].append(found.unflatten(-1, (len(self.keys), -1)))

    def compute(self) -> list[Correlation]:
        """The correlations of every set's two modalities, averaged over the images that were counted."""
        means = {name: torch.stack(found).nanmean(0) for name, found in self.found.items() if found}
        rows = []
        for s, (other, channels) in enumerate(self.keys):
            pair = (self.modalities[0], self.modalities[other])
            for (q, quantity), m, (target, mean) in itertools.product(
                enumerate(QUANTITIES), (0, other), means.items()
            ):
                value, *random = (None if math.isnan(each) else each for each in mean[q, m, s].tolist())
                drawn = tuple(each for each in random if each is not None)
                of = (self.modalities[m], pair, channels, self.sizes[s], quantity, target)
                rows.append(Correlation(*of, value, drawn))
        return rows
