"""Layers of a channel-exchanging network and the penalty that drives their scales to zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cen_ext import reference
from cen_ext.functional import norm_exchange, replaced_channels


class ExchangeBatchNorm2d(nn.Module):
    """Private batch norm of M modalities that exchanges useless channels, with residual and activation fused.

    Takes the stacked ``[M*N, C, *spatial]`` that a convolution shared between the modalities returns.
    State names are those of ``torch.nn.BatchNorm2d`` with a leading modality axis: a ``[C]`` entry of a
    single-modality checkpoint loads into every modality. ``eval()`` uses the running statistics while
    ``weight`` and ``bias`` still train, which is the paper's recipe for segmentation.

    Args:
        num_features: channels C.
        num_modalities: M >= 1.
        threshold: exchange threshold θ (Eq. 6); 0, the default, is private batch norm without exchange.
        region, criterion, activation, negative_slope, eps: as in ``norm_exchange``.
        momentum: weight of a batch in the running statistics; None for their cumulative average.
        track_running_stats: False uses the statistics of x in training and in eval.

    Raises:
        ValueError: num_features or num_modalities below 1; the rest as ``norm_exchange``, at the call.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_modalities: int,
        *,
        threshold: float = 0.0,
        region: str = "own",
        criterion: str = "abs",
        activation: str = "identity",
        negative_slope: float = 0.01,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("num_modalities", num_modalities)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_features = num_features
        self.num_modalities = num_modalities
        self.threshold = threshold
        self.region = region
        self.criterion = criterion
        self.activation = activation
        self.negative_slope = negative_slope
        self.momentum = momentum
        self.eps = eps
        shape = (num_modalities, num_features)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
            self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
            self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))
        else:
            self.running_mean = self.running_var = self.num_batches_tracked = None

    @property
    def exchanges(self) -> bool:
        """Whether this layer can replace channels at all."""
        return self.num_modalities > 1 and self.threshold > 0

    def replaced(self) -> Tensor:
        """``[M, C]`` bool: the channels that the next forward pass replaces."""
        return replaced_channels(self.weight, self.threshold, self.region, self.criterion)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[M*N, C, *spatial]`` to the same; ``residual`` is added before the activation."""
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and self.num_batches_tracked is not None:
            momentum = (self.num_batches_tracked + 1).to(self.weight.dtype).reciprocal()
        y = norm_exchange(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            residual=residual,
            threshold=self.threshold,
            region=self.region,
            criterion=self.criterion,
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )
        if self.training and self.num_batches_tracked is not None and x.numel() > 0:
            self.num_batches_tracked.add_(1)
        return y

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = state_dict.get(prefix + name)
            if value is not None and value.dim() == 1:
                state_dict[prefix + name] = value.repeat(self.num_modalities, 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_modalities={self.num_modalities}, threshold={self.threshold}, "
            f"region={self.region!r}, criterion={self.criterion!r}, activation={self.activation!r}, "
            f"momentum={self.momentum}, eps={self.eps}, track_running_stats={self.running_mean is not None}"
        )


def exchanging_layers(module: nn.Module) -> dict[str, ExchangeBatchNorm2d]:
    """The layers below ``module`` that exchange, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, ExchangeBatchNorm2d) and layer.exchanges
    }


def sparsity_penalty(module: nn.Module) -> Tensor:
    """Sum of |γ| over the own-region channels of every exchanging layer below ``module`` (Eq. 4, without λ).

    Returns:
        A 0-d tensor that gradients flow through; 0 where no layer exchanges.
    """
    # Zero the rest rather than index: the shape must not depend on data, nor the host wait for the device.
    penalties = [
        (layer.weight.abs() * reference.own_region(layer.weight)).sum()
        for layer in exchanging_layers(module).values()
    ]
    return torch.stack(penalties).sum() if penalties else torch.zeros(())
