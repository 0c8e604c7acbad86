"""Configs under which ``bench.training`` runs a network."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Network, ours or the baseline, and the precision, layout and compiler that it runs with."""

    ours: bool
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    cuda_graphs: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """Memory format of the images and of the convolutions' weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


CONTIGUOUS, BASELINE = "straightforward, contiguous", "straightforward"  # what the others are compared with
CONFIGS = {
    CONTIGUOUS: Config(False, channels_last=False),
    BASELINE: Config(False),
    "straightforward, compile": Config(False, compile=True),
    "straightforward, bf16": Config(False, "bf16"),
    "straightforward, bf16, compile": Config(False, "bf16", compile=True),
    "ours, contiguous": Config(True, channels_last=False),
    "ours": Config(True),
    "ours, compile": Config(True, compile=True),
    "ours, bf16": Config(True, "bf16"),
    "ours, bf16, compile": Config(True, "bf16", compile=True),
    "ours, bf16, CUDA graphs": Config(True, "bf16", cuda_graphs=True),
}
