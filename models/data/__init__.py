"""Image files to batches: layouts, augmentation, loaders, and procedural data sets."""

from models.data.classes import CITYSCAPES, MERGES, NYU13, NYU40, SUN37, palette
from models.data.dataset import Sample, SegmentationSet
from models.data.domains import DERIVED, prepare_domains, prepare_synthetic_domains
from models.data.images import (
    IMAGE_SUFFIXES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    read_depth,
    read_labels,
    read_rgb,
)
from models.data.inputs import (
    InputSpec,
    differing_inputs,
    input_from_plain,
    input_specs,
    layout_from_plain,
    to_plain,
)
from models.data.layout_file import find_layout
from models.data.layouts import LAYOUTS, Layout
from models.data.loading import Batch, Loader, collate, eval_loader, train_loader
from models.data.modalities import MODALITIES, Reader, configured
from models.data.nyudv2 import prepare_nyudv2
from models.data.pairs import LayoutDomain
from models.data.scenes import CLASSES as SYNTHETIC_CLASSES
from models.data.sunrgbd import prepare_sunrgbd
from models.data.synthetic import prepare_synthetic
from models.data.taskonomy import DOMAINS, Domain
from models.data.transforms import TrainTransform, broaden
from models.data.translation import (
    AnyDomain,
    Jitter,
    Square,
    TranslationBatch,
    TranslationSample,
    TranslationSet,
    Whole,
    collate_translation,
)

__all__ = [
    "CITYSCAPES",
    "DERIVED",
    "DOMAINS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IMAGE_SUFFIXES",
    "LAYOUTS",
    "MERGES",
    "MODALITIES",
    "NYU13",
    "NYU40",
    "SUN37",
    "SYNTHETIC_CLASSES",
    "AnyDomain",
    "Batch",
    "DataError",
    "Domain",
    "InputSpec",
    "Jitter",
    "Layout",
    "LayoutDomain",
    "Loader",
    "Reader",
    "Sample",
    "SegmentationSet",
    "Square",
    "TrainTransform",
    "TranslationBatch",
    "TranslationSample",
    "TranslationSet",
    "Whole",
    "broaden",
    "collate",
    "collate_translation",
    "configured",
    "differing_inputs",
    "eval_loader",
    "find_layout",
    "input_from_plain",
    "input_specs",
    "layout_from_plain",
    "palette",
    "prepare_domains",
    "prepare_nyudv2",
    "prepare_sunrgbd",
    "prepare_synthetic",
    "prepare_synthetic_domains",
    "read_depth",
    "read_labels",
    "read_rgb",
    "to_plain",
    "train_loader",
]
