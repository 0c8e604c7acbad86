"""Thresholds that follow from a layer's scales: a factor times their median, as ``"0.05*median"``."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

_FORM = re.compile(r"([0-9.eE+-]+)\s*\*\s*median")


def parse_median(threshold: str) -> float:
    """The factor of a threshold ``"<factor>*median"``.

    Raises:
        ValueError: another text, or a factor that is not above 0; the message begins with ``threshold``.
    """
    match = _FORM.fullmatch(threshold.strip())
    try:
        factor = math.nan if match is None else float(match[1])
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(
            "threshold must be a number, or a factor above 0 of the median of each layer's |scales|, written "
            f"as 0.05*median, got {threshold!r}"
        )
    return factor


def median_threshold(factor: float, scales: Tensor) -> float:
    """``factor`` times the median of ``|scales|``, over all M*C of a layer, computed in float64.

    Raises:
        ValueError: there are no values (meta device), or the median is 0 or no number, so that no scale could
            ever be below; the message begins with what is to be said of the layer.
    """
    if scales.is_meta:
        raise ValueError("is on the meta device, where scales have no median")
    median = float(torch.quantile(scales.detach().abs().double().flatten(), 0.5))
    if not 0 < median < math.inf:
        raise ValueError(f"has scales whose median is {median:g}, of which no factor makes a threshold")
    return factor * median
