"""Image translation: several image domains in, one out."""

from models.networks.systems.output import TranslationOutput
from models.networks.systems.patchgan import PatchGAN, discriminate, patchgan
from models.networks.systems.unet import UNet, unet
from models.translation.losses import discriminator_loss, generator_loss

judge = discriminate  # its older name, for a release

__all__ = [
    "PatchGAN",
    "TranslationOutput",
    "UNet",
    "discriminate",
    "discriminator_loss",
    "generator_loss",
    "judge",
    "patchgan",
    "unet",
]
