"""Networks that exchange channels between modalities, their data and their training."""

from models.encoders import Variant
from models.segmentation import PSPNet, RefineNet, SegmentationOutput, load_released, pspnet, refinenet

__all__ = ["PSPNet", "RefineNet", "SegmentationOutput", "Variant", "load_released", "pspnet", "refinenet"]
