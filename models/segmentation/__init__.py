"""Segmentation networks."""

from models.segmentation.output import SegmentationOutput
from models.segmentation.refinenet import RefineNet, refinenet
from models.segmentation.released import load_released

__all__ = ["RefineNet", "SegmentationOutput", "load_released", "refinenet"]
