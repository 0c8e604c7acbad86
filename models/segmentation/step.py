"""A step of training a segmentation network: network and loss as one module, and the optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cen_ext import recompute_outputs
from models.networks.branches import of_all
from models.networks.segmentor import SegmentationNetwork
from models.segmentation.criteria import Criterion
from models.segmentation.losses import SegmentationLoss, segmentation_loss
from models.segmentation.settings import OptimSettings, SegmentationRecipe, SegmentationStage
from models.training.optimization import fused
from models.training.precision import at_least_float32, autocast


class Objective(nn.Module):
    """Images and labels to the loss; all of the computation that is compiled, recorded or distributed.

    Args:
        net: the network, which runs in the precision of ``run.precision``; the loss is float32.
        recipe: the settings.
        device: the network's.
        class_weights: ``[K]`` on the device; None: 1.
    """

    def __init__(
        self,
        net: SegmentationNetwork,
        recipe: SegmentationRecipe,
        device: torch.device,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.device = device
        self.criterion = Criterion(**{name: getattr(recipe.loss, name) for name in Criterion._fields})
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self, images: Tensor, target: Tensor, pixels: Tensor, labeled: Tensor | None = None
    ) -> SegmentationLoss:
        """Compute the ``segmentation_loss``.

        Within ``cen_ext.present`` images are of the present modalities, and the entropies of the others 0.

        Args:
            images, target: ``[M*N, C, H, W]`` and ``[N, H, W]``.
            pixels, labeled: 0-d, what the sums over pixels and over images are divided by; as ``Counts``.
        """
        settings = self.recipe.loss
        run = self.recipe.run
        # A compiler decides for itself what to keep.
        keeping = recompute_outputs() if run.recompute and not run.compile else nullcontext()
        with autocast(run.precision, self.device), keeping:
            output = self.net(images)
        loss = segmentation_loss(
            self.net,
            at_least_float32(output),
            target,
            sparsity=settings.sparsity,
            per_output=settings.per_output,
            ignore_index=self.recipe.data.ignore_index,
            auxiliary=settings.auxiliary,
            auxiliary_size=settings.auxiliary_size,
            pixels=pixels,
            images=labeled,
            criterion=self.criterion,
            weights=self.class_weights,
        )
        every = of_all(loss.entropies, self.net.present, self.net.num_modalities)
        return loss._replace(entropies=every)


def make_optimizer(
    net: SegmentationNetwork, settings: OptimSettings, stage: SegmentationStage, precision: str
) -> torch.optim.Optimizer:
    """A fresh optimizer; the ensemble's weights learn with the decoder."""
    groups = _groups(net, {"encoder": stage.encoder_lr, "decoder": stage.decoder_lr}, settings.bias_factor)
    decay, at_once = settings.weight_decay, fused(net, precision)
    if settings.method == "sgd":
        sgd = torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=at_once)
        sgd.register_step_pre_hook(_start_momenta)
        return sgd
    return torch.optim.AdamW(groups, betas=(settings.momentum, 0.999), weight_decay=decay, fused=at_once)


def _groups(net: SegmentationNetwork, rates: dict[str, float], bias_factor: float) -> list[dict[str, Any]]:
    """The optimizer's groups: the encoder's parameters and the others, and apart the biases of convolutions.

    Without a factor biases are in the same groups as they always were, for runs that resume.
    """
    biases = {
        id(module.bias) for module in net.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    } - {id(None)}
    groups: dict[str, dict[str, Any]] = {
        part: {"name": part, "params": [], "lr": rate} for part, rate in rates.items()
    }
    if bias_factor != 1:
        groups |= {
            f"{part} biases": {"name": f"{part} biases", "params": [], "lr": bias_factor * rate}
            for part, rate in rates.items()
        }
    for name, parameter in net.named_parameters():
        part = "encoder" if name.startswith("encoder.") else "decoder"
        apart = bias_factor != 1 and id(parameter) in biases
        groups[f"{part} biases" if apart else part]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _start_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Zeros before the first step: torch leaves its own uninitialised where that one overflows."""
    if not optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                momentum = torch.zeros_like(parameter, requires_grad=False)
                optimizer.state[parameter]["momentum_buffer"] = momentum
