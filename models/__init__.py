"""Networks that exchange channels between modalities, their data and their training."""

from models.segmentation import RefineNet, SegmentationOutput, load_released, refinenet

__all__ = ["RefineNet", "SegmentationOutput", "load_released", "refinenet"]
