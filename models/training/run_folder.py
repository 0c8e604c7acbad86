"""A run's folder: settings, versions, log, tables of losses, speed and metrics, checkpoints, events."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cen_ext
from models.training import checkpoint, distributed, scale_records
from models.training.errors import UsageError
from models.training.files import Table, remove_leftovers, write_json

_LOG = logging.getLogger("models")
ENVIRONMENT = "environment.json"
LOSSES, SPEED, METRICS = "losses.csv", "speed.csv", "metrics.csv"
_WRITTEN = (
    *(checkpoint.CONFIG, ENVIRONMENT, LOSSES, SPEED, METRICS),
    *(checkpoint.LAST, checkpoint.BEST, "step_*.pt"),
)


class RunFolder:
    """``config.json environment.json log.txt losses.csv speed.csv metrics.csv last.pt best.pt tensorboard/``.

    ``scales/`` holds the records of ``scale_records``. With ``run.keep``, ``step_001500.pt`` and so on
    are further names of what has been ``last.pt``.
    ``speed.csv`` stands apart from the losses, which are the same whenever a run is repeated.

    Args:
        path: the folder.
        resume: whether the run in the folder is the one that goes on.

    Raises:
        UsageError: the folder holds another run.
    """

    losses: Table
    speed: Table
    metrics: Table

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        if self.last_checkpoint() and not resume:
            raise UsageError(
                f"run.output: {path} holds a run already; continue it with --resume, or choose another folder"
            )

    def make(self) -> None:
        """Make the folder if it is not there.

        Raises:
            UsageError: a file is in the way, or no folder can be made there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run.output: cannot make the folder {self.path}: {error.strerror}") from None

    def open(self, header: dict[str, Any], last_step: int, last_evaluation: int) -> None:
        """Make the folder, write what runs, remove a killed run's leftovers; open the tables.

        Args:
            header: the recipe's name and settings, for ``config.json``.
            last_step: up to which the tables of losses and speed keep their rows, and the records of scales.
            last_evaluation: the same of metrics; a run may have been killed between writing a row and saving.

        Raises:
            UsageError: as ``make``.
        """
        self.make()
        for name in _WRITTEN:
            remove_leftovers(self.path / name)
        write_json(self.path / checkpoint.CONFIG, header)
        write_json(self.path / ENVIRONMENT, environment())
        scale_records.keep_records(self.path, last_step)
        self.losses = Table(self.path / LOSSES, last_step)
        self.speed = Table(self.path / SPEED, last_step)
        self.metrics = Table(self.path / METRICS, last_evaluation)

    def keep(self, step: int, count: int) -> None:
        """Keep what ``last.pt`` now is under the name of its step; remove all but the latest ``count``.

        Raises:
            UsageError: a file cannot be written or removed.
        """
        if count:
            checkpoint.link(self.path / checkpoint.LAST, checkpoint.numbered_path(self.path, step))
            self._remove(list(checkpoint.numbered(self.path).values())[:-count])

    def go_back(self, source: Path, step: int, count: int) -> bool:
        """Make a checkpoint of the run the last one: those of later steps are of a training given up.

        Killed in between, the run resumes from where it came from or from that checkpoint.

        Args:
            source: the checkpoint, in this folder; it may be the last one already.
            step: its step.
            count: as for ``keep``.

        Returns:
            Whether there is no ``best.pt``, because it was of a later step, and the next evaluation is to
            make one.

        Raises:
            UsageError: as ``keep``.
        """
        last, best = self.path / checkpoint.LAST, self.path / checkpoint.BEST
        if source.resolve() != last.resolve():
            before = checkpoint.step_of(last)
            if before is not None and before > step:
                _LOG.warning(
                    "%s is of step %d: checkpoints and tables' rows after step %d are dropped; with "
                    "run.output=FOLDER they would have stayed",
                    *(last, before, step),
                )
            checkpoint.link(source, last)
        self._remove([path for number, path in checkpoint.numbered(self.path).items() if number > step])
        of_best = checkpoint.step_of(best)
        if of_best is not None and of_best > step:
            _LOG.warning("%s is of step %d and dropped; the next evaluation makes another", best, of_best)
            self._remove([best])
        self.keep(step, count)
        return not best.is_file()

    def _remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            try:
                path.unlink()
            except OSError as error:
                raise UsageError(f"cannot remove {path}: {error.strerror}") from None

    def last_checkpoint(self) -> Path | None:
        """The run's last checkpoint, if there is one."""
        kept = checkpoint.numbered(self.path).values() if self.path.is_dir() else ()
        found = [path for path in (self.path / checkpoint.LAST, *reversed(list(kept))) if path.is_file()]
        return found[0] if found else None


def default_output(recipe: str) -> Path:
    """``runs/<recipe>/<time>``; ``module:function`` has a dot for its colon, which some systems refuse."""
    return Path("runs") / recipe.replace(":", ".") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def environment() -> dict[str, Any]:
    """A record of what ran: command, versions, machine."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cen_ext": cen_ext.__version__,
        "git": _git_revision(),
        "backends": cen_ext.available_backends(),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
    }


def _git_revision() -> str | None:
    """The commit that runs, ``-dirty`` if changed since; None where the code is in no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


class _Console(logging.Handler):
    """Log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the project's log to the console and, in full, to a file; that of the first process only."""
    handlers: tuple[logging.Handler, ...] = (logging.NullHandler(),)
    if distributed.rank() == 0:
        file = logging.FileHandler(path, delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers = (file, _Console(logging.INFO))
    _LOG.setLevel(logging.DEBUG)
    for handler in handlers:
        _LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _LOG.removeHandler(handler)
            handler.close()
