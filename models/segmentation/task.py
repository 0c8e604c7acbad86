"""Training a segmentation network: what the loop asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cen_ext import synchronize_statistics
from models.data import Batch
from models.data.loading import on_device, subset
from models.data.survey import Overview
from models.networks.branches import running_with
from models.networks.counting import count_parameters
from models.networks.encoders.base import STRIDES
from models.networks.fusion import FusionStage
from models.networks.segmentor import SegmentationNetwork
from models.segmentation import networks
from models.segmentation.build import (
    branch_names,
    build_network,
    build_train_loader,
    check_network,
    open_split,
    open_validation,
    output_names,
    with_normalization,
)
from models.segmentation.class_weights import MEDIAN_FREQUENCY, count_weights
from models.segmentation.evaluate import chosen_images, evaluate, example_images
from models.segmentation.initial import load_weights
from models.segmentation.load import describe
from models.segmentation.losses import Counts, SegmentationLoss
from models.segmentation.overview import overview
from models.segmentation.settings import LossSettings, SegmentationRecipe
from models.segmentation.step import Objective, make_optimizer
from models.training import distributed, graphs, thresholds
from models.training.absence import check_changing, dropped_modality
from models.training.devices import device_of
from models.training.ema import Ema
from models.training.errors import UsageError
from models.training.exchange import exchanged_share, record_exchange
from models.training.optimization import Optimization, steps_in_backward
from models.training.pace import length
from models.training.precision import loss_scaler
from models.training.scales import Penalty, scales_at_start, travel_by_stage
from models.training.schedules import check_schedule
from models.visualize import Image, beside

# loss's settings that are of some kinds of loss alone
_OPTIONS_OF = {
    "label_smoothing": ("cross_entropy", "ohem"),
    "focal_gamma": ("focal",),
    "ohem_threshold": ("ohem",),
    "ohem_min_kept": ("ohem",),
}


class SegmentationTask:
    """A ``models.training.loop.Task``.

    Args:
        recipe: the settings.

    Raises:
        UsageError: a setting is missing or wrong, a path does not exist.
        DataError: the data set is not whole, or cannot give what the settings want.
    """

    best_metric = "ensemble/mean_iou"

    def __init__(self, recipe: SegmentationRecipe) -> None:
        check_network(recipe)
        check_batch_size(recipe)
        check_loss(recipe)
        check_schedule(recipe.optim)
        self.shown = ("loss", recipe.loss.kind, "penalty")
        self.recipe = recipe = with_normalization(recipe)
        self.device = device_of(recipe.run.device)
        graphs.check(recipe.run, self.device)
        self.in_backward = steps_in_backward(recipe.optim, recipe.run, self.device)
        self.names = output_names(recipe)
        self.stages = recipe.optim.stages
        self.loader = build_train_loader(recipe)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.images_per_step = recipe.data.batch_size
        self.validation = open_validation(recipe)
        self.train = open_split(recipe.data, "train")
        check_absences(recipe, self.train.absences.filled)
        self.images = len(self.train), len(self.validation)
        self.overview = overview(recipe.data, (self.train, self.validation))
        self.palette = self.train.palette
        self.net = build_network(recipe)
        self.net.to(self.device).train()
        channels_last = recipe.run.channels_last is not False
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net.to(memory_format=self.layout)  # type: ignore[call-overload]  # torch's own types leave it out
        if distributed.world_size() > 1:
            synchronize_statistics(self.net)
        self.ema = None if recipe.optim.ema is None else Ema(self.net, recipe.optim.ema)
        self.class_weights = self._class_weights()
        objective = Objective(self.net, recipe, self.device, self.class_weights)
        self.objective = distributed.parallel(graphs.compiled(objective, recipe.run), self.device)
        self.optimization: Optimization | None = None

    def initialize(self) -> list[str]:
        notes = load_weights(self.net, self.recipe.model, self.describe())
        thresholds.resolve(*self._networks())
        if self.ema is not None:
            self.ema.restart(self.net)
        if self._counts_classes:
            weights, note = count_weights(self.train, self.recipe.run.workers)
            self._set_class_weights(weights)
            notes.append(note)
        return notes

    initialise = initialize  # the old spelling

    def recall(self, path: Path, contents: dict[str, Any]) -> None:
        for net in self._networks():
            thresholds.restore(net, f"--resume: {path}", contents)

    def describe(self) -> dict[str, Any]:
        here = describe(self.validation.reader, self.validation.class_names, self.palette)
        if self._counts_classes and self.class_weights is not None:
            here["class_weights"] = self.class_weights.tolist()
        gray = list(self.validation.gray_in_color)
        return {**here, "gray_in_color": gray, **thresholds.record(self.net)}

    def summary(self, steps: int) -> str:
        train, val = self.images
        return ", ".join(
            (
                f"{train} training and {val} validation images",
                f"{self.recipe.data.num_classes} classes",
                " + ".join(self.recipe.data.modalities),
                f"{count_parameters(self.net) / 1e6:.2f} M parameters",
                length(steps, self.steps_per_epoch, self.images_per_step),
            )
        )

    @property
    def network(self) -> SegmentationNetwork:
        return self.net

    @property
    def penalty_strength(self) -> float:
        loss = self.recipe.loss
        return loss.sparsity * (len(self.names) if loss.per_output else 1)

    def scales(self, steps: int) -> Overview:
        optim = self.recipe.optim
        momentum = optim.momentum if optim.method == "sgd" else None
        lengths = [stage.length(self.steps_per_epoch) for stage in self.stages]
        ways = list(zip(self.stages, travel_by_stage(optim, lengths, steps, momentum), strict=True))
        travel = (
            sum(stage.encoder_lr * way for stage, way in ways),
            sum(stage.decoder_lr * way for stage, way in ways),
        )
        return scales_at_start(self.net, Penalty(self.penalty_strength, momentum, travel, steps))

    def _networks(self) -> list[SegmentationNetwork]:
        """The network, and its average where there is one."""
        return [self.net] if self.ema is None else [self.net, self.ema.net]

    @property
    def _counts_classes(self) -> bool:
        return self.recipe.loss.class_weights == MEDIAN_FREQUENCY

    def _class_weights(self) -> Tensor | None:
        """``[K]`` float64 on the device: those given, or NaN until they are counted or restored."""
        given = self.recipe.loss.class_weights
        if given is None:
            return None
        values = [nan] * self.recipe.data.num_classes if self._counts_classes else given
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def _set_class_weights(self, weights: Tensor) -> None:
        """In place: the objective, perhaps compiled, has the tensor."""
        assert self.class_weights is not None, "there are some"
        self.class_weights.copy_(weights)

    def start_stage(self, index: int, begin: int) -> None:
        stage, settings = self.stages[index], self.recipe.optim
        self.optimization = Optimization(
            make_optimizer(self.net, settings, stage, self.recipe.run.precision),
            settings,
            begin,
            stage.length(self.steps_per_epoch),
            loss_scaler(self.recipe.run.precision, self.device),
            None if self.ema is None else (self.ema, self.net),
            self.in_backward,
        )
        # A recorded graph belongs to the last stage's loss scale.
        recorded = self.recipe.run.cuda_graphs
        self.gradients = graphs.GraphedStep(self._gradients, self.net) if recorded else self._gradients

    @property
    def _updates(self) -> Optimization:
        assert self.optimization is not None, "a stage has been started"
        return self.optimization

    def batches(self, epoch: int, start_step: int) -> Iterable[Batch]:
        self.loader.seek(epoch, start_step)
        return on_device(self.loader, self.device)

    def loss(self, batch: Batch) -> Tensor:
        images = batch.images.contiguous(memory_format=self.layout)
        counts = self._divisors(torch.stack(Counts.of(*self._labels(batch.target))))
        pixels, labeled = counts.clamp(min=1)
        loss: SegmentationLoss = self.objective(images, batch.target, pixels, labeled)
        return loss.total

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = batch.images.contiguous(memory_format=self.layout)
        self._updates.start(step)
        data = self.recipe.data
        dropped = dropped_modality(data.drop_modality, len(data.modalities), self.recipe.run.seed, step)
        # Only what is nothing but tensors can be recorded.
        missing = (batch.absent, dropped) if batch.absent or dropped else ()
        total, entropies, penalty, auxiliary, fusion, dice = self.gradients(images, batch.target, *missing)
        self._updates.step()
        losses = {"loss": total, self.recipe.loss.kind: entropies.sum(), "penalty": penalty}
        if self.recipe.loss.dice > 0:
            losses["dice"] = dice
        if self.net.num_sides:
            losses["auxiliary"] = auxiliary
        if any(isinstance(module, FusionStage) for module in self.net.modules()):
            losses["fusion"] = fusion
        return losses | dict(zip(self.names, entropies, strict=True))

    def _gradients(
        self,
        images: Tensor,
        target: Tensor,
        absent: tuple[tuple[int, ...], ...] = (),
        dropped: tuple[int, ...] = (),
    ) -> tuple[Tensor, ...]:
        """``Optimization.gradients`` of the whole batch, of which this process has its share of the images.

        Args:
            images, target, absent: a ``Batch``'s. Images that have the same modalities are a part.
            dropped: modalities that are absent from all images that have others.

        Returns:
            A ``SegmentationLoss``'s members, detached.
        """
        batch = Batch(images, target, [""] * len(target), absent=absent)
        split = batch.split(self.recipe.optim.accumulate)
        parts = [each for part in split for each in part.by_presence(dropped)]
        counts = self._divisors(distributed.total(torch.stack(Counts.of(*self._labels(target)))))
        # float64, because the mean count of a part need not be whole.
        pixels, labeled = counts.where(counts > 0, 1) / (len(parts) * distributed.world_size())
        return self._updates.gradients(
            self.objective,
            [(part.images, part.target, pixels, labeled) for _, part in parts],
            [running_with(self.net, present) for present, _ in parts],
        )

    def _labels(self, target: Tensor) -> tuple[Tensor, int, Tensor | None]:
        """What ``Counts.of`` takes."""
        return target, self.recipe.data.ignore_index, self.class_weights

    def _divisors(self, counts: Tensor) -> Tensor:
        """What a batch's sums over pixels and over images are divided by, of its ``Counts``."""
        if self.recipe.loss.reduction == "sum":
            counts = torch.stack([torch.ones_like(counts[0]), counts[1]])
        return counts

    def status(self) -> dict[str, Tensor]:
        return {"exchanged": exchanged_share(self.net)}

    def learning_rates(self) -> dict[str, float]:
        return self._updates.learning_rates()

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Each process evaluates every n-th of the images."""
        every = chosen_images(self.validation, self.recipe)
        chosen = every[distributed.rank() :: distributed.world_size()]
        counts = evaluate(self.evaluated, subset(self.validation, chosen), self.recipe, stop)
        if distributed.largest(counts is None) or counts is None:
            return None
        counts.reduce()
        return counts.compute()

    @property
    def evaluated(self) -> SegmentationNetwork:
        """The network that is evaluated: the average where there is one."""
        return self.net if self.ema is None else self.ema.net

    def score(self, metrics: dict[str, float]) -> float:
        return metrics[self.best_metric]

    def record(self, board: SummaryWriter, folder: Path, step: int) -> None:
        record_exchange(self.net, self.recipe.data.modalities, board, step)
        for name, weight in zip(self.names, self.net.branch_weights(), strict=False):
            board.add_scalar(f"alpha/{name}", weight, step)
        for name, images in self._examples().items():
            board.add_image(f"examples/{name}", beside(list(images.values())), step, dataformats="HWC")

    def _examples(self) -> dict[str, dict[str, Image]]:
        return example_images(self.evaluated, self.validation, self.recipe, colors=self.palette)

    def networks(self) -> dict[str, Any]:
        state: dict[str, Any] = {"net": self.net.state_dict()}
        if self._counts_classes:
            state["class_weights"] = self.class_weights
        if self.ema is not None:
            state["ema"] = self.ema.net.state_dict()
        return state

    def state_dict(self) -> dict[str, Any]:
        state = self.networks()
        if self.optimization is not None:
            # The old spelling, so that runs and checkpoints of every version resume.
            state["optimisation"] = self.optimization.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        if self._counts_classes:
            self._set_class_weights(state["class_weights"])
        if self.ema is not None:
            self.ema.net.load_state_dict(state["ema"])
        if self.optimization is not None:
            self.optimization.load_state_dict(state["optimisation"])


def check_loss(recipe: SegmentationRecipe) -> None:
    """Refuse settings of a loss that contradict each other or the data.

    Raises:
        UsageError: an option of another kind of loss is set; class weights are not one for each class.
    """
    loss = recipe.loss
    for name, kinds in _OPTIONS_OF.items():
        value, default = getattr(loss, name), getattr(LossSettings, name)
        if loss.kind not in kinds and value != default:
            others = " or ".join(f"loss.kind={kind}" for kind in kinds)
            raise UsageError(
                f"loss.{name}={value} has no meaning with loss.kind={loss.kind}: it goes with {others}"
            )
    if loss.reduction == "sum" and loss.kind == "ohem":
        raise UsageError("loss.reduction must be mean with loss.kind=ohem, which averages over hard pixels")
    weights, classes = loss.class_weights, recipe.data.num_classes
    if isinstance(weights, tuple) and len(weights) != classes:
        raise UsageError(
            f"loss.class_weights must be one number for each of data.num_classes={classes} classes, "
            f"got {len(weights)}"
        )


def check_absences(recipe: SegmentationRecipe, filled: bool) -> None:
    """Refuse to train without modalities where that cannot work.

    Args:
        filled: whether training scenes lack some, which ``data.missing=fill`` keeps.

    Raises:
        UsageError: the fusion needs all modalities; parts of a batch differ in number or size from step to
            step where they must not, or are too small for a norm.
    """
    run, dropped = recipe.run, recipe.data.drop_modality > 0
    setting = "data.missing=fill" if filled else "data.drop_modality"
    if not filled and not dropped:
        return
    check_changing(recipe, run, setting)
    if not filled:
        return
    obstacles = {
        f"{distributed.world_size()} processes, whose batches fall into different parts": (
            distributed.world_size() > 1
        ),
        "run.compile=true, which compiles for every size of a part": run.compile,
        f"model.network={recipe.model.network}, a norm of which has a single value per image": (
            networks.is_pooled(recipe.model.network)
        ),
        f"batch statistics and data.crop={recipe.data.crop}, of which the last stage leaves a single value": (
            not recipe.model.frozen_statistics and recipe.data.crop <= STRIDES[-1]
        ),
    }
    for obstacle, there in obstacles.items():
        if there:
            raise UsageError(
                f"{setting} computes scenes that lack the same files together, be it one alone, and does not "
                f"go with {obstacle}; data.missing=skip leaves these scenes out"
            )


def check_batch_size(recipe: SegmentationRecipe) -> None:
    """Refuse a batch that does not divide into the parts that it is computed in.

    Raises:
        UsageError: it does not, or the parts are too small for a norm of the network.
    """
    size, parts = recipe.data.batch_size, recipe.optim.accumulate
    processes = distributed.world_size()
    if size % (parts * processes):
        raise UsageError(
            f"data.batch_size must be divisible by optim.accumulate={parts} times {processes} processes, "
            f"got {size}"
        )
    model, images = recipe.model, size // parts
    # Where the modalities share the norm, each of them brings a value per image.
    shared = model.network == "deeplabv3plus" and model.decoder_norms == "shared"
    branches = len(branch_names(recipe)) - (recipe.data.drop_modality > 0)
    values = images * branches if shared else images
    if networks.is_pooled(model.network) and values < 2:
        raise UsageError(
            f"data.batch_size / optim.accumulate must be at least 2 with model.network={model.network}: a "
            f"norm of its pyramid has a single value per image, got {size} / {parts}"
        )
