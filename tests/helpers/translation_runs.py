"""Parts of the tests of translation's training: generated domains, tiny settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.__main__ import main
from models.training import config, registry
from models.training.rng import seed_all
from models.translation.settings import TranslationRecipe
from models.translation.task import TranslationTask
from tests.helpers.networks import randomise_norms

DOMAINS = ("normal", "edge_texture")
SIZE = (40, 48)
# 12 views in batches of 4: 3 steps an epoch, 7 in all; epochs, looks and saves cross.
STEPS = 7
TINY = [
    *["data.batch_size=4", "data.crop=32", "data.resize=36"],
    *["model.size=32", "model.base_width=4", "model.discriminator_width=4"],
    *["model.initial_scale=none", "model.dropout=0.5", "loss.sparsity=0.001"],
    *[f"optim.stages.0.steps={STEPS}", "optim.stages.0.discriminator_lr=2e-4"],
    *["optim.stages.0.ensemble_lr=none"],
    *["eval.pictures=0", "optim.schedule=constant", "optim.ema=none"],
    *["run.device=cpu", "run.precision=fp32", "run.workers=0"],
    *["run.log_steps=3", "run.checkpoint_steps=4", "run.evaluate_epochs=9", "run.evaluate_steps=none"],
]


def prepare_views(folder: Path) -> Path:
    """12 views to train on, 3 to evaluate on, of all generated domains."""
    command = ["prepare", "synthetic", str(folder), "--domains", "--train", "12", "--val", "3"]
    assert main([*command, "--height", str(SIZE[0]), "--width", str(SIZE[1])]) == 0
    return folder


def tiny_recipe(views: Path, *overrides: str) -> TranslationRecipe:
    settings = [*TINY, f"data.root={views}", *overrides]
    recipe: TranslationRecipe = config.override(registry.find("synthetic_translation_demo"), settings)
    return recipe


def tiny_task(views: Path, *overrides: str, dtype: torch.dtype = torch.float32) -> TranslationTask:
    """At its first step, channels exchanging; the same weights in every call."""
    seed_all(3)
    task = TranslationTask(tiny_recipe(views, *overrides))
    randomise_norms(task.nets.generator)
    with torch.no_grad():
        for net in (task.nets.generator, task.nets.discriminator):
            net.to(dtype)
    if task.nets.ema is not None:
        task.nets.ema.net.to(dtype)
        task.nets.ema.restart(task.nets.generator)
    task.start_stage(0, 0)
    return task


def command(views: Path, output: Path, *overrides: str) -> list[str]:
    """The tiny run's command line."""
    start = ["train", "synthetic_translation_demo", *TINY]
    return [*start, f"data.root={views}", f"run.output={output}", *overrides]


def batches_of(task: TranslationTask, dtype: torch.dtype) -> list[Any]:
    """The first epoch's batches."""
    batches = list(task.batches(0, 0))
    for batch in batches:
        batch.images, batch.target = batch.images.to(dtype), batch.target.to(dtype)
    return batches
