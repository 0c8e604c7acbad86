"""Channel exchanging for multimodal networks: normalize, check the threshold and exchange in one operator."""

import cen_ext.ops.norm_exchange.backends  # noqa: F401  (registers them)
from cen_ext import masks
from cen_ext.convert.conversion import conversion_report, make_multimodal
from cen_ext.convert.private import PrivateNorm
from cen_ext.convert.report import ConversionReport, NormRow
from cen_ext.functional import norm_exchange, replaced_channels, stack_modalities, unstack_modalities
from cen_ext.modules import (
    ExchangeBatchNorm2d,
    ExchangeGroupNorm,
    ExchangeInstanceNorm2d,
    ExchangeLayerNorm,
)
from cen_ext.network import (
    exchanging_layers,
    present,
    sparsity_penalty,
    synchronise_statistics,
    synchronize_statistics,
)
from cen_ext.ops.conv3x3 import Conv3x3, conv3x3
from cen_ext.ops.dispatch import available_backends, use_backend
from cen_ext.ops.max_pool_same.functional import max_pool_same
from cen_ext.ops.pixel_shift.functional import pixel_shift
from cen_ext.recompute import recompute_outputs
from cen_ext.version import __version__

__all__ = [
    "Conv3x3",
    "ConversionReport",
    "ExchangeBatchNorm2d",
    "ExchangeGroupNorm",
    "ExchangeInstanceNorm2d",
    "ExchangeLayerNorm",
    "NormRow",
    "PrivateNorm",
    "__version__",
    "available_backends",
    "conv3x3",
    "conversion_report",
    "exchanging_layers",
    "make_multimodal",
    "masks",
    "max_pool_same",
    "norm_exchange",
    "pixel_shift",
    "present",
    "recompute_outputs",
    "replaced_channels",
    "sparsity_penalty",
    "stack_modalities",
    "synchronise_statistics",
    "synchronize_statistics",
    "unstack_modalities",
    "use_backend",
]
