"""The options of a call of the operator, that is, its arguments other than tensors."""

from __future__ import annotations

from typing import NamedTuple

# Entries of a route that name no modality: the channel stays, or the mean of the others replaces it.
OWN, MEAN = -2, -1


class Options(NamedTuple):
    """Options of one call, in the argument order of the ops; ``norm_exchange`` documents each field."""

    threshold: float = 0.0
    region: str = "own"
    criterion: str = "abs"
    norm: str = "batch"
    eps: float = 1e-5
    activation: str = "identity"
    negative_slope: float = 0.01
    order: str = "modality"
    num_groups: int = 1  # of norm="group"


# Norms whose statistics join several channels, so that every result depends on all of them. They have no
# running statistics.
ACROSS_CHANNELS = ("layer", "group")
NORMS = ("batch", "instance", *ACROSS_CHANNELS, "none")
