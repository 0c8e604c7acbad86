"""The losses of generator and discriminator (Wang et al. 2020, section 4.2; Isola et al. 2017, Eq. 4).

Pure functions of tensors. A step of training, with one pass of the generator:

    output = generator(inputs)
    real, fake = discriminate(discriminator, inputs, target, output.branches.detach())
    discriminator_loss(real, fake).total.backward()                 # and the discriminator's step
    (logits,) = discriminate(discriminator, inputs, output.branches)    # after the discriminator's step
    generator_loss(output, logits, target, sparsity_penalty(generator)).total.backward()

The last line also leaves gradients in the discriminator, at the cost of computing them, unless its parameters
do not require any meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.networks.messages import suggest
from models.networks.systems.output import TranslationOutput


class Adversarial(NamedTuple):
    """An adversarial loss, as functions of the discriminator's logits.

    Attributes:
        real, fake: what the discriminator minimizes on real and on generated images.
        fool: what the generator minimizes on its own.
    """

    real: Callable[[Tensor], Tensor]
    fake: Callable[[Tensor], Tensor]
    fool: Callable[[Tensor], Tensor]


ADVERSARIAL = {
    # Binary cross-entropy with the targets 1, 0 and 1; the paper's.
    "bce": Adversarial(lambda d: -F.logsigmoid(d), lambda d: -F.logsigmoid(-d), lambda d: -F.logsigmoid(d)),
    # Lim and Ye, "Geometric GAN", 2017.
    "hinge": Adversarial(lambda d: F.relu(1 - d), lambda d: F.relu(1 + d), lambda d: -d),
    # Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017.
    "least_squares": Adversarial(lambda d: (d - 1).square(), torch.square, lambda d: (d - 1).square()),
}


class GeneratorLoss(NamedTuple):
    """The generator's loss and what it consists of.

    Attributes:
        total: 0-d, to be minimized.
        adversarial: ``[M]`` of every branch.
        l1: ``[M+1]`` mean absolute difference from the target, without its weight: the branches', then the
            ensemble's.
        penalty: 0-d, that on the scales, with its weights.
        fusion: 0-d, the fusion's own loss with its weight; 0 where it has none.
    """

    total: Tensor
    adversarial: Tensor
    l1: Tensor
    penalty: Tensor
    fusion: Tensor


class DiscriminatorLoss(NamedTuple):
    """The discriminator's loss and what it consists of.

    Attributes:
        total: 0-d, to be minimized.
        real, fake: ``[M]`` of the real and the generated image beside every branch's input.
    """

    total: Tensor
    real: Tensor
    fake: Tensor


def generator_loss(
    output: TranslationOutput,
    logits: Tensor,
    target: Tensor,
    penalty: Tensor,
    fusion: Tensor | None = None,
    share: Tensor | None = None,
    *,
    l1: float = 100.0,
    sparsity: float = 1e-3,
    per_output: bool = False,
    adversarial: str = "bce",
) -> GeneratorLoss:
    """Adversarial loss of the M branches, L1 of branches and ensemble, sparsity, the fusion's; each summed.

    The discriminator does not see the ensemble: its only loss is its L1, which trains alpha alone.

    Args:
        output: the generator's.
        logits: ``[M, N, 1, h, w]`` the discriminator's logits on ``output.branches``.
        target: ``[N, C, H, W]`` the real images.
        penalty: 0-d, ``cen_ext.sparsity_penalty`` of the generator.
        fusion: 0-d, the fusion's own loss with its weight; None for none.
        share: 0-d, the share of the target's pixels that were measured, in all others of which the output is
            the target; L1 is the mean over those. None: all.
        l1: weight of the L1 terms.
        sparsity: λ, the weight of the penalty.
        per_output: add the penalty once per output, M + 1 times, as the released code does; the paper adds it
            once.
        adversarial: ``"bce"``, ``"hinge"`` or ``"least_squares"``.

    Raises:
        ValueError: an unknown adversarial loss; logits or target that do not go with the output.
    """
    branches, ensemble, _ = output
    if target.shape != ensemble.shape:
        raise ValueError(f"target must be {tuple(ensemble.shape)} as the images, got {tuple(target.shape)}")
    _check_logits("logits", logits, tuple(branches.shape[:2]))
    fooled = _mean(find_adversarial(adversarial).fool(_single(logits)))
    target = _single(target)
    distances = torch.cat(
        [_mean((_single(branches) - target).abs()), _mean((_single(ensemble) - target).abs()[None])]
    )
    if share is not None:
        distances = distances / share.clamp(min=torch.finfo(distances.dtype).eps)
    times = len(distances) if per_output else 1
    # Added to a zero on the device: where no scale is penalized, the penalty is one on the CPU.
    zero = distances.new_zeros(())
    penalized = zero + sparsity * times * penalty
    own = zero if fusion is None else fusion
    total = fooled.sum() + l1 * distances.sum() + penalized + own
    return GeneratorLoss(total, fooled, distances, penalized, own)


def discriminator_loss(real: Tensor, fake: Tensor, *, adversarial: str = "bce") -> DiscriminatorLoss:
    """Half the sum of the losses on real and on generated images, summed over the branches.

    Args:
        real, fake: ``[M, N, 1, h, w]`` logits on the target and on the detached branches.
        adversarial: as in ``generator_loss``.

    Raises:
        ValueError: an unknown adversarial loss; logits of different shapes.
    """
    _check_logits("fake", fake, tuple(real.shape[:2]))
    loss = find_adversarial(adversarial)
    on_real, on_fake = _mean(loss.real(_single(real))), _mean(loss.fake(_single(fake)))
    return DiscriminatorLoss(0.5 * (on_real + on_fake).sum(), on_real, on_fake)


def find_adversarial(name: str) -> Adversarial:
    """The adversarial loss of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ADVERSARIAL:
        hint = suggest(str(name), ADVERSARIAL)
        raise ValueError(f"adversarial must be one of {', '.join(ADVERSARIAL)}, got {name!r}{hint}")
    return ADVERSARIAL[name]


def _check_logits(name: str, logits: Tensor, leading: tuple[int, ...]) -> None:
    if logits.dim() != 5 or tuple(logits.shape[:2]) != leading:
        modalities, batch = leading
        raise ValueError(f"{name} must be [{modalities}, {batch}, 1, h, w], got {tuple(logits.shape)}")


def _single(x: Tensor) -> Tensor:
    """x in float32 at least: half types of autocast are too coarse for losses."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(x: Tensor) -> Tensor:
    """The mean over all but the first axis."""
    return x.flatten(1).mean(1)
