"""The former location of ``cen_ext.ops.norm_exchange.reference``, kept for its users."""

from cen_ext.ops.norm_exchange.reference import *  # noqa: F403
from cen_ext.ops.norm_exchange.reference import norm_exchange_reference as norm_exchange  # noqa: F401
