"""Training a segmentation network: what the loop asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models.data import Batch
from models.segmentation.build import (
    build_network,
    build_train_loader,
    load_weights,
    open_split,
    output_names,
)
from models.segmentation.evaluate import evaluate, example_pictures
from models.segmentation.losses import segmentation_loss
from models.segmentation.network import SegmentationNetwork
from models.segmentation.pictures import beside
from models.segmentation.settings import OptimSettings, SegmentationRecipe, SegmentationStage
from models.training.devices import device_of
from models.training.errors import UsageError
from models.training.exchange import exchanged_share, record_exchange


class SegmentationTask:
    """A ``models.training.loop.Task``.

    Args:
        recipe: the settings.

    Raises:
        UsageError: a setting is missing or wrong, a path does not exist.
        DataError: the data set is not whole.
    """

    def __init__(self, recipe: SegmentationRecipe) -> None:
        if recipe.model.network == "pspnet" and recipe.data.batch_size < 2:
            raise UsageError(
                "data.batch_size must be at least 2 with model.network=pspnet: a norm of its pyramid has a "
                f"single value an image, got {recipe.data.batch_size}"
            )
        self.recipe = recipe
        self.device = device_of(recipe.run.device)
        self.names = output_names(recipe)
        self.stages = recipe.optim.stages
        self.loader = build_train_loader(recipe)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.images_per_step = recipe.data.batch_size
        self.validation = open_split(recipe.data, "val")
        self.net = build_network(recipe)
        self.net.to(self.device).train()
        self.optimizer: torch.optim.Optimizer | None = None

    def initialise(self) -> list[str]:
        return load_weights(self.net, self.recipe)

    def start_stage(self, index: int) -> None:
        self.optimizer = make_optimizer(self.net, self.recipe.optim, self.stages[index])

    def batches(self, epoch: int, start_step: int) -> Iterable[Batch]:
        self.loader.seek(epoch, start_step)
        return self.loader

    def step(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.to(self.device, non_blocking=True)
        settings = self.recipe.loss
        loss, entropies = segmentation_loss(
            self.net,
            self.net(batch.images),
            batch.target,
            sparsity=settings.sparsity,
            per_output=settings.per_output,
            ignore_index=self.recipe.data.ignore_index,
            penalty=self.recipe.variant.penalised,
            auxiliary=settings.auxiliary,
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), **dict(zip(self.names, entropies.detach(), strict=True))}

    def status(self) -> dict[str, Tensor]:
        return {"exchanged": exchanged_share(self.net)}

    def learning_rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        counts = evaluate(self.net, self.validation, self.recipe, stop)
        return None if counts is None else counts.compute()

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["ensemble/mean_iou"]

    def record(self, board: SummaryWriter, step: int) -> None:
        record_exchange(self.net, self.recipe.data.modalities, board, step)
        for name, weight in zip(self.recipe.data.modalities, self.net.branch_weights(), strict=False):
            board.add_scalar(f"alpha/{name}", weight, step)
        for name, pictures in example_pictures(self.net, self.validation, self.recipe).items():
            board.add_image(f"examples/{name}", beside(list(pictures.values())), step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        optimizer = {} if self.optimizer is None else self.optimizer.state_dict()
        return {"net": self.net.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


def make_optimizer(
    net: SegmentationNetwork, settings: OptimSettings, stage: SegmentationStage
) -> torch.optim.Optimizer:
    """A fresh optimiser; the ensemble's weights learn with the decoder."""
    rest = [parameter for name, parameter in net.named_parameters() if not name.startswith("encoder.")]
    groups = [
        {"name": "encoder", "params": list(net.encoder.parameters()), "lr": stage.encoder_lr},
        {"name": "decoder", "params": rest, "lr": stage.decoder_lr},
    ]
    if settings.method == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)
