"""Norms of each row by itself, which behave the same in training and in eval: layer norm and group norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cen_ext.functional import norm_exchange
from cen_ext.modules.base import ExchangeNorm, Mask, check_count
from cen_ext.ops.norm_exchange.checks import check_channel_dim


class ExchangeLayerNorm(ExchangeNorm, nn.LayerNorm):
    """Layer norm of M modalities with channel exchange, residual and activation fused.

    ``torch.nn.LayerNorm`` over the C channels of each position, per modality, then the exchange. Takes
    ``[M*N, ..., C]``, or with ``channel_dim=1`` what convolutions return, ``[M*N, C, *spatial]``. In order
    "modality", windows or patches that a network folds into the batch axis behind its rows are rows, too.

    A channel of small scale is silent, yet, unlike in batch norm, its input still has a part in the
    statistics of its position and so in the other channels.

    Args:
        normalized_shape: C, or ``[C]``.
        num_modalities: M >= 1.
        elementwise_affine: False for private norms without scale and shift, which exchange by a mask alone.
        channel_dim: of the channels, -1 or 1.
        bias, eps: as in torch; the other arguments as in ``ExchangeNorm``.

    Raises:
        TypeError, ValueError: several dimensions; the rest as ``ExchangeNorm``.
    """

    norm = "layer"
    affine_name = "elementwise_affine"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        num_modalities: int,
        *,
        threshold: float = 0.0,
        region: str = "own",
        criterion: str = "abs",
        replaced: Tensor | None = None,
        mask: Mask | None = None,
        lender: Tensor | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        channel_dim: int = -1,
        order: str = "modality",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        if len(shape) != 1:
            raise ValueError(
                f"normalized_shape must be the channels alone, got {shape}: with statistics over space, too, "
                "no position has channels to exchange. ExchangeGroupNorm(1, C, M) has such statistics and a "
                "scale per channel; make_multimodal makes private norms of several dimensions, which do not "
                "exchange"
            )
        check_count("normalized_shape", shape[0])
        check_channel_dim(channel_dim)
        super().__init__(
            shape,
            num_modalities=num_modalities,
            threshold=threshold,
            region=region,
            criterion=criterion,
            replaced=replaced,
            mask=mask,
            lender=lender,
            activation=activation,
            negative_slope=negative_slope,
            eps=eps,
            affine=elementwise_affine,
            bias=bias,
            order=order,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.channel_dim = channel_dim

    def table_shape(self) -> tuple[int, int]:
        return self.num_modalities, self.normalized_shape[0]

    def normalize(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        options = self.call_options()
        return norm_exchange(x, weight, bias, residual=residual, channel_dim=self.channel_dim, **options)

    def own_repr(self) -> tuple[str, str]:
        return f"{self.normalized_shape}", f"eps={self.eps}, channel_dim={self.channel_dim}"


class ExchangeGroupNorm(ExchangeNorm, nn.GroupNorm):
    """Group norm of M modalities with channel exchange, residual and activation fused.

    ``torch.nn.GroupNorm`` per modality, then the exchange. Takes ``[M*N, C, *spatial]``.

    Args:
        num_groups: a divisor of C.
        num_channels: C.
        num_modalities: M >= 1.
        affine, bias, eps: as in torch; the other arguments, and errors, as in ``ExchangeNorm``.
    """

    norm = "group"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        num_modalities: int,
        *,
        threshold: float = 0.0,
        region: str = "own",
        criterion: str = "abs",
        replaced: Tensor | None = None,
        mask: Mask | None = None,
        lender: Tensor | None = None,
        activation: str = "identity",
        negative_slope: float = 0.01,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
        order: str = "modality",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_groups", num_groups)
        check_count("num_channels", num_channels)
        super().__init__(
            num_groups,
            num_channels,
            num_modalities=num_modalities,
            threshold=threshold,
            region=region,
            criterion=criterion,
            replaced=replaced,
            mask=mask,
            lender=lender,
            activation=activation,
            negative_slope=negative_slope,
            eps=eps,
            affine=affine,
            bias=bias,
            order=order,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def table_shape(self) -> tuple[int, int]:
        return self.num_modalities, self.num_channels

    def normalize(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        options = self.call_options()
        return norm_exchange(x, weight, bias, residual=residual, num_groups=self.num_groups, **options)

    def own_repr(self) -> tuple[str, str]:
        return f"{self.num_groups}, {self.num_channels}", f"eps={self.eps}"
