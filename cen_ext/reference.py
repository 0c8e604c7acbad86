"""The definition of ``norm_exchange`` under its old name; it lives in ``cen_ext.ops.norm_exchange``."""

from cen_ext.ops.norm_exchange.reference import *  # noqa: F403
from cen_ext.ops.norm_exchange.reference import norm_exchange_reference as norm_exchange  # noqa: F401
