"""Image translation: several image domains in, one out."""

from models.translation.losses import discriminator_loss, generator_loss
from models.translation.output import TranslationOutput
from models.translation.patchgan import PatchGAN, judge, patchgan
from models.translation.unet import UNet, unet

__all__ = [
    "PatchGAN",
    "TranslationOutput",
    "UNet",
    "discriminator_loss",
    "generator_loss",
    "judge",
    "patchgan",
    "unet",
]
