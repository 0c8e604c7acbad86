"""The public namespace of fusions, those of ``models.networks.fusion``."""

from models.networks.fusion import *  # noqa: F403
from models.networks.fusion import __all__ as __all__
