"""The training loop: steps, logs of the losses, evaluations, checkpoints. Everything else is a ``Task``.

Where a run stands is one number, the step: epoch, place in the epoch and stage follow from it. The state of
a run is the task's state and the loop's ``Progress``, which all processes of a run share, and each process's
own generators and sums of losses; a checkpoint holds all of it, and a run that is resumed from it computes
the same bits on the CPU as one that was never interrupted. The processes keep in step: all of them log,
save, evaluate and stop after the same steps, and the first one writes.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.data.images import DataError
from models.data.survey import Overview
from models.training import checkpoint, distributed, scale_records
from models.training.devices import peak_memory
from models.training.errors import UsageError
from models.training.interrupt import Interrupt
from models.training.pace import Pace, duration
from models.training.rng import preserved_rng, process_seed, rng_state, seed_all, set_rng_state
from models.training.run_folder import RunFolder
from models.training.settings import RunSettings, Stage, stage_ends

log = logging.getLogger(__name__)


class Task(Protocol):
    """The object of training: networks, data, optimizers, metrics.

    Attributes:
        device: where the networks are.
        shown: the losses that a terminal has room for.
        overview: what the data sets hold, and what of it looks wrong.
        best_metric: the name of the metric that ``score`` reads.
    """

    device: torch.device
    steps_per_epoch: int
    images_per_step: int
    stages: Sequence[Stage]
    overview: Overview

    @property
    def shown(self) -> Sequence[str]: ...

    @property
    def best_metric(self) -> str: ...

    @property
    def network(self) -> nn.Module:
        """The network whose scales are penalized, and recorded; in translation the generator."""

    @property
    def penalty_strength(self) -> float:
        """λ, times how often a step's loss has the penalty."""

    def initialize(self) -> list[str]:
        """Load the weights to start from, and return notes about them. Not called when resuming."""

    def recall(self, path: Path, contents: dict[str, Any]) -> None:
        """Take from a checkpoint what ``describe`` has put there and neither settings nor state tell.

        Called when resuming, in the place of ``initialize``.
        """

    def describe(self) -> dict[str, Any]:
        """The record to file with the weights beside the settings, as JSON has it, with the ``inputs``.

        What it says may become known by ``initialize`` or ``load_state_dict``.
        """

    def summary(self, steps: int) -> str:
        """Data, network and length of a training of so many steps, in a line."""

    def scales(self, steps: int) -> Overview:
        """The scales that a training of so many steps begins with, and whether it can exchange channels."""

    def start_stage(self, index: int, begin: int) -> None:
        """Make the fresh optimizers of a stage whose first step is ``begin``."""

    def batches(self, epoch: int, start_step: int) -> Iterable[Any]:
        """The epoch's batches from ``start_step`` on; the same whenever asked for."""

    def loss(self, batch: Any) -> Tensor:
        """The loss of ``network`` on one batch, 0-d and differentiable, as a step has it."""

    def step(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Train on one batch, in the run's step counted from 0.

        Returns:
            0-d detached losses on the device, ``loss`` the one that was differentiated; the mean of all
            processes' is the whole batch's.
        """

    def status(self) -> dict[str, Tensor]:
        """0-d values on the device that are shown beside the losses."""

    def learning_rates(self) -> dict[str, float]:
        """The optimizers' learning rates by parameter group."""

    def evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Validation metrics, the same in all processes; None once ``stop()`` is true in one of them.

        Leaves the task as it was.
        """

    def score(self, metrics: dict[str, float]) -> float:
        """The score of ``best_metric`` that the best checkpoint is chosen by: higher is better."""

    def record(self, board: SummaryWriter, folder: Path, step: int) -> None:
        """Write images and histograms to TensorBoard and the run's folder; in the first process only."""

    def networks(self) -> dict[str, Any]:
        """The part of ``state_dict`` that using the networks, or starting from them, takes."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, in tensors and plain containers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``; the stage has been started."""


class Diverged(UsageError):
    """The loss is no longer a finite number."""


@dataclass
class Progress:
    """The loop's own part of a checkpoint, the same in all processes."""

    steps_per_epoch: int
    step: int = 0  # steps completed
    evaluated: int = 0  # the step of the last evaluation
    best: float = -float("inf")
    count: int = 0  # steps since the losses were logged


class Loop:
    """A run of a task.

    Args:
        task: what is trained.
        run: how often to log, to save, to evaluate.
        folder: where it is written.
        header: what the folder and checkpoints name the recipe with: ``recipe``, ``config``, and
            what the task describes.
        interrupt: stops the loop between two steps.

    Raises:
        UsageError: the stages have no steps.

    Attributes:
        progress: where the run stands.
        signal: that stopped the loop in whichever process received it, or 0.
    """

    def __init__(
        self, task: Task, run: RunSettings, folder: RunFolder, header: dict[str, Any], interrupt: Interrupt
    ) -> None:
        self.task, self.run_settings, self.folder = task, run, folder
        self.header, self.interrupt = header, interrupt
        self.ends = stage_ends(task.stages, task.steps_per_epoch)
        if self.ends[-1] == 0:
            raise UsageError("optim.stages must have steps in all, got none")
        self.total = min(self.ends[-1], run.steps or self.ends[-1])
        self.evaluate_every = run.evaluate_steps or run.evaluate_epochs * task.steps_per_epoch
        self.record_every = run.scales_steps or task.steps_per_epoch
        self.progress = Progress(task.steps_per_epoch)
        self.signal = 0
        self.first = distributed.rank() == 0
        self.sums: dict[str, Tensor] = {}  # this process's losses since the last log, on the device
        self.not_finite: Tensor | None = None  # the first step whose loss was not, or -1; on the device
        self.saved = time.monotonic()
        self.late = False  # whether a save is due by the first process's clock, the same in all of them

    def restore(self, contents: dict[str, Any]) -> None:
        """Take up where a checkpoint was written.

        Raises:
            UsageError: the data has changed in size.
        """
        self.progress = Progress(**contents["loop"])
        before, now = self.progress.steps_per_epoch, self.task.steps_per_epoch
        if before != now:
            raise UsageError(
                f"--resume: the data makes {now} steps per epoch, but {before} when the run began"
            )
        if self.progress.step > 0:
            # At a boundary this is the stage just completed: the next one starts in the loop.
            self._start_stage(self.progress.step - 1)
        self.task.load_state_dict(contents["task"])
        self._restore_own(contents["processes"])

    def _restore_own(self, saved: list[dict[str, Any]]) -> None:
        """Restore this process's own state; with another number of processes, the next best thing."""
        rank, step = distributed.rank(), self.progress.step
        if len(saved) == distributed.world_size():
            self.sums = saved[rank]["sums"]
            set_rng_state(saved[rank]["rng"])
            return
        now = distributed.world_size()
        log.warning("the run had %d processes and has %d now: dropout draws anew", len(saved), now)
        names = saved[0]["sums"]
        self.sums = {name: sum(own["sums"][name] for own in saved) / len(saved) for name in names}
        seed_all(process_seed(self.run_settings.seed, rank, step))

    def run(self) -> None:
        """Train until every stage is complete, or until interrupted; either way ``last.pt`` is the end.

        Raises:
            Diverged: the loss was not finite; ``last.pt`` is from before that.
            UsageError: a checkpoint or table cannot be written.
            DataError: an image is broken. ``last.pt`` has every step before it; of several processes, if it
                is an image of the evaluation.
        """
        start = self.progress.step
        with ExitStack() as stack:
            if self.first:
                self.folder.open(self.header, start, self.progress.evaluated)
                self.board = SummaryWriter(self.folder.path / "tensorboard", purge_step=start + 1)
                stack.enter_context(self.board)
            hidden = None if self.first else True  # None: shown on a terminal
            self.pace = Pace(self.task.device)
            self.bar = tqdm(total=self.total, initial=start, unit="step", disable=hidden, dynamic_ncols=True)
            stack.enter_context(self.bar)
            self._record_scales()
            self._restart_clock()
            while not self._stopped():
                if self._evaluation_due() and not self._evaluate():
                    continue
                if self.progress.step >= self.total:
                    break
                self._train_on()
            self._save()

    def _train_on(self) -> None:
        """Train to the next end of an epoch or stage, evaluation or signal."""
        progress, task = self.progress, self.task
        if progress.step == 0 or progress.step in self.ends:
            self._start_stage(progress.step)
        self.pace.start()
        for batch in self._batches():
            self._accumulate(task.step(batch, progress.step))
            self.bar.update()
            self._log_pace()
            self._record_scales()
            if progress.step % self.run_settings.log_steps == 0:
                self._log_losses()
            due, stopped = self._evaluation_due(), self._stopped()
            # Before an evaluation as well: a broken image in it must not cost the steps so far.
            if due or self.late or progress.step % self.run_settings.checkpoint_steps == 0:
                self._save()
                stopped = self._stopped()  # during a long save, say
            if stopped or progress.step in (self.total, *self.ends) or due:
                break

    def _batches(self) -> Iterator[Any]:
        """The rest of the epoch's; a broken image must not cost the steps so far."""
        step = self.progress.step
        try:
            yield from self.task.batches(*divmod(step, self.task.steps_per_epoch))
        except DataError:
            # One of several processes cannot save: the others are at the next step.
            if self.progress.step > 0 and distributed.world_size() == 1:
                self._save()
            raise

    def _start_stage(self, step: int) -> None:
        """Start the stage of a step."""
        index = bisect_right(self.ends, step)
        self.task.start_stage(index, self.ends[index - 1] if index else 0)

    def _stopped(self) -> bool:
        """Whether a process was told to stop; all of them get the same answer, and the same ``late``."""
        minutes = self.run_settings.checkpoint_minutes
        late = self.first and minutes is not None and time.monotonic() - self.saved >= 60 * minutes
        self.signal, anywhere = distributed.largest_each(self.interrupt.received or 0, late)
        self.late = anywhere > 0
        return self.signal > 0

    def _accumulate(self, losses: dict[str, Tensor]) -> None:
        """Count the step and its losses, without waiting for the device."""
        progress = self.progress
        if self.sums.keys() != losses.keys():
            # After a log there are none; a checkpoint of another version may lack some, and a mean of fewer
            # steps than were counted would be wrong.
            progress.count, self.sums = 0, {name: torch.zeros_like(value) for name, value in losses.items()}
        progress.step += 1
        progress.count += 1
        self.sums = {name: value + self.sums[name] for name, value in losses.items()}
        total = losses["loss"]
        if self.not_finite is None:
            self.not_finite = torch.full_like(total, -1, dtype=torch.long)
        first = (self.not_finite < 0) & ~torch.isfinite(total)
        self.not_finite = torch.where(first, progress.step, self.not_finite)

    def _log_losses(self) -> None:
        """Log the mean losses since the last log: the one place where training waits for the device."""
        self._check_finite()
        progress, task = self.progress, self.task
        means = distributed.mean(torch.stack(list(self.sums.values()))) / progress.count
        scalars = {f"loss/{name}": value for name, value in zip(self.sums, means, strict=True)}
        progress.count, self.sums = 0, {}
        if not self.first:
            return
        scalars |= task.status()
        values = dict(
            zip(scalars, torch.stack([v.float().cpu() for v in scalars.values()]).tolist(), strict=True)
        )
        self.folder.losses.append({"step": progress.step, **values})
        images = (progress.step - self.clock_step) * task.images_per_step
        speed = {"images_per_second": images / max(time.perf_counter() - self.clock, 1e-9)}
        if (peak := peak_memory(task.device)) is not None:
            speed["peak_memory_mib"] = peak / 2**20
        self.folder.speed.append({"step": progress.step, **speed})
        values |= speed
        values |= {f"learning_rate/{name}": rate for name, rate in task.learning_rates().items()}
        for name, value in values.items():
            self.board.add_scalar(name, value, progress.step)
        shown = {name: f"{values[f'loss/{name}']:.4g}" for name in task.shown}
        shown["images/s"] = f"{values['images_per_second']:.1f}"
        shown |= {name: f"{values[name]:.2%}" for name in task.status()}
        self.bar.set_postfix(shown)
        text = ", ".join(f"{name} {value}" for name, value in shown.items())
        log.log(logging.INFO if self.bar.disable else logging.DEBUG, "step %d: %s", progress.step, text)
        self._restart_clock()

    def _record_scales(self) -> None:
        """Record the scales where a record is due, before a checkpoint of the same step."""
        step = self.progress.step
        if self.first and (step % self.record_every == 0 or step == self.total):
            scales = scale_records.scales_of(self.task.network)
            scale_records.write_scales(self.folder.path, step, scales)

    def _log_pace(self) -> None:
        """Log once how long the rest of the run takes, evaluations aside, if there is a rest by then."""
        seconds, rest = self.pace.count(), self.total - self.progress.step
        if seconds is not None and rest > 0:
            text = "step %d: %.3g s a step, about %s to go, evaluations aside"
            log.info(text, self.progress.step, seconds, duration(rest * seconds))

    def _check_finite(self) -> None:
        step = -1 if self.not_finite is None else int(distributed.maximum(self.not_finite))
        if step >= 0:
            raise Diverged(
                f"the loss of step {step} is not a finite number; the last good checkpoint is "
                f"{self.folder.last_checkpoint() or 'none: this run had not written one'}"
            )

    def _evaluation_due(self) -> bool:
        step = self.progress.step
        return step > self.progress.evaluated and (step % self.evaluate_every == 0 or step == self.total)

    def _evaluate(self) -> bool:
        """Evaluate, record, keep the checkpoint if it is the best so far; False if interrupted meanwhile."""
        self._check_finite()
        progress = self.progress
        with preserved_rng():
            metrics = self.task.evaluate(lambda: bool(self.interrupt))
            if metrics is None:
                return False
            if self.first:
                self._record(metrics)
        score = self.task.score(metrics)
        best = score > progress.best
        progress.evaluated = progress.step
        if best:  # not max(), which may prefer a score that is not a number
            progress.best = score
        epoch, name = progress.step / self.task.steps_per_epoch, self.task.best_metric
        text = f"{name} {metrics[name]:.4f}{' (best)' if best else ''}"
        log.info("step %d, epoch %.2f: %s", progress.step, epoch, text)
        if best:
            self._save_best()
        self._save()
        self._restart_clock()
        return True

    def _record(self, metrics: dict[str, float]) -> None:
        """Write an evaluation's results down."""
        step = self.progress.step
        self.task.record(self.board, self.folder.path, step)
        for name, value in metrics.items():
            self.board.add_scalar(f"metrics/{name}", value, step)
        epoch = step / self.task.steps_per_epoch
        self.folder.metrics.append({"step": step, "epoch": epoch, **metrics})

    def _save(self) -> None:
        self._check_finite()
        sums = {name: value.cpu() for name, value in self.sums.items()}
        processes = distributed.gathered({"rng": rng_state(), "sums": sums})
        if self.first:
            contents = {"loop": vars(self.progress), "task": self.task.state_dict(), "processes": processes}
            checkpoint.save(self.folder.path / checkpoint.LAST, {**self.header, **contents})
            self.folder.keep(self.progress.step, self.run_settings.keep)
        self.saved = time.monotonic()

    def _save_best(self) -> None:
        """Save the networks without the state of their training, which no command but train uses."""
        if self.first:
            contents = {"loop": vars(self.progress), "task": self.task.networks()}
            checkpoint.save(self.folder.path / checkpoint.BEST, {**self.header, **contents})

    def _restart_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.progress.step
