"""Every system's recipes: importing this module fills ``models.training.registry``."""

import models.segmentation.recipes  # noqa: F401
