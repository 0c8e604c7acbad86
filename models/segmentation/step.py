"""What a segmentation network is trained by: network and loss as one module."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from cen_ext import recompute_outputs
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.losses import SegmentationLoss, segmentation_loss
from models.segmentation.settings import SegmentationRecipe
from models.training.precision import at_least_float32, autocast


class Objective(nn.Module):
    """Images and labels to the loss; all of the computation that is compiled, recorded or distributed.

    Args:
        net: the network, which runs in the precision of ``run.precision``; the loss is float32.
        recipe: the settings.
        device: the network's.
    """

    def __init__(self, net: SegmentationNetwork, recipe: SegmentationRecipe, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.device = device

    def forward(self, images: Tensor, target: Tensor, pixels: Tensor) -> SegmentationLoss:
        """What ``segmentation_loss`` returns.

        Args:
            images, target: ``[M*N, C, H, W]`` and ``[N, H, W]``.
            pixels: 0-d, what the sums over pixels are divided by.
        """
        settings = self.recipe.loss
        run = self.recipe.run
        # A compiler decides for itself what to keep.
        keeping = recompute_outputs() if run.recompute and not run.compile else nullcontext()
        with autocast(run.precision, self.device), keeping:
            output = self.net(images)
        return segmentation_loss(
            self.net,
            at_least_float32(output),
            target,
            sparsity=settings.sparsity,
            per_output=settings.per_output,
            ignore_index=self.recipe.data.ignore_index,
            auxiliary=settings.auxiliary,
            pixels=pixels,
        )
