"""The commands' work for segmentation recipes: a ``models.training.registry.System``."""

from models.segmentation.build import build_network as network
from models.segmentation.evaluate import evaluate_checkpoint as evaluate
from models.segmentation.importing import import_released
from models.segmentation.load import load
from models.segmentation.overview import show_data
from models.segmentation.predict import predict_files as predict
from models.segmentation.task import SegmentationTask

task = SegmentationTask

__all__ = ["evaluate", "import_released", "load", "network", "predict", "show_data", "task"]
