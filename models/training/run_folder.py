"""A run's folder: settings, versions, log, tables of losses and metrics, checkpoints, events."""

from __future__ import annotations

import logging
import platform
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
from models.training import checkpoint
from models.training.errors import UsageError
from models.training.files import Table, write_json

_LOG = logging.getLogger("models")


class RunFolder:
    """``config.json environment.json log.txt losses.csv metrics.csv last.pt best.pt tensorboard/``.

    Args:
        path: the folder; made if it is not there.
        header: the recipe's name and settings, for ``config.json``.
        resume: whether the folder may hold a run already.

    Raises:
        UsageError: the folder holds a run and this one is not its continuation; a file is in the way.
    """

    losses: Table
    metrics: Table

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        self.path = path
        if self.last_checkpoint() and not resume:
            raise UsageError(
                f"run.output: {path} holds a run already; continue it with --resume, or choose another folder"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run.output: cannot make the folder {path}: {error.strerror}") from None
        write_json(path / "config.json", header)
        write_json(path / "environment.json", environment())

    def open_tables(self, last_step: int) -> None:
        """Open the tables of losses and metrics, keeping their rows up to ``last_step``."""
        self.losses = Table(self.path / "losses.csv", last_step)
        self.metrics = Table(self.path / "metrics.csv", last_step)

    def last_checkpoint(self) -> Path | None:
        """The run's last checkpoint, if there is one."""
        path = self.path / checkpoint.LAST
        return path if path.is_file() else None


def default_output(recipe: str) -> Path:
    """``runs/<recipe>/<time>``."""
    return Path("runs") / recipe / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def environment() -> dict[str, Any]:
    """What ran, for the record: command, versions, machine."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cen_ext": cen_ext.__version__,
        "backends": cen_ext.available_backends(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
    }


class _Console(logging.Handler):
    """Log lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the project's log to the console and, in full, to a file."""
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
