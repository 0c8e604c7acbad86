"""What the segmentation networks have in common: encoder, decoder, and what joins the branches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.networks.branches import split_branches
from models.networks.encoders import ExchangeResNet, Variant, make_convolutions_private
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput, with_ensemble


class ConcatFusion(nn.Module):
    """Section 4.1, ablation 4: "replace the ensemble of expert with a concat-fusion block".

    A 1x1 convolution ``M*K -> K`` of the branches' concatenated logits. The branches are detached, as in the
    ensemble: the fused output's loss trains the block alone. It starts where the ensemble starts, as the
    branches' mean.
    """

    def __init__(self, num_modalities: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_modalities * num_classes, num_classes, 1)
        mean = torch.eye(num_classes).repeat(1, num_modalities) / num_modalities
        self.conv.weight = nn.Parameter(mean[:, :, None, None])
        self.conv.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, branches: Tensor) -> Tensor:
        """``[M, N, K, h, w]`` to ``[N, K, h, w]``."""
        return self.conv(torch.cat(branches.detach().unbind(), 1))


class SegmentationNetwork(nn.Module):
    """Base of ``RefineNet`` and ``PSPNet``, whose builders describe the arguments.

    Args:
        encoder: its features, finest first, go to decoder and auxiliary head.
        decoder: features to logits ``[M*N, K, h, w]``.
        num_classes: K.
        auxiliary: as decoder; in training only.
        variant: its convolutions and fusion; the rest is the encoder's.

    Attributes:
        alpha: ``[M]`` the ensemble's weights before the softmax; None with ``fusion="concat"``.
    """

    def __init__(
        self,
        encoder: ExchangeResNet,
        decoder: nn.Module,
        num_classes: int,
        *,
        auxiliary: nn.Module | None = None,
        variant: Variant | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.auxiliary = auxiliary
        self.variant = variant or Variant()
        if self.variant.convolutions == "private":
            for part in (encoder, decoder, auxiliary):
                if part is not None:
                    make_convolutions_private(part, self.num_modalities)
        if self.variant.fusion == "concat":
            self.concat = ConcatFusion(self.num_modalities, num_classes)
            self.alpha = None
        else:
            self.alpha = nn.Parameter(torch.zeros(self.num_modalities))

    @property
    def num_modalities(self) -> int:
        return self.encoder.num_modalities

    def branch_weights(self) -> list[float]:
        """The ensemble's weights, of sum 1; none with ``fusion="concat"``."""
        return [] if self.alpha is None else self.alpha.softmax(0).tolist()

    def forward(self, x: Tensor | Sequence[Tensor]) -> SegmentationOutput | AuxiliaryOutput:
        """Logits of the decoder's size; with those of the auxiliary head in training.

        Args:
            x: ``[M*N, 3, H, W]`` stacked modality-major, or a sequence of M tensors ``[N, 3, H, W]``.

        Raises:
            ValueError: x does not hold M modalities of the encoder's input channels.
        """
        features = self.encoder(x)
        logits = self.decoder(features)
        if self.alpha is not None:
            output = with_ensemble(logits, self.alpha)
        else:
            branches = split_branches(logits, self.num_modalities)
            output = SegmentationOutput(branches, self.concat(branches), None)
        if self.auxiliary is None or not self.training:
            return output
        return AuxiliaryOutput(*output, split_branches(self.auxiliary(features), self.num_modalities))
