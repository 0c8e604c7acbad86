"""Which modality's branch an ensemble's classes rest on."""

from __future__ import annotations

from torch import Tensor


def relied_on(branches: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """The branch that speaks most for the ensemble's class of each pixel.

    The ensemble's logits are ``sum_m weights[m] * branches[m]`` (Wang et al. 2020, Eq. 4). What lifts its
    class c above the mean of the classes is therefore a sum over the branches of
    ``weights[m] * (branches[m][c] - branches[m].mean(classes))``; the branch of the largest term is returned.
    A branch is not its sensor alone: where channels are exchanged, it has seen the others' as well.

    Args:
        branches: ``[B, K, H, W]`` logits.
        weights: ``[B]``, the softmax of the network's ``alpha``.
        labels: ``[H, W]``, the ensemble's classes.

    Returns:
        ``[H, W]`` int64, numbers of branches; of equal terms the first's.
    """
    chosen = labels.long().expand(len(branches), 1, *labels.shape)
    margins = branches.gather(1, chosen).squeeze(1) - branches.mean(1)
    return (weights[:, None, None] * margins).argmax(0)
