"""What segmentation networks have in common, and networks of an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cen_ext.tables import PerModality
from models.networks.backend import runs_on_backend
from models.networks.branches import split_branches
from models.networks.encoders.base import Encoder
from models.networks.fusion.base import DECODER, Fusion
from models.networks.outputs import AuxiliaryOutput, SegmentationOutput, with_ensemble
from models.networks.private import make_convolutions_private


class SegmentationNetwork(PerModality, nn.Module):
    """What training, evaluation and deployment need of a network; the base of all of them.

    Attributes:
        encoder: what ``model.weights`` fills and ``encoder_lr`` trains.
        num_branches: B of its output.
        alpha: ``[B]`` the ensemble's weights before the softmax; None where something else joins branches.
    """

    encoder: Any
    num_branches: int
    alpha: nn.Parameter | None

    @property
    def num_modalities(self) -> int:
        """M, of the input."""
        raise NotImplementedError

    @property
    def fusion(self) -> Fusion:
        """How the modalities meet."""
        raise NotImplementedError

    @property
    def num_sides(self) -> int:
        """Logits beside those of the output, that have losses of their own in training."""
        raise NotImplementedError

    def branch_weights(self) -> list[float]:
        """The ensemble's weights, of sum 1; none where something else joins branches."""
        return [] if self.alpha is None else self.of_present(self.alpha).softmax(0).tolist()

    def forward(self, x: Tensor | Sequence[Tensor]) -> SegmentationOutput | AuxiliaryOutput:
        """Compute logits, coarser than the image; in training with those of side outputs.

        Args:
            x: ``[M*N, 3, H, W]`` stacked modality-major, or a sequence of M tensors ``[N, 3, H, W]``; of the
                present modalities alone within ``cen_ext.present``.

        Raises:
            ValueError: x does not hold M modalities of the network's input channels.
        """
        raise NotImplementedError


class EncoderDecoder(SegmentationNetwork):
    """Base of networks like ``RefineNet`` and ``PSPNet``, whose builders describe the arguments.

    In ``cen_ext.present`` it takes and returns the present modalities alone, unless the fusion joins all.

    Args:
        encoder: its features, finest first, go to decoder and auxiliary head; its fusion is the network's.
        decoder: features to logits ``[B*N, K, h, w]``.
        num_classes: K.
        auxiliary: as decoder; in training only.

    Attributes:
        num_branches: B, as many as modalities, or 1 where the fusion leaves one stream.
        alpha: ``[B]`` the ensemble's weights before the softmax; None where the fusion has a head.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        num_classes: int,
        *,
        auxiliary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.auxiliary = auxiliary
        self.num_branches = self.fusion.branches(self.num_modalities)
        if self.fusion.private_convolutions(DECODER):
            for part in (decoder, auxiliary):
                if part is not None:
                    make_convolutions_private(part, self.num_branches)
        self.head = self.fusion.head(self.num_branches, num_classes)
        self.alpha = nn.Parameter(torch.zeros(self.num_branches)) if self.head is None else None

    @property
    def num_modalities(self) -> int:
        modalities: int = self.encoder.num_modalities
        return modalities

    @property
    def fusion(self) -> Fusion:
        fusion: Fusion = self.encoder.fusion
        return fusion

    @property
    def num_sides(self) -> int:
        return int(self.auxiliary is not None)

    def decode(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The encoder's features to logits ``[B*N, K, h, w]``, and in training those of side outputs."""
        logits = self.decoder(features)
        if self.auxiliary is None or not self.training:
            return logits, []
        return logits, [self.auxiliary(features)]

    @runs_on_backend
    def forward(self, x: Tensor | Sequence[Tensor]) -> SegmentationOutput | AuxiliaryOutput:
        logits, sides = self.decode(self.encoder(x))
        if self.head is None:
            assert self.alpha is not None  # it is there if and only if no head is
            output = with_ensemble(logits, self.of_present(self.alpha))
        else:
            branches = split_branches(logits, self.num_branches)
            output = SegmentationOutput(branches, self.head(branches), None)
        if not sides:
            return output
        return AuxiliaryOutput(*output, tuple(split_branches(side, len(output.branches)) for side in sides))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        rename_old_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def rename_old_keys(state_dict: dict[str, Tensor], prefix: str = "") -> None:
    """Rename in place the entries that older networks had other names of.

    ``concat`` is now ``head``, and the ``mix`` of a fixed portion is the norm's ``mask``.
    """
    for key in [key for key in state_dict if key.startswith(f"{prefix}concat.")]:
        state_dict[f"{prefix}head.{key.removeprefix(f'{prefix}concat.')}"] = state_dict.pop(key)
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(".mix.scores")]:
        state_dict[f"{key.removesuffix('.mix.scores')}.mask.scores"] = state_dict.pop(key)
