"""The exchanging layers of a network: their thresholds for one request, and what they exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cen_ext.modules import ExchangeNorm


class ExchangingLayers:
    """The layers of a network that exchange, as it was trained.

    Attributes:
        layers: all of them, by name.
        trained: the mean of their thresholds; None where none has a threshold that decides.
    """

    def __init__(self, net: nn.Module) -> None:
        self.layers = {
            name: layer
            for name, layer in net.named_modules()
            if isinstance(layer, ExchangeNorm) and layer.exchanges
        }
        self._thresholds = {
            name: layer.threshold
            for name, layer in self.layers.items()
            if layer.mask is None and layer.replaced_mask is None
        }
        values = list(self._thresholds.values())
        self.trained: float | None = None
        if values:
            self.trained = values[0] if len(set(values)) == 1 else sum(values) / len(values)

    def why_fixed(self) -> str | None:
        """A reason why there is no threshold to move; None if there is."""
        if self.trained is not None:
            return None
        if self.layers:
            return "the layers of this network exchange by a mask, not by a threshold"
        return "no layer of this network exchanges channels by a threshold"

    def largest(self) -> float | None:
        """The θ from which on every channel that may be replaced is; None where there is none."""
        if self.trained is None:
            return None
        scales = {name: float(self.layers[name].weight.detach().abs().max()) for name in self._thresholds}
        return max(scales[name] * self.trained / value for name, value in self._thresholds.items())

    @contextmanager
    def at(self, theta: float | None) -> Iterator[None]:
        """Context in which the thresholds are scaled so that ``theta`` takes the place of ``trained``.

        Args:
            theta: at least 0; None leaves them as they are.

        Raises:
            ValueError: there is no threshold to move.
        """
        if theta is not None and self.trained is None:
            raise ValueError(f"theta must not be given: {self.why_fixed()}")
        try:
            for name, value in self._thresholds.items():
                if theta is not None and self.trained is not None:
                    # Equal thresholds become theta itself, without rounding.
                    scaled = theta if value == self.trained else value * (theta / self.trained)
                    self.layers[name].threshold = scaled
            yield
        finally:
            for name, value in self._thresholds.items():
                self.layers[name].threshold = value

    def shares(self) -> list[dict[str, Any]]:
        """Each layer's ``name``, ``channels``, ``threshold`` and, by modality, ``shares`` replaced now."""
        return [
            {
                "name": name,
                "channels": layer.table_shape()[1],
                "threshold": layer.threshold if name in self._thresholds else None,
                "shares": layer.replaced().float().mean(1).tolist(),
            }
            for name, layer in self.layers.items()
        ]
