"""Feature maps of the channels that one modality alone uses, as ``models.analysis`` draws them."""

from __future__ import annotations

import io
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from models.report.blocks import Picture
from models.report.images import uri
from models.segmentation.build import open_validation
from models.segmentation.load import TrainedNetwork
from models.training.errors import UsageError

_ANALYSIS = "models.analysis.features"


def feature_picture(trained: Any) -> Picture | None:
    """The figure of ``cen analyze --features``; None of networks that have none, or without that module."""
    if not isinstance(trained, TrainedNetwork) or find_spec("models.analysis") is None:
        return None
    figure_of = import_module(_ANALYSIS).feature_figure
    try:
        figure, _ = figure_of(trained, open_validation(trained.recipe))
    except UsageError:  # nothing is exchanged, or not by a threshold
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png")
    alt = "Feature maps of the channels that one modality alone uses, both use, or none"
    return Picture(uri("png", file.getvalue()), "", alt)
