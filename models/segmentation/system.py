"""The commands' work for segmentation recipes: a ``models.training.registry.System``."""

from models.segmentation.build import build_network as network
from models.segmentation.build import output_names
from models.segmentation.deployment import answering, description, scenes
from models.segmentation.evaluate import evaluate_checkpoint as evaluate
from models.segmentation.importing import import_released
from models.segmentation.live import predict_cameras
from models.segmentation.load import TrainedNetwork, load
from models.segmentation.overview import show_data
from models.segmentation.predict import predict_files as predict
from models.segmentation.predict import watch_folder as watch
from models.segmentation.robustness import evaluate_corrupted
from models.segmentation.task import SegmentationTask

task = SegmentationTask
answer = TrainedNetwork.label
per_cent = True

__all__ = [
    "answer",
    "answering",
    "description",
    "evaluate",
    "evaluate_corrupted",
    "import_released",
    "load",
    "network",
    "output_names",
    "per_cent",
    "predict",
    "predict_cameras",
    "scenes",
    "show_data",
    "task",
    "watch",
]
