"""Every system and its recipes: importing this module fills ``models.training.registry``."""

import models.segmentation.recipes
import models.translation.recipes  # noqa: F401
from models.segmentation import system as segmentation
from models.segmentation.settings import SegmentationRecipe
from models.training.registry import SYSTEMS
from models.translation import system as translation
from models.translation.settings import TranslationRecipe

SYSTEMS[SegmentationRecipe] = segmentation
SYSTEMS[TranslationRecipe] = translation
