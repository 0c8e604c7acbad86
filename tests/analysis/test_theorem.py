"""Theorem 1's formula against draws of x̂: where it holds, and how far it is off where it does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.analysis.theorem import (
    attraction_probability,
    centered_norm,
    gradient_norm,
    interval_probability,
    shuffled,
    shuffled_moments,
)

ELEMENTS, DRAWS = 2048, 4000
WITH_MEAN, CENTERED = 0.283, 0.576  # the formula with ‖G‖ and with ‖G - mean G‖
DOUBLE = torch.float64


def normalized(x: Tensor) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    return x / x.square().mean(1, keepdim=True).sqrt()


def rough_gradient() -> Tensor:
    """``[1, K]`` of deviation 1 and the mean that makes λ = 0.8 ``‖G - mean G‖`` the table's 0.283 of ‖G‖."""
    ratio = 0.8 / (math.sqrt(2) * float(torch.erfinv(torch.tensor(WITH_MEAN, dtype=DOUBLE))))
    return normalized(torch.randn(1, ELEMENTS, dtype=DOUBLE)) + math.sqrt(ratio**2 - 1)


def penalty_of(gradient: Tensor) -> float:
    return 0.8 * float((gradient - gradient.mean()).norm())


def share(xhat: Tensor, gradient: Tensor) -> float:
    """The share of draws ``[draws, K]`` of x̂ with ``|d| < λ``."""
    return float(((xhat @ gradient[0]).abs() < penalty_of(gradient)).double().mean())


def standard_errors(observed: float, predicted: float) -> float:
    return abs(observed - predicted) / math.sqrt(predicted * (1 - predicted) / DRAWS)


def autoregressive(correlation: float) -> Tensor:
    """``[draws, K]`` of a stationary AR(1)."""
    x = torch.randn(ELEMENTS, DRAWS, dtype=DOUBLE)
    for k in range(1, ELEMENTS):
        x[k] = correlation * x[k - 1] + math.sqrt(1 - correlation**2) * x[k]
    return x.T


def test_the_gradients_norm_where_nothing_is_centered() -> None:
    gradient = rough_gradient()
    predicted = float(attraction_probability(penalty_of(gradient), gradient_norm(gradient)))
    assert predicted == pytest.approx(WITH_MEAN, abs=5e-4)
    observed = share(torch.randn(DRAWS, ELEMENTS, dtype=DOUBLE), gradient)
    assert standard_errors(observed, predicted) < 3


@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_the_centered_norm_under_batch_norm(kind: str) -> None:
    gradient = rough_gradient()
    predicted = float(attraction_probability(penalty_of(gradient), centered_norm(gradient)))
    assert predicted == pytest.approx(CENTERED, abs=5e-4)
    x = torch.randn(DRAWS, ELEMENTS, dtype=DOUBLE)
    x = normalized(x if kind == "normal" else torch.empty_like(x).exponential_())
    observed = share(x, gradient)
    assert standard_errors(observed, predicted) < 3
    assert standard_errors(observed, WITH_MEAN) > 20  # the mean of G belongs to β


def test_correlated_elements_and_a_smooth_gradient() -> None:
    place = torch.arange(ELEMENTS, dtype=DOUBLE)
    gradient = (2 * math.pi * 17 * place / ELEMENTS).cos()[None]
    predicted = float(attraction_probability(penalty_of(gradient), centered_norm(gradient)))
    assert predicted == pytest.approx(CENTERED, abs=5e-4)
    correlation = 0.95 ** (place[:, None] - place).abs()
    deviation = (gradient @ correlation @ gradient.T).sqrt()
    informed = float(attraction_probability(penalty_of(gradient), deviation))
    assert informed == pytest.approx(0.146, abs=2e-3)
    xhat = normalized(autoregressive(0.95))
    observed = share(xhat, gradient)
    assert standard_errors(observed, informed) < 3
    assert standard_errors(observed, predicted) > 20
    assert standard_errors(share(shuffled(xhat), gradient), predicted) < 3


def test_moments_of_shuffling() -> None:
    """Of three rows, as an instance norm has, with means that running statistics leave."""
    gradient, xhat = torch.randn(3, 40, dtype=DOUBLE), 0.4 + 1.7 * torch.randn(3, 40, dtype=DOUBLE)
    d = torch.stack([(gradient * shuffled(xhat)).sum() for _ in range(DRAWS)])
    mean, deviation = shuffled_moments(gradient, xhat)
    assert abs(float((d.mean() - mean) / deviation)) < 3 / math.sqrt(DRAWS)
    assert float(d.std() / deviation) == pytest.approx(1, abs=3 / math.sqrt(2 * DRAWS))
    inside = float((d.abs() < 6).double().mean())
    assert standard_errors(inside, float(interval_probability(6, mean, deviation))) < 3
    mean, deviation = shuffled_moments(gradient, normalized(xhat))
    assert float(mean) == pytest.approx(0, abs=1e-12)
    assert float(deviation) == pytest.approx(float(centered_norm(gradient)))


def test_limits() -> None:
    deviations = torch.tensor([0.0, 1.0, math.inf], dtype=DOUBLE)
    assert attraction_probability(0, deviations).tolist() == [0, 0, 0]
    assert attraction_probability(1, deviations).tolist() == pytest.approx([1, 0.6826894921, 0])
    means = torch.tensor([0.0, 2.0, 0.0], dtype=DOUBLE)
    assert interval_probability(1, means, 0 * means).tolist() == [1, 0, 1]
    assert interval_probability(0, means, deviations).tolist() == [0, 0, 0]
    same = interval_probability(1, 0 * means, deviations)
    assert same.tolist() == pytest.approx(attraction_probability(1, deviations).tolist())
