"""Theorem 1 as formulas: the probability that a scale γ = 0 is a local minimum of the penalized loss.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020, Theorem 1, has it as
``2Φ(λ / |∂L/∂x'|) - 1``.

A channel of K elements is ``x' = γ x̂ + β`` with x̂ normalized. With ``G = ∂L/∂x'`` its task gradient is
``d = ∂L/∂γ = sum of G_k x̂_k``, and ``γ = 0`` is a local minimum of ``L + λ|γ|`` where ``|d| < λ``. Read as a
random vector that does not depend on G, x̂ makes d normal with mean 0:

- of independent standard normal elements, with the deviation ``‖G‖``: ``|∂L/∂x'|`` is the ℓ2 norm over the
  channel's elements;
- normalized by its own statistics, whose elements sum to 0 and their squares to K, with the deviation
  ``‖G - mean G‖ sqrt(K / (K - 1))``.

Neighboring elements that are alike make the deviation larger where G is smooth, and an x̂ that tells of the
target gives d a mean: either way the probability is smaller than the formula says.

Shapes: ``gradient`` and ``xhat`` are ``[groups, K]`` float64, a row for each set of elements that has
statistics of its own: one of a batch norm's channel, N of an instance norm's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attraction_probability(penalty: float, deviation: Tensor) -> Tensor:
    """Theorem 1: the probability that ``|d| < λ`` of a normal d of mean 0, ``2Φ(λ / deviation) - 1``.

    Args:
        penalty: λ >= 0; 0 gives 0.
        deviation: of d, of any shape; 0 gives 1, as d is 0 then, unless λ is.
    """
    if penalty == 0:
        return torch.zeros_like(deviation)
    return torch.erf(penalty / (deviation * math.sqrt(2)))


def interval_probability(penalty: float, mean: Tensor, deviation: Tensor) -> Tensor:
    """The same of a normal d of another mean, ``Φ((λ - mean) / deviation) - Φ((-λ - mean) / deviation)``."""
    if penalty == 0:
        return torch.zeros_like(deviation)
    # Half the difference of two error functions; a deviation of 0 makes the arguments infinite or NaN.
    scale = deviation.clamp(min=torch.finfo(deviation.dtype).tiny) * math.sqrt(2)
    return (torch.erf((penalty - mean) / scale) + torch.erf((penalty + mean) / scale)) / 2


def gradient_norm(gradient: Tensor) -> Tensor:
    """``‖G‖``, 0-d: the deviation of d where x̂ is of independent standard normal elements."""
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def centered_norm(gradient: Tensor) -> Tensor:
    """``‖G - mean G‖ sqrt(K / (K - 1))``, 0-d: the deviation of d where each row of x̂ is normalized.

    The rows' variances add up.
    """
    count = gradient.shape[1]
    norm: Tensor = torch.linalg.vector_norm(_centered(gradient))
    return norm * math.sqrt(count / max(count - 1, 1))


def shuffled_moments(gradient: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, 0-d, of d where each row of this x̂ is permuted at random.

    Exact, and where x̂ is normalized by its own statistics 0 and ``centered_norm``. Running statistics leave
    it a mean and another variance.
    """
    count = gradient.shape[1]
    mean = count * (gradient.mean(1) * xhat.mean(1)).sum()
    squares = _centered(gradient).square().sum(1) * _centered(xhat).square().sum(1) / max(count - 1, 1)
    return mean, squares.sum().sqrt()


def shuffled(xhat: Tensor) -> Tensor:
    """x̂ with the elements of each row permuted at random."""
    if len(xhat) == 1:
        return xhat[:, torch.randperm(xhat.shape[1], device=xhat.device)]
    return xhat.gather(1, torch.rand(xhat.shape, device=xhat.device).argsort(1))


def _centered(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)
