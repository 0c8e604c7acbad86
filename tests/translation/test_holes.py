"""Pixels of the target that were not measured: no loss, no gradient and no score comes of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.networks.systems.output import TranslationOutput
from models.training import config, registry
from models.training.rng import seed_all
from models.translation.build import build_discriminator, build_generator
from models.translation.holes import filled, measured
from models.translation.losses import generator_loss
from models.translation.metrics import TranslationMetrics, structural_similarity
from models.translation.step import DiscriminatorObjective, GeneratorObjective
from tests.helpers.translation_runs import TINY

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-0.9, 0.9, shape))


def with_holes(target: Tensor, hole: float) -> tuple[Tensor, Tensor]:
    """The target without some of its pixels, and the mask of the others."""
    known = torch.ones_like(target[:, :1], dtype=torch.bool)
    known[0, :, 5:20, 3:30] = False
    known[:, :, :, 8] = False
    return torch.where(known, target, hole), known


@pytest.mark.parametrize(("channels", "hole"), [(1, -1.0), (3, 0.0)])
def test_measured(channels: int, hole: float) -> None:
    target, known = with_holes(draw(2, channels, 32, 32), hole)
    if channels == 3:
        target[1, 0, 0, 0] = hole  # one channel alone is a value
    assert torch.equal(measured(target, hole), known)
    assert measured(target, None).all()
    images = draw(2, 2, channels, 32, 32, seed=1)
    assert filled(images, target, None) is images
    found = filled(images, target, hole)
    wide = known.expand_as(target)
    assert torch.equal(found[1][wide], images[1][wide])
    assert torch.equal(found[1][~wide], target[~wide])


@pytest.mark.parametrize(("channels", "hole"), [(1, -1.0), (3, 0.0)])
def test_no_loss_and_no_gradient_of_holes(channels: int, hole: float) -> None:
    seed_all(0)
    recipe = config.override(registry.find("synthetic_translation_demo"), TINY)
    generator = build_generator(recipe, channels).double()
    discriminator = build_discriminator(recipe, channels).double()
    target, known = with_holes(draw(2, channels, 32, 32), hole)
    images, branches = draw(4, 3, 32, 32, seed=1), draw(2, 2, channels, 32, 32, seed=2).requires_grad_()
    ensemble = draw(2, channels, 32, 32, seed=3).requires_grad_()
    alpha, zero = torch.full((2,), 0.5, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    device = torch.device("cpu")
    objective = GeneratorObjective(generator, discriminator, recipe, device, hole)
    total, _, l1, _, _ = objective(images, target, branches, ensemble, alpha, zero)
    wide = known.expand_as(target)
    expected = [(each - target).abs()[wide].mean() for each in (*branches, ensemble)]
    assert_close(l1, torch.stack(expected))
    total.backward()
    assert branches.grad is not None
    assert ensemble.grad is not None
    for gradient in (*branches.grad, ensemble.grad):
        assert (gradient[~wide] == 0).all()
        assert (gradient[wide] != 0).any()
    # The discriminator is shown the same in holes, whatever was generated there.
    judge = DiscriminatorObjective(discriminator, recipe, device, hole)
    other = torch.where(known, branches.detach(), 7.0)
    assert torch.equal(judge(images, target, branches.detach())[0], judge(images, target, other)[0])
    without = DiscriminatorObjective(discriminator, recipe, device)
    assert not torch.equal(without(images, target, branches.detach())[0], without(images, target, other)[0])


def test_a_target_without_a_measured_pixel_has_no_distance() -> None:
    target = torch.full((1, 1, 32, 32), -1.0)
    output = TranslationOutput(filled(draw(1, 1, 1, 32, 32).float(), target, -1), target, torch.ones(1))
    share = measured(target, -1).float().mean()
    loss = generator_loss(output, torch.zeros(1, 1, 1, 2, 2), target, torch.zeros(()), None, share)
    assert (loss.l1 == 0).all()
    assert loss.total.isfinite()


def test_scores_of_measured_pixels() -> None:
    target, known = with_holes(draw(3, 1, 40, 48), -1.0)
    output = (target + 0.3 * draw(3, 1, 40, 48, seed=1)).clamp(-0.99, 1)
    empty, anything = torch.full((1, 1, 40, 48), -1.0, dtype=DOUBLE), draw(1, 1, 40, 48, seed=2)
    metrics = TranslationMetrics(("ensemble",), (27000, 31000), hole=-1.0)
    metrics.update([output[:2]], target[:2])
    metrics.update([torch.cat([output[2:], anything])], torch.cat([target[2:], empty]))
    found = metrics.compute()
    rows = []
    for a, b, mask in zip(output.numpy(), target.numpy(), known.numpy(), strict=True):
        error = (a - b)[mask]
        l2 = np.mean(error**2)
        inside = mask[0, 5:-5, 5:-5]
        one = np.where(mask, a, b)[0]
        windows = [
            torch.from_numpy(np.lib.stride_tricks.sliding_window_view(x, (11, 11))[inside] + 1) / 2
            for x in (one, b[0])
        ]
        ssim = float(structural_similarity(*windows).sum())
        rows.append((np.mean(np.abs(error)), l2, 10 * np.log10(4 / l2), ssim / inside.sum()))
    l1, l2, psnr, ssim = np.mean(rows, 0)
    expected = {"l1": l1, "l2": l2, "psnr": psnr, "ssim": ssim}
    expected |= {"mae": 2000 * l1, "mse": 2000**2 * l2, "rmse": 2000 * math.sqrt(l2)}
    assert found == pytest.approx({f"ensemble/{name}": value for name, value in expected.items()}, rel=1e-9)
