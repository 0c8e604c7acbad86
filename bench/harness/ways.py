"""The ways in which ``bench.training`` runs a network."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Way(NamedTuple):
    """Whose network, and how it is run."""

    ours: bool
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    cuda_graphs: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """Of the images and of the convolutions' weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


CONTIGUOUS, BASELINE = "straightforward, contiguous", "straightforward"  # what the others are compared with
WAYS = {
    CONTIGUOUS: Way(False, channels_last=False),
    BASELINE: Way(False),
    "straightforward, compile": Way(False, compile=True),
    "straightforward, bf16": Way(False, "bf16"),
    "straightforward, bf16, compile": Way(False, "bf16", compile=True),
    "ours, contiguous": Way(True, channels_last=False),
    "ours": Way(True),
    "ours, compile": Way(True, compile=True),
    "ours, bf16": Way(True, "bf16"),
    "ours, bf16, compile": Way(True, "bf16", compile=True),
    "ours, bf16, CUDA graphs": Way(True, "bf16", cuda_graphs=True),
}
