"""What a segmentation network returns: every branch's logits and their ensemble."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SegmentationOutput(NamedTuple):
    """Logits of the M branches and of their ensemble.

    Attributes:
        branches: ``[M, N, K, h, w]`` logits of every modality's branch.
        ensemble: ``[N, K, h, w]`` their sum weighted by ``alpha``. The branches are detached in it: its loss
            trains alpha alone (Wang et al. 2020, Eq. 4).
        alpha: ``[M]`` the weights, positive and of sum 1.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor


def with_ensemble(
    logits: Tensor,  # [M*N, K, h, w]
    alpha: Tensor,  # [M], before the softmax
) -> SegmentationOutput:
    """Split the stacked logits into branches and add the ensemble of the detached branches."""
    num_modalities = alpha.shape[0]
    branches = logits.unflatten(0, (num_modalities, logits.shape[0] // num_modalities))
    weights = alpha.softmax(0)
    ensemble = (weights[:, None, None, None, None] * branches.detach()).sum(0)
    return SegmentationOutput(branches, ensemble, weights)
