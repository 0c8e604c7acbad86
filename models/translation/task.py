"""Training a translation network: what the loop asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from models.data import TranslationBatch
from models.data.loading import on_device, subset
from models.data.survey import Overview
from models.networks.counting import count_parameters
from models.networks.systems.unet import UNet
from models.training import distributed, thresholds
from models.training.devices import device_of
from models.training.exchange import exchanged_share, record_exchange
from models.training.pace import length
from models.training.scales import Penalty, scales_at_start, travel_by_stage
from models.translation.build import (
    build_discriminator,
    build_generator,
    build_train_loader,
    open_split,
    output_names,
)
from models.translation.evaluate import check_scores, chosen_views, evaluate, example_images
from models.translation.initial import load_start
from models.translation.load import describe
from models.translation.overview import overview
from models.translation.settings import TranslationRecipe, TranslationStage
from models.translation.step import GANTrainer
from models.visualize import beside, contact_sheet, save_image

_HIGHER_IS_BETTER = ("psnr", "ssim")


class TranslationTask:
    """A ``models.training.loop.Task``.

    Args:
        recipe: the settings.

    Raises:
        UsageError: a setting is missing or wrong, a path does not exist.
        DataError: the data set is not whole.
    """

    shown = ("loss", "penalty", "discriminator")

    def __init__(self, recipe: TranslationRecipe) -> None:
        self.recipe = recipe
        self.device = device_of(recipe.run.device)
        self.names = output_names(recipe)
        self.stages: Sequence[TranslationStage] = recipe.optim.stages
        self.loader = build_train_loader(recipe)
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.images_per_step = recipe.data.batch_size
        self.validation = open_split(recipe.data, "val")
        train = open_split(recipe.data, "train")
        self.images = len(train), len(self.validation)
        self.reader = train.reader
        self.target = train.domains[-1]
        self.overview = overview({"train": train, "val": self.validation})
        self.views = chosen_views(self.validation, recipe)
        check_scores(recipe, len(self.views))
        generator = build_generator(recipe, self.target.channels).to(self.device)
        discriminator = build_discriminator(recipe, self.target.channels).to(self.device)
        self.nets = GANTrainer(generator, discriminator, recipe, self.device, self.target.hole)

    def initialize(self) -> list[str]:
        start = self.recipe.model.start
        notes = [] if start is None else load_start(self.nets, start, self.describe())
        thresholds.resolve(*self._generators())
        return notes

    initialise = initialize  # the old spelling

    def recall(self, path: Path, contents: dict[str, Any]) -> None:
        for net in self._generators():
            thresholds.restore(net, f"--resume: {path}", contents)

    def describe(self) -> dict[str, Any]:
        return {**describe(self.reader), **thresholds.record(self.nets.generator)}

    def summary(self, steps: int) -> str:
        (train, val), data = self.images, self.recipe.data
        generator, discriminator = (
            f"{count_parameters(net) / 1e6:.2f} M" for net in (self.nets.generator, self.nets.discriminator)
        )
        return ", ".join(
            (
                f"{train} training and {val} validation views",
                f"{' + '.join(data.domains)} to {data.target}",
                f"{generator} parameters and {discriminator} of the discriminator",
                length(steps, self.steps_per_epoch, self.images_per_step),
            )
        )

    @property
    def network(self) -> UNet:
        return self.nets.generator

    @property
    def penalty_strength(self) -> float:
        loss = self.recipe.loss
        return loss.sparsity * (len(self.names) if loss.per_output else 1)

    def scales(self, steps: int) -> Overview:
        optim = self.recipe.optim
        lengths = [stage.length(self.steps_per_epoch) for stage in self.stages]
        ways = travel_by_stage(optim, lengths, steps, None)
        travel = sum(stage.generator_lr * way for stage, way in zip(self.stages, ways, strict=True))
        penalty = Penalty(self.penalty_strength, None, (travel, travel), steps)
        return scales_at_start(self.nets.generator, penalty, "level")

    def _generators(self) -> list[UNet]:
        """The generator, and its average where there is one."""
        nets = self.nets
        return [nets.generator] if nets.ema is None else [nets.generator, nets.ema.net]

    def start_stage(self, index: int, begin: int) -> None:
        stage = self.stages[index]
        self.nets.start_stage(stage, begin, stage.length(self.steps_per_epoch))

    def batches(self, epoch: int, start_step: int) -> Iterable[TranslationBatch]:
        self.loader.seek(epoch, start_step)
        return on_device(self.loader, self.device)

    def loss(self, batch: TranslationBatch) -> Tensor:
        return self.nets.loss(batch.images, batch.target)

    def step(self, batch: TranslationBatch, step: int) -> dict[str, Tensor]:
        scalars: dict[str, Tensor] = {}
        for kind, values in self.nets.step(batch.images, batch.target, step).items():
            if values.dim() == 0:
                scalars[kind] = values
                continue
            names = self.names[: len(values)]
            scalars |= {f"{kind}/{name}": value for name, value in zip(names, values, strict=True)}
        return scalars

    def status(self) -> dict[str, Tensor]:
        return {"exchanged": exchanged_share(self.nets.generator)}

    def learning_rates(self) -> dict[str, float]:
        return self.nets.learning_rates()

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Each process evaluates every n-th of the views."""
        part = self.views[distributed.rank() :: distributed.world_size()]
        views = subset(self.validation, part)
        metrics = evaluate(self.evaluated, views, self.recipe, self.target, stop, total=len(self.views))
        if distributed.largest(metrics is None) or metrics is None:
            return None
        metrics.reduce()
        return metrics.compute()

    @property
    def evaluated(self) -> UNet:
        """The generator that is evaluated: the average where there is one."""
        return self.nets.generator if self.nets.ema is None else self.nets.ema.net

    @property
    def best_metric(self) -> str:
        return f"ensemble/{self.recipe.eval.best}"

    def score(self, metrics: dict[str, float]) -> float:
        value = metrics[self.best_metric]
        return value if self.recipe.eval.best in _HIGHER_IS_BETTER else -value

    def record(self, board: SummaryWriter, folder: Path, step: int) -> None:
        domains, generator = self.recipe.data.domains, self.nets.generator
        record_exchange(generator, domains, board, step)
        for name, weight in zip(domains, generator.branch_weights(), strict=True):
            board.add_scalar(f"alpha/{name}", weight, step)
        if not self.recipe.eval.pictures:
            return
        examples = example_images(self.evaluated, self.validation, self.recipe)
        for name, images in examples.items():
            board.add_image(f"examples/{name}", beside(list(images.values())), step, dataformats="HWC")
        (folder / "pictures").mkdir(exist_ok=True)
        save_image(folder / "pictures" / f"{step:08d}.png", contact_sheet(examples))

    def networks(self) -> dict[str, Any]:
        return self.nets.networks()

    def state_dict(self) -> dict[str, Any]:
        return self.nets.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nets.load_state_dict(state)
