"""Fusions: how the modalities of one network meet. ``base`` has the contract."""

from models.networks.fusion.ablations import Discard, FixedPortion, GatedSum, Sum
from models.networks.fusion.align import Align
from models.networks.fusion.asymfusion import AsymFusion
from models.networks.fusion.base import (
    DECODER,
    Fusion,
    FusionStage,
    Lateral,
    exchange_points,
    fusions,
    named_exchange_points,
    option,
    register_fusion,
)
from models.networks.fusion.conditional import ConditionalNorm
from models.networks.fusion.exchange import Exchange, LateConcat, NoFusion
from models.networks.fusion.squeeze import SEAdd
from models.networks.fusion.stages import MMF, Average, Concat, SelfAttention
from models.networks.fusion.thresholds import resolve_thresholds

__all__ = [
    "DECODER",
    "MMF",
    "Align",
    "AsymFusion",
    "Average",
    "Concat",
    "ConditionalNorm",
    "Discard",
    "Exchange",
    "FixedPortion",
    "Fusion",
    "FusionStage",
    "GatedSum",
    "LateConcat",
    "Lateral",
    "NoFusion",
    "SEAdd",
    "SelfAttention",
    "Sum",
    "exchange_points",
    "fusions",
    "named_exchange_points",
    "option",
    "register_fusion",
    "resolve_thresholds",
]
