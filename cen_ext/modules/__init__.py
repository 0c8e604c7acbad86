"""Layers of channel-exchanging networks."""

from cen_ext.modules.base import ExchangeNorm, Mask
from cen_ext.modules.rows import ExchangeGroupNorm, ExchangeLayerNorm
from cen_ext.modules.running import ExchangeBatchNorm2d, ExchangeInstanceNorm2d, RunningExchangeNorm

__all__ = [
    "ExchangeBatchNorm2d",
    "ExchangeGroupNorm",
    "ExchangeInstanceNorm2d",
    "ExchangeLayerNorm",
    "ExchangeNorm",
    "Mask",
    "RunningExchangeNorm",
]
