"""The output of a segmentation network: every branch's logits and their ensemble."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from models.networks.branches import split_branches, weighted_ensemble


class SegmentationOutput(NamedTuple):
    """Logits of the B branches and of their ensemble.

    Attributes:
        branches: ``[B, N, K, h, w]`` logits of every branch, one for each modality, or a single one where the
            fusion leaves one stream.
        ensemble: ``[N, K, h, w]`` their sum weighted by ``alpha``. The branches are detached in it: its loss
            trains alpha alone (Wang et al. 2020, Eq. 4). Where the fusion has a head, the head's output.
        alpha: ``[B]`` the weights, positive and of sum 1; None where the fusion has a head.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor | None

    @property
    def auxiliary(self) -> tuple[Tensor, ...]:
        """No logits of side outputs; an ``AuxiliaryOutput`` has some."""
        return ()


class AuxiliaryOutput(NamedTuple):
    """A ``SegmentationOutput`` in training of a network with auxiliary heads.

    Attributes:
        branches, ensemble, alpha: as there.
        auxiliary: of each head, the logits ``[B, N, K, h, w]`` of every branch; h and w are each head's own.
    """

    branches: Tensor
    ensemble: Tensor
    alpha: Tensor | None
    auxiliary: tuple[Tensor, ...]


# Saved programs (``torch.export.save``, AOTInductor's packages) name the class of what they return.
for output in (SegmentationOutput, AuxiliaryOutput):
    pytree._register_namedtuple(output, serialized_type_name=f"models.{output.__name__}")


def with_ensemble(
    logits: Tensor,  # [B*N, K, h, w]
    alpha: Tensor,  # [B], before the softmax
) -> SegmentationOutput:
    """Split the stacked logits into branches and add the ensemble of the detached branches."""
    branches = split_branches(logits, alpha.shape[0])
    ensemble, weights = weighted_ensemble(branches, alpha)
    return SegmentationOutput(branches, ensemble, weights)
