"""Any network with norms, turned into one of several modalities, which exchanges channels."""

from cen_ext.convert.conversion import conversion_report, layer_for, make_multimodal, replace_norms
from cen_ext.convert.private import PrivateNorm
from cen_ext.convert.report import ConversionReport, NormRow

__all__ = [
    "ConversionReport",
    "NormRow",
    "PrivateNorm",
    "conversion_report",
    "layer_for",
    "make_multimodal",
    "replace_norms",
]
