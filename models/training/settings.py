"""The settings that every system shares: how a run is carried out, and how long its stages are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from models.training.config import setting


def require(holds: bool, message: str) -> None:
    """Check a settings dataclass's value; the message begins with the field's name.

    Raises:
        ValueError: it does not hold.
    """
    if not holds:
        raise ValueError(message)


def require_at_least(least: int, settings: Any, *names: str) -> None:
    """Check that fields are None or numbers from ``least`` on.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(settings, name)
        require(value is None or value >= least, f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class RunSettings:
    """A run's folder and device, and how often it logs, saves and evaluates."""

    output: Path | None = setting(None, "run folder; none: runs/<recipe>/<time>", resumable=True)
    seed: int = setting(0, "seeds the weights, the order and the augmentation of the data")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one", resumable=True)
    workers: int = setting(
        2, "processes that load data for each that trains; 0 loads in the training process", resumable=True
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of the networks' arithmetic, by autocast; weights, norms' statistics and losses are float32"
    )
    tf32: bool = setting(True, "a GPU's float32 convolutions and matrix products round their inputs to TF32")
    channels_last: bool | None = setting(
        None,
        "channels_last images and weights; none: yes, but of translation's U-Nets on a CPU",
        resumable=True,
    )
    recompute: bool = setting(
        True,
        "segmentation: recompute norm outputs in backward, lower memory at no measurable cost",
        resumable=True,
    )
    compile: bool = setting(False, "torch.compile of network and loss", resumable=True)
    cuda_graphs: bool = setting(
        False, "record forward and backward pass once and replay them; one CUDA device only", resumable=True
    )
    steps: int | None = setting(
        None, "total number of steps to stop after; none: run every stage", resumable=True
    )
    log_steps: int = setting(20, "steps between two logs of the losses", resumable=True)
    checkpoint_steps: int = setting(500, "steps between two checkpoints", resumable=True)
    evaluate_epochs: int = setting(
        5, "epochs between two evaluations; there is one at the end as well", resumable=True
    )
    evaluate_steps: int | None = setting(
        None, "steps between two evaluations, instead of evaluate_epochs", resumable=True
    )
    checkpoint_minutes: float | None = setting(
        10.0,
        "minutes between two checkpoints at the most, whatever checkpoint_steps is; none: by steps alone",
        resumable=True,
    )
    scales_steps: int | None = setting(
        None, "steps between two records of the scales; none: one after each epoch", resumable=True
    )
    keep: int = setting(
        0,
        "checkpoints of the last so many saves that are kept beside last.pt, named by their step; 0: none",
        resumable=True,
    )

    def __post_init__(self) -> None:
        require_at_least(
            1, self, "log_steps", "checkpoint_steps", "evaluate_epochs", "evaluate_steps", "steps"
        )
        require_at_least(1, self, "scales_steps")
        require_at_least(0, self, "workers", "keep")
        minutes = self.checkpoint_minutes
        require(
            minutes is None or minutes > 0, f"checkpoint_minutes must be positive, or none, got {minutes}"
        )
        require(0 <= self.seed < 2**32, f"seed must be from 0 to 2**32 - 1, got {self.seed}")


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of the updates of weights by gradients, whichever the optimizer."""

    accumulate: int = setting(1, "parts a batch is computed in, one after the other, for less memory")
    clip: float | None = setting(None, "largest norm of all gradients; larger ones are scaled to it")
    schedule: Literal["constant", "polynomial", "cosine", "step"] = setting(
        "constant",
        "course of the learning rates in each stage, from the stage's own down to 0; step: down by decay "
        "every decay_steps",
    )
    power: float = setting(0.9, "exponent of the polynomial schedule")
    decay: float = setting(0.1, "factor of the step schedule")
    decay_steps: int = setting(10000, "steps from one such factor to the next")
    warmup_steps: int = setting(0, "steps at each stage's start in which the learning rates rise from 0")
    ema: float | None = setting(
        None, "decay per step of averaged weights, which are evaluated instead, as 0.999; none: no average"
    )
    step_in_backward: bool | None = setting(
        None,
        "update each weight once its gradient is complete and free that, for less memory; not with clip, "
        "fp16, CUDA graphs or several processes; none: on a CPU, unless one of these is set",
        resumable=True,
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, "accumulate", "decay_steps")
        require(0 < self.decay <= 1, f"decay must be above 0 and at most 1, got {self.decay}")
        require_at_least(0, self, "warmup_steps", "power")
        require(self.clip is None or self.clip > 0, f"clip must be positive, got {self.clip}")
        require(self.ema is None or 0 < self.ema < 1, f"ema must be between 0 and 1, or none, got {self.ema}")


@dataclass(frozen=True)
class Stage:
    """A stretch of training with settings of its own and fresh optimizers."""

    epochs: int = setting(100, "length in epochs; 0 leaves the stage out")
    steps: int | None = setting(None, "length in steps, instead of epochs")

    def __post_init__(self) -> None:
        require_at_least(0, self, "epochs", "steps")

    def length(self, steps_per_epoch: int) -> int:
        """Length in steps."""
        return self.epochs * steps_per_epoch if self.steps is None else self.steps


def stage_ends(stages: Sequence[Stage], steps_per_epoch: int) -> list[int]:
    """The step at which each stage is complete."""
    return list(accumulate(stage.length(steps_per_epoch) for stage in stages))
