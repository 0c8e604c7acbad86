"""Feature maps of the channels that one modality alone uses, as ``models.analysis`` draws them."""

from __future__ import annotations

import io
from typing import Any

from models.analysis.features import feature_figure
from models.data import DataError
from models.report.blocks import Picture
from models.report.images import uri
from models.segmentation.build import open_validation
from models.segmentation.load import TrainedNetwork
from models.training.errors import UsageError


def feature_picture(trained: Any) -> Picture | None:
    """The figure of ``cen analyze --features``; None of networks that have none."""
    if not isinstance(trained, TrainedNetwork):
        return None
    try:
        figure, _ = feature_figure(trained, open_validation(trained.recipe))
    except (UsageError, DataError):
        # Nothing is exchanged, or not by a threshold; or no scene has all modalities.
        return None
    file = io.BytesIO()
    figure.savefig(file, format="png")
    alt = "Feature maps of the channels that one modality alone uses, both use, or none"
    return Picture(uri("png", file.getvalue()), "", alt)
