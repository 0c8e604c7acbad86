"""Networks that exchange channels between modalities, their data and their training."""

from models import fusion
from models.networks.encoders import encoders, register_encoder
from models.networks.fusion import fusions, register_fusion
from models.networks.released import load_released
from models.networks.systems import register_system
from models.segmentation import (
    DeepLabV3Plus,
    ESANet,
    LightRefineNet,
    PSPNet,
    RefineNet,
    SegFormer,
    SegmentationOutput,
    deeplabv3plus,
    esanet,
    light_refinenet,
    pspnet,
    refinenet,
    segformer,
)
from models.trained import load
from models.training.registry import register_recipe
from models.translation import PatchGAN, TranslationOutput, UNet, patchgan, unet

__all__ = [
    "DeepLabV3Plus",
    "ESANet",
    "LightRefineNet",
    "PSPNet",
    "PatchGAN",
    "RefineNet",
    "SegFormer",
    "SegmentationOutput",
    "TranslationOutput",
    "UNet",
    "deeplabv3plus",
    "encoders",
    "esanet",
    "fusion",
    "fusions",
    "light_refinenet",
    "load",
    "load_released",
    "patchgan",
    "pspnet",
    "refinenet",
    "register_encoder",
    "register_fusion",
    "register_recipe",
    "register_system",
    "segformer",
    "unet",
]
