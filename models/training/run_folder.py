"""A run's folder: settings, versions, log, tables of losses, speed and metrics, checkpoints, events."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cen_ext
from models.training import checkpoint, distributed
from models.training.errors import UsageError
from models.training.files import Table, remove_leftovers, write_json

_LOG = logging.getLogger("models")
ENVIRONMENT = "environment.json"
LOSSES, SPEED, METRICS = "losses.csv", "speed.csv", "metrics.csv"
_WRITTEN = (
    *(checkpoint.CONFIG, ENVIRONMENT, LOSSES, SPEED, METRICS),
    *(checkpoint.LAST, checkpoint.BEST),
)


class RunFolder:
    """``config.json environment.json log.txt losses.csv speed.csv metrics.csv last.pt best.pt tensorboard/``.

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
            last_step: up to which the tables of losses and speed keep their rows.
            last_evaluation: the same of metrics; a run may have been killed between writing a row and saving.

        Raises:
            UsageError: as ``make``.
        """
        self.make()
        for name in _WRITTEN:
            remove_leftovers(self.path / name)
        write_json(self.path / checkpoint.CONFIG, header)
        write_json(self.path / ENVIRONMENT, environment())
        self.losses = Table(self.path / LOSSES, last_step)
        self.speed = Table(self.path / SPEED, last_step)
        self.metrics = Table(self.path / METRICS, last_evaluation)

    def last_checkpoint(self) -> Path | None:
        """The run's last checkpoint, if there is one."""
        path = self.path / checkpoint.LAST
        return path if path.is_file() else None


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
