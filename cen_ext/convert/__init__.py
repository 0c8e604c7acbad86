"""Any network with batch or instance norm, turned into a channel-exchanging one."""

from cen_ext.convert.conversion import make_multimodal, replace_norms

__all__ = ["make_multimodal", "replace_norms"]
