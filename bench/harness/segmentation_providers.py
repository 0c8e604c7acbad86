"""The segmentation networks that ``bench.training`` lets train against each other, on equal weights and data.

Ours is trained by the very objects that ``python -m models train`` makes of a recipe; the baseline
by the loop that is usually written.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.baselines.exchange import compiled, split_state
from bench.baselines.segmentation import (
    EagerPSPNet,
    EagerRefineNet,
    eager_loss,
)
from bench.harness.configs import Config
from bench.harness.shapes import SMALL_SCALES
from cen_ext import exchanging_layers
from models.data import SYNTHETIC_CLASSES, Batch, prepare_synthetic
from models.segmentation.build import build_network, build_train_loader
from models.segmentation.losses import counted_pixels
from models.segmentation.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    SegmentationRecipe,
    SegmentationStage,
)
from models.segmentation.step import Objective, make_optimizer
from models.training import graphs
from models.training.optimization import Optimization, steps_in_backward
from models.training.precision import autocast, loss_scaler
from models.training.settings import RunSettings

EAGER_NETWORKS = {"refinenet": EagerRefineNet, "pspnet": EagerPSPNet}
DECODERS = {"refinenet": {"width": 256, "dropout": 0.5}, "pspnet": {"width": 512, "dropout": 0.1}}
LEARNING_RATE = 1e-3
STAGE = SegmentationStage(steps=10**6, encoder_lr=LEARNING_RATE, decoder_lr=LEARNING_RATE)


class Eager:
    """Lists of tensors, a loss per output at label resolution, PyTorch's SGD."""

    def __init__(self, recipe: SegmentationRecipe, config: Config, state: dict[str, Tensor]) -> None:
        model, device = recipe.model, torch.device(recipe.run.device)
        net = EAGER_NETWORKS[model.network](
            model.encoder,
            recipe.data.num_classes,
            len(recipe.data.modalities),
            threshold=recipe.fusion.threshold,
            dropout=model.dropout,
            width=model.width,
            frozen_statistics=model.frozen_statistics,
        )
        net.load_state_dict(split_state(state, net))
        self.net = net.to(device, memory_format=config.layout).train()
        self.run = compiled(net) if config.compile else net
        self.recipe, self.config = recipe, config
        optim = recipe.optim
        self.optimizer = torch.optim.SGD(
            net.parameters(), LEARNING_RATE, momentum=optim.momentum, weight_decay=optim.weight_decay
        )

    def step(self, batch: Batch) -> Tensor:
        """Train on a batch; the loss."""
        xs = [
            x.contiguous(memory_format=self.config.layout)
            for x in batch.images.chunk(len(self.recipe.data.modalities))
        ]
        self.optimizer.zero_grad()
        with autocast(self.config.precision, batch.images.device):
            outputs = self.run(xs)
            loss = eager_loss(self.net, outputs, batch.target, self.recipe.loss.sparsity)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def release(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad()


class Ours:
    """Network, loss and optimizer built by the training system from a recipe."""

    def __init__(self, recipe: SegmentationRecipe, config: Config, state: dict[str, Tensor]) -> None:
        device = torch.device(recipe.run.device)
        graphs.check(recipe.run, device)
        self.net = build_network(recipe)
        self.net.load_state_dict(state)
        self.net.to(device, memory_format=config.layout).train()
        self.recipe, self.config = recipe, config
        self.objective = graphs.compiled(Objective(self.net, recipe, device), recipe.run)
        self.optimization = Optimization(
            make_optimizer(self.net, recipe.optim, STAGE, recipe.run.precision),
            recipe.optim,
            0,
            STAGE.length(1),
            loss_scaler(recipe.run.precision, device),
            in_backward=steps_in_backward(recipe.optim, recipe.run, device),
        )
        recorded = recipe.run.cuda_graphs
        self.gradients = graphs.GraphedStep(self._gradients, self.net) if recorded else self._gradients
        self.steps = 0

    def _gradients(self, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        pixels = counted_pixels(target, self.recipe.data.ignore_index).clamp(min=1).double()
        return self.optimization.gradients(self.objective, [(images, target, pixels)])

    def step(self, batch: Batch) -> Tensor:
        """Train on a batch; the loss."""
        self.optimization.start(self.steps)
        loss, *_ = self.gradients(batch.images.contiguous(memory_format=self.config.layout), batch.target)
        self.optimization.step()
        self.steps += 1
        return loss

    def release(self) -> None:
        """Free the gradients, except those that a CUDA graph writes to."""
        if not self.recipe.run.cuda_graphs:
            self.optimization.optimizer.zero_grad()


Provider = Eager | Ours


def recipe_of(args: argparse.Namespace, config: Config, dropout: float | None = None) -> SegmentationRecipe:
    """The recipe of ``bench.training``'s arguments."""
    decoder = DECODERS[args.network]
    if dropout is not None:
        decoder = {**decoder, "dropout": dropout}
    return SegmentationRecipe(
        data=DataSettings(batch_size=args.batch, crop=args.crop, shorter_side=args.crop),
        model=ModelSettings(
            network=args.network,
            encoder=args.encoder,
            frozen_statistics=args.statistics == "frozen",
            **decoder,
        ),
        optim=OptimSettings(stages=(STAGE,)),
        run=RunSettings(
            device=args.device,
            workers=0,
            precision=config.precision,
            compile=config.compile,
            channels_last=config.channels_last,
            cuda_graphs=config.cuda_graphs,
        ),
    )


def initial_state(recipe: SegmentationRecipe) -> dict[str, Tensor]:
    """Weights to start from, the same whenever asked for; in every exchanging layer a tenth of the scales is
    below the threshold."""
    torch.manual_seed(0)
    net = build_network(recipe)
    for layer in exchanging_layers(net).values():
        with torch.no_grad():
            layer.weight[torch.rand_like(layer.weight) < SMALL_SCALES] = recipe.fusion.threshold / 20
    return net.state_dict()


def make_provider(recipe: SegmentationRecipe, config: Config, state: dict[str, Tensor]) -> Provider:
    """Network of a recipe, trained under a config."""
    return (Ours if config.ours else Eager)(recipe, config, state)


def batches(recipe: SegmentationRecipe, count: int) -> list[Batch]:
    """Augmented batches of generated rooms on the recipe's device, the same in every call."""
    crop, size = recipe.data.crop, recipe.data.batch_size
    with tempfile.TemporaryDirectory() as folder:
        root = prepare_synthetic(
            Path(folder) / "rooms", train=count * size, val=1, size=(crop, crop * 4 // 3), seed=0
        )
        data = replace(recipe.data, root=root, num_classes=len(SYNTHETIC_CLASSES))
        loader = build_train_loader(replace(recipe, data=data))
        return [batch.to(recipe.run.device) for batch in loader]
