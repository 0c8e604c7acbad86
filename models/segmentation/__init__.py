"""Segmentation networks."""

from models.segmentation.network import SegmentationNetwork
from models.segmentation.output import AuxiliaryOutput, SegmentationOutput
from models.segmentation.pspnet import PSPNet, pspnet
from models.segmentation.refinenet import RefineNet, refinenet

__all__ = [
    "AuxiliaryOutput",
    "PSPNet",
    "RefineNet",
    "SegmentationNetwork",
    "SegmentationOutput",
    "pspnet",
    "refinenet",
]
