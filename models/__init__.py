"""Networks that exchange channels between modalities, their data and their training."""

from models.networks.encoders import Variant
from models.networks.released import load_released
from models.segmentation import PSPNet, RefineNet, SegmentationOutput, pspnet, refinenet
from models.trained import load
from models.training.registry import register_recipe
from models.translation import PatchGAN, TranslationOutput, UNet, patchgan, unet

__all__ = [
    "PSPNet",
    "PatchGAN",
    "RefineNet",
    "SegmentationOutput",
    "TranslationOutput",
    "UNet",
    "Variant",
    "load",
    "load_released",
    "patchgan",
    "pspnet",
    "refinenet",
    "register_recipe",
    "unet",
]
