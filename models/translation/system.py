"""The commands' work for translation recipes: a ``models.training.registry.System``."""

from models.translation.build import build_generator as network
from models.translation.build import output_names
from models.translation.deployment import answering, description, scenes
from models.translation.evaluate import evaluate_checkpoint as evaluate
from models.translation.evaluate import evaluate_corrupted
from models.translation.importing import import_released
from models.translation.load import TrainedGenerator, load
from models.translation.overview import show_data
from models.translation.predict import predict_cameras
from models.translation.predict import predict_files as predict
from models.translation.predict import watch_folder as watch
from models.translation.task import TranslationTask

task = TranslationTask
answer = TrainedGenerator.translate
per_cent = False

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
