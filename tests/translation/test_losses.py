"""The losses of generator and discriminator against their formulas, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.networks.branches import weighted_ensemble
from models.translation import TranslationOutput, discriminator_loss, generator_loss
from models.translation.losses import ADVERSARIAL

M, N = 3, 2
PENALTY = torch.tensor(7.0, dtype=torch.float64)


def sigmoid(d: float) -> float:
    return 1 / (1 + math.exp(-d))


# By name: on real images, on generated ones, and what the generator wants of its own.
FORMULAS = {
    "bce": (
        lambda d: -math.log(sigmoid(d)),
        lambda d: -math.log(1 - sigmoid(d)),
        lambda d: -math.log(sigmoid(d)),
    ),
    "hinge": (lambda d: max(0.0, 1 - d), lambda d: max(0.0, 1 + d), lambda d: -d),
    "least_squares": (lambda d: (d - 1) ** 2, lambda d: d**2, lambda d: (d - 1) ** 2),
}


def mean(formula, decisions: Tensor) -> float:
    values = [formula(d) for d in decisions.flatten().tolist()]
    return sum(values) / len(values)


def decisions() -> Tensor:
    return (2 * torch.randn(M, N, 1, 3, 4, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def output() -> TranslationOutput:
    branches = torch.randn(M, N, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    return TranslationOutput(branches, *weighted_ensemble(branches, alpha))


@pytest.fixture
def target() -> Tensor:
    return torch.randn(N, 3, 8, 6, dtype=torch.float64)


def distances(output: TranslationOutput, target: Tensor) -> list[float]:
    pixels = target.numel()
    weights = output.alpha.tolist()
    ensemble = sum(w * branch for w, branch in zip(weights, output.branches, strict=True))
    return [(image - target).abs().sum().item() / pixels for image in (*output.branches, ensemble)]


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("per_output", [False, True])
def test_generator(output: TranslationOutput, target: Tensor, name: str, per_output: bool) -> None:
    logits = decisions()
    fusion = torch.tensor(0.25, dtype=torch.float64)
    loss = generator_loss(
        output,
        logits,
        target,
        PENALTY,
        fusion,
        l1=10.0,
        sparsity=0.5,
        per_output=per_output,
        adversarial=name,
    )
    fooled = [mean(FORMULAS[name][2], logits[m]) for m in range(M)]
    assert loss.adversarial.tolist() == pytest.approx(fooled, rel=1e-12)
    assert loss.l1.tolist() == pytest.approx(distances(output, target), rel=1e-12)
    times = M + 1 if per_output else 1
    assert loss.penalty.item() == pytest.approx(0.5 * times * 7, rel=1e-12)
    assert loss.fusion.item() == 0.25
    expected = sum(fooled) + 10 * sum(distances(output, target)) + 0.5 * times * 7 + 0.25
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)


def test_the_papers_weights_are_the_defaults(output: TranslationOutput, target: Tensor) -> None:
    logits = decisions()
    fooled = sum(mean(FORMULAS["bce"][2], logits[m]) for m in range(M))
    expected = fooled + 100 * sum(distances(output, target)) + 1e-3 * 7
    assert generator_loss(output, logits, target, PENALTY).total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_discriminator(name: str) -> None:
    real, fake = decisions(), decisions()
    loss = discriminator_loss(real, fake, adversarial=name)
    on_real, on_fake, _ = FORMULAS[name]
    assert loss.real.tolist() == pytest.approx([mean(on_real, real[m]) for m in range(M)], rel=1e-12)
    assert loss.fake.tolist() == pytest.approx([mean(on_fake, fake[m]) for m in range(M)], rel=1e-12)
    expected = sum(0.5 * (mean(on_real, real[m]) + mean(on_fake, fake[m])) for m in range(M))
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_is_the_default_of_the_discriminator() -> None:
    real, fake = decisions(), decisions()
    assert torch.equal(
        discriminator_loss(real, fake).total, discriminator_loss(real, fake, adversarial="bce").total
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_the_formulas_slopes(output: TranslationOutput, target: Tensor, name: str) -> None:
    for index, loss_of in enumerate(
        (
            lambda d: discriminator_loss(d, torch.zeros_like(d), adversarial=name).total,
            lambda d: discriminator_loss(torch.zeros_like(d), d, adversarial=name).total,
            lambda d: generator_loss(output, d, target, PENALTY, adversarial=name).total,
        )
    ):
        logits = decisions()
        (gradient,) = torch.autograd.grad(loss_of(logits), logits)
        formula, weight = FORMULAS[name][index], (0.5, 0.5, 1.0)[index] / logits[0].numel()
        slopes = [(formula(d + 1e-6) - formula(d - 1e-6)) / 2e-6 for d in logits.flatten().tolist()]
        assert gradient.flatten().tolist() == pytest.approx([weight * slope for slope in slopes], abs=1e-9)


def test_certain_logits_give_finite_cross_entropies() -> None:
    certain = torch.full((1, 1, 1, 2, 2), 1e4)
    assert discriminator_loss(certain, -certain).total.item() == 0
    assert discriminator_loss(-certain, certain).total.item() == pytest.approx(1e4)


def test_the_ensemble_trains_alpha_alone(target: Tensor) -> None:
    branches = torch.randn(M, N, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    loss = generator_loss(
        TranslationOutput(branches, *weighted_ensemble(branches, alpha)), decisions(), target, PENALTY
    )
    assert torch.autograd.grad(loss.l1[-1], [branches, alpha], retain_graph=True)[0].abs().max() == 0
    to_branches, to_alpha = torch.autograd.grad(loss.total, [branches, alpha])
    torch.testing.assert_close(to_branches, 100 * (branches.detach() - target).sign() / target.numel())
    assert to_alpha.abs().max() > 0


def test_half_precision_is_judged_in_float32(output: TranslationOutput, target: Tensor) -> None:
    half = TranslationOutput(*(part.detach().bfloat16() for part in output))
    logits = decisions().detach().bfloat16()
    found = generator_loss(half, logits, target.bfloat16(), PENALTY.float())
    exact = generator_loss(
        TranslationOutput(*(part.double() for part in half)),
        logits.double(),
        target.bfloat16().double(),
        PENALTY,
    )
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(exact.total.item(), rel=1e-6)


def test_every_loss_has_a_formula_here() -> None:
    assert ADVERSARIAL.keys() == FORMULAS.keys()


def test_bad_arguments_are_refused(output: TranslationOutput, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"adversarial must be one of bce, .*; did you mean 'hinge'"):
        generator_loss(output, decisions(), target, PENALTY, adversarial="Hinge")
    with pytest.raises(ValueError, match=r"target must be \(2, 3, 8, 6\) as the images, got \(2, 1, 8, 6\)"):
        generator_loss(output, decisions(), target[:, :1], PENALTY)
    with pytest.raises(ValueError, match=r"logits must be \[3, 2, 1, h, w\], got \(6, 1, 3, 4\)"):
        generator_loss(output, decisions().flatten(0, 1), target, PENALTY)
    with pytest.raises(ValueError, match=r"fake must be \[3, 2, 1, h, w\], got \(2, 2, 1, 3, 4\)"):
        discriminator_loss(decisions(), decisions()[:2])
