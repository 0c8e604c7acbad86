"""Fusions: how the modalities of one network meet. ``base`` has the contract."""

from models.networks.fusion.ablations import Discard, FixedPortion, GatedSum, Sum
from models.networks.fusion.base import (
    DECODER,
    Fusion,
    FusionStage,
    exchange_points,
    fusions,
    option,
    register_fusion,
)
from models.networks.fusion.exchange import Exchange, LateConcat, NoFusion

__all__ = [
    "DECODER",
    "Discard",
    "Exchange",
    "FixedPortion",
    "Fusion",
    "FusionStage",
    "GatedSum",
    "LateConcat",
    "NoFusion",
    "Sum",
    "exchange_points",
    "fusions",
    "option",
    "register_fusion",
]
