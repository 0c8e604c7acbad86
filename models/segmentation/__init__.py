"""Segmentation networks."""

from models.networks.decoders.pspnet import PSPNet, pspnet
from models.networks.decoders.refinenet import RefineNet, refinenet
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput
from models.networks.segmentor import SegmentationNetwork

__all__ = [
    "AuxiliaryOutput",
    "PSPNet",
    "RefineNet",
    "SegmentationNetwork",
    "SegmentationOutput",
    "pspnet",
    "refinenet",
]
