"""The translation networks that ``bench.training`` trains against each other, as the segmentation ones in
``bench.harness.segmentation_providers``.

Ours passes through the generator once per step, the baseline twice, as the released one: without
dropout both compute the same numbers.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.baselines.exchange import compiled, eager_penalty, split_state
from bench.baselines.translation import EagerPatchGAN, EagerUNet
from bench.harness.configs import Config
from bench.harness.shapes import SMALL_SCALES
from cen_ext import exchanging_layers
from models.data import TranslationBatch, prepare_synthetic_domains
from models.training.precision import autocast
from models.training.settings import RunSettings
from models.translation.build import build_discriminator, build_generator, build_train_loader
from models.translation.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    TranslationRecipe,
    TranslationStage,
)
from models.translation.step import GANTrainer

STAGE = TranslationStage(steps=10**6)

State = dict[str, dict[str, Tensor]]  # of the generator and of the discriminator


class Eager:
    """Lists of tensors, two passes of the generator per step, PyTorch's Adam."""

    def __init__(self, recipe: TranslationRecipe, config: Config, state: State) -> None:
        model, device = recipe.model, torch.device(recipe.run.device)
        self.recipe, self.config = recipe, config
        self.generator = EagerUNet(
            len(recipe.data.domains),
            size=model.size,
            threshold=recipe.fusion.threshold,
            dropout=model.dropout,
        )
        self.discriminator = EagerPatchGAN()
        nets = {"generator": self.generator, "discriminator": self.discriminator}
        for name, net in nets.items():
            net.load_state_dict(split_state(state[name], net))
            net.to(device, memory_format=config.layout).train()
        self.generate, self.discriminate = (compiled(net) if config.compile else net for net in nets.values())
        self.optimizers = {
            name: torch.optim.Adam(net.parameters(), STAGE.generator_lr, recipe.optim.betas)
            for name, net in nets.items()
        }

    def step(self, batch: TranslationBatch) -> Tensor:
        """Train both networks on a batch; the generator's loss."""
        xs = [
            x.contiguous(memory_format=self.config.layout)
            for x in batch.images.chunk(len(self.recipe.data.domains))
        ]
        device, settings = batch.images.device, self.recipe.loss
        bce = F.binary_cross_entropy_with_logits

        with autocast(self.config.precision, device):
            branches, _ = self.generate(xs)
            fakes = self.discriminate(xs, [branch.detach() for branch in branches])
            reals = self.discriminate(xs, [batch.target] * len(xs))
            loss = sum(
                0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake)))
                for real, fake in zip(reals, fakes, strict=True)
            )
        self.update("discriminator", loss)

        with autocast(self.config.precision, device):
            branches, ensemble = self.generate(xs)
            decisions = self.discriminate(xs, branches)
            loss = sum(bce(decision, torch.ones_like(decision)) for decision in decisions)
            loss = loss + settings.l1 * sum(F.l1_loss(y, batch.target) for y in (*branches, ensemble))
            loss = loss + settings.sparsity * eager_penalty(self.generator)
        self.update("generator", loss)
        return loss.detach()

    def update(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def release(self) -> None:
        """Free the gradients."""
        for net in (self.generator, self.discriminator):
            net.zero_grad()


class Ours:
    """Networks and optimizers built by the training system from a recipe."""

    def __init__(self, recipe: TranslationRecipe, config: Config, state: State) -> None:
        device = torch.device(recipe.run.device)
        self.config = config
        generator, discriminator = build_generator(recipe), build_discriminator(recipe)
        generator.load_state_dict(state["generator"])
        discriminator.load_state_dict(state["discriminator"])
        self.nets = GANTrainer(generator.to(device), discriminator.to(device), recipe, device)
        self.nets.start_stage(STAGE, 0, STAGE.length(1))
        self.steps = 0

    def step(self, batch: TranslationBatch) -> Tensor:
        """Train both networks on a batch; the generator's loss."""
        losses = self.nets.step(batch.images, batch.target, self.steps)
        self.steps += 1
        return losses["loss"]

    def release(self) -> None:
        """Free the gradients, except those that a CUDA graph writes to."""
        if not self.config.cuda_graphs:
            for optimization in self.nets.optimizations.values():
                optimization.optimizer.zero_grad()


Provider = Eager | Ours


def recipe_of(args: argparse.Namespace, config: Config, dropout: float | None = None) -> TranslationRecipe:
    """The recipe of ``bench.training``'s arguments."""
    model = ModelSettings(size=args.crop)
    return TranslationRecipe(
        data=DataSettings(batch_size=args.batch, crop=args.crop, resize=args.crop * 286 // 256),
        model=model if dropout is None else replace(model, dropout=dropout),
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


def initial_state(recipe: TranslationRecipe) -> State:
    """Weights to start from, as those of ``bench.harness.segmentation_providers``."""
    torch.manual_seed(0)
    generator, discriminator = build_generator(recipe), build_discriminator(recipe)
    for layer in exchanging_layers(generator).values():
        with torch.no_grad():
            layer.weight[torch.rand_like(layer.weight) < SMALL_SCALES] = recipe.fusion.threshold / 20
    return {"generator": generator.state_dict(), "discriminator": discriminator.state_dict()}


def make_provider(recipe: TranslationRecipe, config: Config, state: State) -> Provider:
    """Pair of networks of a recipe, trained under a config."""
    return (Ours if config.ours else Eager)(recipe, config, state)


def batches(recipe: TranslationRecipe, count: int) -> list[TranslationBatch]:
    """Augmented batches of generated rooms on the recipe's device, the same in every call."""
    side, size = recipe.data.resize, recipe.data.batch_size
    with tempfile.TemporaryDirectory() as folder:
        root = prepare_synthetic_domains(
            Path(folder) / "rooms", train=count * size, val=1, size=(side, side), seed=0
        )
        loader = build_train_loader(replace(recipe, data=replace(recipe.data, root=root)))
        return [batch.to(recipe.run.device) for batch in loader]
