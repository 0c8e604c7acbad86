"""An aligned Xception of few channels and blocks, for quick tests: ``encoder="small_xception"``."""

from __future__ import annotations

from typing import ClassVar

import models
from models.networks.encoders import AlignedXception


@models.register_encoder
class SmallXception(AlignedXception):
    """Built as the registered ones; two of its entry flow's blocks share a width, as in Xception-71."""

    name: ClassVar[str] = "small_xception"
    entry = ((8, 2), (12, 1), (12, 2), (16, 2))
    middle_blocks = 2
    exit = ((16, 20, 20), (24, 28, 32))
