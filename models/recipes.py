"""Every system's recipes: importing this module fills ``models.training.registry``."""

import models.segmentation.recipes
import models.segmentation.recipes_systems
import models.translation.recipes  # noqa: F401
