"""What a segmentation network returns: every branch's logits and their ensemble."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from models.networks.branches import split_branches, weighted_ensemble


class SegmentationOutput(NamedTuple):
    """Logits of the M branches and of their ensemble.

    Attributes:
        branches: ``[M, N, K, h, w]`` logits of every modality's branch.
        ensemble: ``[N, K, h, w]`` their sum weighted by ``alpha``. The branches are detached in it: its loss
            trains alpha alone (Wang et al. 2020, Eq. 4). With ``fusion="concat"``, what the block makes of
            them.
        alpha: ``[M]`` the weights, positive and of sum 1; None with ``fusion="concat"``.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor | None

    @property
    def auxiliary(self) -> None:
        """None: what has auxiliary logits is an ``AuxiliaryOutput``."""


class AuxiliaryOutput(NamedTuple):
    """A ``SegmentationOutput`` in training of a network with an auxiliary head.

    Attributes:
        branches, ensemble, alpha: as there.
        auxiliary: ``[M, N, K, h, w]`` the auxiliary head's logits of every branch.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor | None
    auxiliary: Tensor


def with_ensemble(
    logits: Tensor,  # [M*N, K, h, w]
    alpha: Tensor,  # [M], before the softmax
) -> SegmentationOutput:
    """Split the stacked logits into branches and add the ensemble of the detached branches."""
    branches = split_branches(logits, alpha.shape[0])
    ensemble, weights = weighted_ensemble(branches, alpha)
    return SegmentationOutput(branches, ensemble, weights)
