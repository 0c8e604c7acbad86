"""Image files to batches: layouts, augmentation, loaders, and a procedural data set."""

from models.data.classes import NYU40, palette
from models.data.images import IMAGENET_MEAN, IMAGENET_STD, DataError, read_depth, read_labels, read_rgb
from models.data.layouts import MODALITIES, NyuCen, Sample
from models.data.loading import Batch, Loader, collate, eval_loader, train_loader
from models.data.scenes import CLASSES as SYNTHETIC_CLASSES
from models.data.synthetic import prepare_synthetic
from models.data.transforms import TrainTransform, broaden

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODALITIES",
    "NYU40",
    "SYNTHETIC_CLASSES",
    "Batch",
    "DataError",
    "Loader",
    "NyuCen",
    "Sample",
    "TrainTransform",
    "broaden",
    "collate",
    "eval_loader",
    "palette",
    "prepare_synthetic",
    "read_depth",
    "read_labels",
    "read_rgb",
    "train_loader",
]
