"""Segmentation networks."""

from models.networks.decoders.deeplabv3plus import DeepLabV3Plus, deeplabv3plus
from models.networks.decoders.esanet import ESANet, esanet
from models.networks.decoders.light_refinenet import LightRefineNet, light_refinenet
from models.networks.decoders.pspnet import PSPNet, pspnet
from models.networks.decoders.refinenet import RefineNet, refinenet
from models.networks.decoders.segformer import SegFormer, segformer
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.segmentor import SegmentationNetwork

__all__ = [
    "AuxiliaryOutput",
    "DeepLabV3Plus",
    "ESANet",
    "LightRefineNet",
    "PSPNet",
    "RefineNet",
    "SegFormer",
    "SegmentationNetwork",
    "SegmentationOutput",
    "deeplabv3plus",
    "esanet",
    "light_refinenet",
    "pspnet",
    "refinenet",
    "segformer",
]
