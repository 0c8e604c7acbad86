"""Corollary 1 on a trained network: with γ = 0 in some channels, exchanging these does not raise the loss.

Wang et al. 2020, Corollary 1: where the minimum of the penalized loss has γ = 0, exchange "will only decrease
the training loss", given convolutions that no modalities share. From one checkpoint, the channels below the
threshold are chosen once, their γ is 0 and stays so, every modality gets convolutions of its own, and the
network trains on with and without their exchange, on the same batches.
"""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cen_ext import replaced_channels
from models.analysis.runs import COMMAND, Run, contents_of, task_of
from models.networks.fusion import Exchange, NoFusion, named_exchange_points
from models.text import aligned
from models.training import registry
from models.training.errors import UsageError
from models.training.interrupt import Interrupt
from models.training.loop import Task
from models.training.rng import seed_all
from models.training.settings import stage_ends

LAST = 0.25  # share of the steps, the last ones, whose mean loss is the final loss
ARMS = {"without": False, "with": True}


class FrozenMask(nn.Module):
    """A ``mask`` of an exchanging norm that is the same whatever the scales.

    Args:
        replaced: ``[M, C]`` bool.
    """

    replaced: Tensor

    def __init__(self, replaced: Tensor) -> None:
        super().__init__()
        self.register_buffer("replaced", replaced, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Scales ``[M, C]`` to the channels that are replaced."""
        return self.replaced


@dataclass(frozen=True)
class Corollary:
    """Losses of both arms, without the penalty on the scales.

    Attributes:
        name, step: of the run and its checkpoint.
        seeds: of the order of data, its augmentation and dropout.
        replaced, scales: how many channels are exchanged, of how many.
        losses: by arm ``[seeds][steps]``.
    """

    name: str
    step: int
    seeds: Sequence[int]
    replaced: int
    scales: int
    losses: Mapping[str, Sequence[Sequence[float]]]

    def final(self, arm: str) -> list[float]:
        """Of each seed, the mean loss of the last quarter of the steps."""
        return [float(np.mean(losses[-max(1, round(LAST * len(losses))) :])) for losses in self.losses[arm]]

    @property
    def differences(self) -> list[float]:
        """Of each seed, the final loss with exchange less that without."""
        return [a - b for a, b in zip(self.final("with"), self.final("without"), strict=True)]

    @property
    def error(self) -> float:
        """Standard error of the mean difference; NaN of one seed."""
        values = np.array(self.differences)
        return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan

    def verdict(self) -> str:
        mean, error = float(np.mean(self.differences)), self.error
        if math.isnan(error):
            return f"{mean:+.4f} of one seed, which tells nothing of the noise between seeds"
        mark = "pass" if mean <= 2 * error else "FAIL"
        return f"{mark}: {mean:+.4f} with exchange, standard error {error:.4f}; at most 0 is expected"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.name,
            "step": self.step,
            "seeds": list(self.seeds),
            "replaced": self.replaced,
            "scales": self.scales,
            "losses": {arm: [list(each) for each in losses] for arm, losses in self.losses.items()},
            "final": {arm: self.final(arm) for arm in self.losses},
            "verdict": self.verdict(),
        }

    def text(self) -> str:
        """For a terminal."""
        steps = len(self.losses["with"][0])
        columns = [f"{arm}, {when}" for arm in ARMS for when in ("at first", "at last")]
        cells = [["seed", *columns, "difference"]]
        for i, seed in enumerate(self.seeds):
            values = [value for arm in ARMS for value in (self.losses[arm][i][0], self.final(arm)[i])]
            cells.append([str(seed), *(f"{value:.4f}" for value in values), f"{self.differences[i]:+.4f}"])
        title = (
            f"Corollary 1 from {self.name}, step {self.step}: {self.replaced} of {self.scales} scales are 0 "
            f"and stay so, convolutions are private; {steps} steps with and without exchange of these"
        )
        how = (
            "Training losses without the penalty, on the same batches in both; at last: the mean of the last "
            "quarter of the steps. From a run with exchange, the training without it starts where the "
            "exchange is taken away; from one without, the other starts where it is put in."
        )
        how = "\n".join(textwrap.wrap(how, 110))
        return "\n\n".join([title, how, aligned(cells), self.verdict()])


def compare_arms(
    run: Run, thresholds: Mapping[str, float], steps: int, seeds: Sequence[int], interrupt: Interrupt
) -> Corollary | None:
    """Train both arms for every seed.

    Args:
        run: it, or a checkpoint of it.
        thresholds: θ of every exchange point.
        steps: of each arm.
        seeds: one or more.
        interrupt: stops between two steps.

    Returns:
        What came of the seeds of which both arms are done; None of none.

    Raises:
        UsageError: settings do not fit, or no scale is below its threshold.
        DataError: the data set is not whole.
    """
    path, contents = contents_of(run)
    recipe = _recipe(run)
    losses: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    zeroed: dict[str, Tensor] = {}
    with tqdm(total=len(ARMS) * steps * len(seeds), unit="step", disable=None, dynamic_ncols=True) as bar:
        for seed in seeds:
            both = []
            for exchange in ARMS.values():
                seeded = replace(recipe, run=replace(recipe.run, seed=seed))
                task = task_of(seeded, path, contents)
                zeroed = _freeze(run, task.network, thresholds, exchange=exchange)
                _start(task, contents["loop"])
                both.append(_train(task, zeroed, steps, seed, interrupt, bar))
            if interrupt:
                break
            for arm, values in zip(ARMS, both, strict=True):
                losses[arm].append(values)
    done = len(losses["with"])
    if not done:
        return None
    replaced = sum(int(mask.sum()) for mask in zeroed.values())
    scales = sum(mask.numel() for mask in zeroed.values())
    return Corollary(run.name, contents["loop"]["step"], seeds[:done], replaced, scales, losses)


def _recipe(run: Run) -> Any:
    """The run's settings with private convolutions, constant learning rates and no average."""
    recipe, fusion = run.recipe, run.recipe.fusion
    if type(fusion) not in (Exchange, NoFusion) or getattr(fusion, "norms", "private") == "shared":
        raise UsageError(
            f"{COMMAND}: --corollary takes runs with fusion=exchange, or fusion=none with private norms; "
            f"{run.path} has {fusion}"
        )
    private = replace(
        recipe,
        fusion=NoFusion(convolutions="private", penalty=fusion.penalty, at=fusion.at),
        optim=replace(recipe.optim, schedule="constant", warmup_steps=0, ema=None),
    )
    try:
        registry.system_of(private).network(private)
    except UsageError as error:
        raise UsageError(
            f"{COMMAND}: --corollary needs a network whose convolutions can be private: {error}"
        ) from None
    return private


def _freeze(
    run: Run, net: nn.Module, thresholds: Mapping[str, float], *, exchange: bool
) -> dict[str, Tensor]:
    """Set the scales below the threshold to 0, and exchange these channels from now on, or none.

    Returns:
        By layer ``[M, C]`` bool, those channels.
    """
    region = getattr(run.recipe.fusion, "region", "own")
    zeroed = {}
    for name, point in named_exchange_points(net).items():
        zeroed[name] = replaced_channels(point.weight, thresholds[name], region)
        if exchange:
            point.mask = FrozenMask(zeroed[name])
    if not any(bool(mask.any()) for mask in zeroed.values()):
        raise UsageError(
            f"{COMMAND}: no scale of {run.path} that may be exchanged is below θ: nothing to compare; "
            "give a larger --threshold, or a checkpoint of later"
        )
    _hold(net, zeroed)
    return zeroed


def _hold(net: nn.Module, zeroed: Mapping[str, Tensor]) -> None:
    points = named_exchange_points(net)
    with torch.no_grad():
        for name, mask in zeroed.items():
            points[name].weight.masked_fill_(mask, 0)


def _start(task: Task, progress: Mapping[str, Any]) -> None:
    """Start the stage of the checkpoint's last step."""
    ends = stage_ends(task.stages, progress["steps_per_epoch"])
    task.start_stage(min(bisect_left(ends, max(1, progress["step"])), len(ends) - 1), 0)


def _train(
    task: Task, zeroed: Mapping[str, Tensor], steps: int, seed: int, interrupt: Interrupt, bar: tqdm[Any]
) -> list[float]:
    """Losses of so many steps, or of fewer if interrupted."""
    seed_all(seed)
    losses = []
    batches = (batch for epoch in count() for batch in task.batches(epoch, 0))
    for step, batch in enumerate(islice(batches, steps)):
        if interrupt:
            break
        parts = task.step(batch, step)
        losses.append(float(parts["loss"] - parts["penalty"]))
        _hold(task.network, zeroed)  # where the penalty would hold them: at a minimum
        bar.update()
    return losses
