"""Scores of the branches' and the ensemble's images against the target's: errors, PSNR, SSIM, FID, KID.

Not torchmetrics' SSIM, with which a test compares it: version 1.9.0 counts windows that reach over the edges
(0.356 instead of 0.362 on a noisy image of 256x256), and took 2.69 s for three RGB images of that size in
float64, this 0.18 s (2026-11-29, medians of 5, CPU time of one thread on a shared machine). PSNR is one line
from the squared error, which is needed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt

import torch
from torch import Tensor, distributed

from models.translation.holes import filled, measured
from models.translation.metrics.fid import FEATURE_SCORES, FeatureScores

SCORES = ("l1", "l2", "mae", "mse", "rmse", "psnr", "ssim")
_WINDOW = 11  # pixels; Wang et al. (2004)
_SIGMA = 1.5


class TranslationMetrics:
    """Means over a data set of each image's scores, of several outputs, on the device.

    - ``l1``, ``l2``: mean absolute and mean squared difference on the network's scale, [-1, 1]; ``l1`` is the
      generator's loss.
    - ``mae``, ``mse``: the same two in the target's unit. None of the four is a root or scaled up.
    - ``rmse``: the root of ``mse``, taken once, of the mean over all images, as the released code takes it of
      ``l2``. What the papers' tables call MSE is that root on [-1, 1] (``value_range`` of (-1, 1)), times 10,
      as MAE is: their "MSE" exceeds 2 MAE, which squares of differences up to 2 cannot.
    - ``psnr``: in dB, the peak being the whole range; infinite for an image without error.
    - ``ssim``: as ``structural_similarity``, averaged over channels.
    - ``fid``, ``kid``: with ``features`` only; see ``models.translation.metrics.fid``.

    All are of the channels that the generator gives, three also where the target's files have one, which is
    tiled. ``predict`` writes their mean into such a file, whose errors are therefore a little smaller (and
    PSNR higher) than those reported here, most of all L2 and MSE, but for rounding to 16 bits.

    Where the target has holes, errors and PSNR are those of the measured pixels, and SSIM is the mean over
    the windows around them, in which holes are the same in both images; images without one do not count.

    Args:
        names: the outputs: the input domains, then ``ensemble``; further images to compare with, such as
            the training images' mean, may follow.
        value_range: what -1 and 1 stand for in the target's unit: (0, 1) for images, (0, 255) for gray
            values, for log-encoded depth the range of log(1 + x).
        features: FID and KID of as many outputs.
        device: that of the images.
        hole: the value of the target's pixels that do not count, as in ``models.translation.holes``.
    """

    def __init__(
        self,
        names: Sequence[str],
        value_range: tuple[float, float] = (0.0, 1.0),
        features: FeatureScores | None = None,
        device: torch.device | str = "cpu",
        hole: float | None = None,
    ) -> None:
        low, high = value_range
        if not low < high:
            raise ValueError(f"value_range must be (low, high) with low below high, got {value_range}")
        if features is not None and len(features.outputs) != len(names):
            raise ValueError(f"features is for {len(features.outputs)} outputs, names has {len(names)}")
        self.names = tuple(names)
        self.unit = (high - low) / 2
        self.features = features
        self.hole = hole
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)  # l1, l2, psnr, ssim

    @torch.no_grad()
    def update(self, outputs: Sequence[Tensor], target: Tensor) -> None:
        """Add a batch: ``[N, C, H, W]`` in [-1, 1] of every output, and the target of that shape.

        Raises:
            ValueError: another number of outputs, or shapes that do not fit.
        """
        self._check(outputs, target)
        images = filled(torch.stack(tuple(outputs)), target, self.hole)
        if self.features is not None:
            self.features.update(images.unbind(), target)
        known = measured(target, self.hole)
        truth, images, share = target.double(), images.double(), known.double().mean((1, 2, 3))
        difference = images - truth
        l1 = difference.abs().mean((2, 3, 4)) / share
        l2 = difference.square().mean((2, 3, 4)) / share
        psnr = 10 * torch.log10(4 / l2)
        around = None if self.hole is None else known
        ssim = structural_similarity((images + 1) / 2, (truth + 1) / 2, around).mean(2)
        scores = torch.stack([l1, l2, psnr, ssim], -1)
        counts = _inside(known).flatten(1).any(1)
        self.sums += torch.where(counts[:, None], scores, 0).sum(1)
        self.count += counts.sum()

    def reduce(self) -> None:
        """Join what all processes have seen, each of which has it then; alone, this does nothing.

        The processes are those of torch.distributed's default group, which all must call this, once, after
        the last update.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        distributed.all_reduce(self.count)
        distributed.all_reduce(self.sums)
        if self.features is not None:
            self.features.reduce()

    def compute(self) -> dict[str, float]:
        """``<output>/<score>`` for every output and score; NaN without any image.

        Raises:
            UsageError: too few images for FID or KID.
        """
        means = (self.sums / self.count).tolist()
        features = self.features.compute() if self.features is not None else [{}] * len(self.names)
        found: dict[str, float] = {}
        for name, (l1, l2, psnr, ssim), more in zip(self.names, means, features, strict=True):
            mse = self.unit**2 * l2
            values = (l1, l2, self.unit * l1, mse, sqrt(mse), psnr, ssim)
            found |= {f"{name}/{score}": value for score, value in zip(SCORES, values, strict=True)}
            found |= {f"{name}/{score}": value for score, value in more.items()}
        return found

    def _check(self, outputs: Sequence[Tensor], target: Tensor) -> None:
        if len(outputs) != len(self.names):
            raise ValueError(
                f"expected {len(self.names)} outputs ({', '.join(self.names)}), got {len(outputs)}"
            )
        for name, output in zip(self.names, outputs, strict=True):
            if output.shape != target.shape:
                raise ValueError(f"{name} is {tuple(output.shape)}, the target {tuple(target.shape)}")
        if target.dim() != 4 or target.shape[1] not in (1, 3) or min(target.shape[2:]) < _WINDOW:
            expected = f"[N, 1 or 3, H, W] of {_WINDOW}×{_WINDOW} pixels or more, for SSIM"
            raise ValueError(f"the target is {tuple(target.shape)}; expected {expected}")


def structural_similarity(a: Tensor, b: Tensor, counted: Tensor | None = None) -> Tensor:
    """SSIM of images ``[..., H, W]`` in [0, 1] (Wang et al. 2004), each channel for itself; ``[...]``.

    Gaussian windows of 11×11 pixels, σ 1.5, K 0.01 and 0.03; the mean over all windows that lie in the image.
    (Implementations that reflect the image at its edges differ, by 0.01 to 0.03 on photographs of 256×256.)
    The two broadcast.

    Args:
        a, b: the images.
        counted: a mask that broadcasts with them, of the pixels around which windows count; None: all.
            Without any SSIM is NaN.
    """
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _window_means(a), _window_means(b)
    variances = _window_means(a * a) - mean_a**2 + _window_means(b * b) - mean_b**2
    covariance = _window_means(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    similar = luminance * (2 * covariance + c2) / (variances + c2)
    if counted is None:
        return similar.mean((-2, -1))
    inside = _inside(counted).to(similar.dtype)
    return (similar * inside).sum((-2, -1)) / inside.sum((-2, -1))


def _inside(image: Tensor) -> Tensor:
    """The pixels ``[..., H - 10, W - 10]`` that are the middle of a window."""
    edge = _WINDOW // 2
    return image[..., edge:-edge, edge:-edge]


def _window_means(x: Tensor) -> Tensor:
    """``[..., H - 10, W - 10]`` Gaussian means of every window of ``[..., H, W]``, rows first."""
    weights = [exp(-(((i - _WINDOW // 2) / _SIGMA) ** 2) / 2) for i in range(_WINDOW)]
    for dim in (-2, -1):
        size = x.shape[dim] - _WINDOW + 1
        total = sum(weights)
        x = sum(
            (weight / total * x.narrow(dim, i, size) for i, weight in enumerate(weights)), x.new_zeros(())
        )
    return x


def table(metrics: dict[str, float]) -> str:
    """The metrics as aligned text: one row per output, one column per score."""
    names = list(dict.fromkeys(key.partition("/")[0] for key in metrics))
    columns = [score for score in (*SCORES, *FEATURE_SCORES) if f"{names[0]}/{score}" in metrics]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"  {score:>9}" for score in columns)]
    for name in names:
        lines.append(
            f"{name:<{width}}" + "".join(f"  {metrics[f'{name}/{score}']:>9.4f}" for score in columns)
        )
    return "\n".join(lines)
