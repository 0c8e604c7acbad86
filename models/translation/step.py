"""What generator and discriminator are trained by: each network with its loss as one module.

Together they are a step's computation; ``models.translation.updates`` puts them in order.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.networks.systems.output import TranslationOutput
from models.networks.systems.patchgan import PatchGAN, discriminate
from models.networks.systems.unet import UNet
from models.training.precision import at_least_float32, autocast
from models.translation.losses import discriminator_loss, generator_loss
from models.translation.settings import TranslationRecipe


class Generation(nn.Module):
    """The generator's pass: pictures ``[M*N, C, H, W]`` to a ``TranslationOutput`` in float32.

    Args:
        generator: runs in the precision of ``run.precision``.
        recipe: the settings.
        device: the network's.
    """

    def __init__(self, generator: UNet, recipe: TranslationRecipe, device: torch.device) -> None:
        super().__init__()
        self.generator = generator
        self.precision = recipe.run.precision
        self.device = device

    def forward(self, images: Tensor) -> TranslationOutput:
        with autocast(self.precision, self.device):
            output: TranslationOutput = self.generator(images)
        return at_least_float32(output)


class DiscriminatorObjective(nn.Module):
    """The discriminator's loss on real and on generated pictures.

    Args:
        discriminator: runs in the precision of ``run.precision``; the loss is float32.
        recipe, device: as in ``Generation``.
    """

    def __init__(self, discriminator: PatchGAN, recipe: TranslationRecipe, device: torch.device) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.recipe = recipe
        self.device = device

    def forward(self, images: Tensor, target: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """What ``discriminator_loss`` returns.

        Args:
            images, target: ``[M*N, C, H, W]`` and ``[N, C', H, W]``.
            branches: ``[M, N, C', H, W]`` the generator's, detached.
        """
        with autocast(self.recipe.run.precision, self.device):
            real, fake = discriminate(self.discriminator, images, target, branches)
        return discriminator_loss(real, fake, adversarial=self.recipe.loss.gan)


class GeneratorObjective(nn.Module):
    """The generator's loss on what it made; the discriminator judges, and should be ``frozen`` meanwhile.

    Args:
        generator: whose scales are penalised; it does not run here.
        discriminator, recipe, device: as in ``DiscriminatorObjective``.
    """

    def __init__(
        self, generator: UNet, discriminator: PatchGAN, recipe: TranslationRecipe, device: torch.device
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.recipe = recipe
        self.device = device

    def forward(
        self, images: Tensor, target: Tensor, branches: Tensor, ensemble: Tensor, alpha: Tensor
    ) -> tuple[Tensor, ...]:
        """What ``generator_loss`` returns; the arguments after ``target`` are ``Generation``'s output."""
        settings = self.recipe.loss
        with autocast(self.recipe.run.precision, self.device):
            (decisions,) = discriminate(self.discriminator, images, branches)
        return generator_loss(
            TranslationOutput(branches, ensemble, alpha),
            decisions,
            target,
            self.generator.fusion.penalty_on_scales(self.generator),
            l1=settings.l1,
            sparsity=settings.sparsity,
            per_output=settings.per_output,
            adversarial=settings.gan,
        )
