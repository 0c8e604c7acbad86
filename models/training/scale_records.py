"""Records of the scales γ in a run's folder: how they moved in training, ``scales/step_000500.safetensors``.

A record holds a float32 tensor ``[M, C]`` for each exchange point of the network that trains, not of its
average, under the norm's name in it: ``models.networks.fusion.exchange_points``, of networks that exchange
nothing as well. In translation the network is the generator.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.networks.fusion import named_exchange_points
from models.networks.messages import first_line
from models.training import checkpoint
from models.training.errors import UsageError
from models.training.files import remove_leftovers

FOLDER = "scales"
_NUMBERED = re.compile(r"step_(\d{6,})\.safetensors")


def scales_of(net: nn.Module) -> dict[str, Tensor]:
    """The scales of a network's exchange points, ``[M, C]`` each, detached, on the network's device."""
    return {name: point.weight.detach() for name, point in named_exchange_points(net).items()}


def write_scales(run: Path, step: int, scales: dict[str, Tensor]) -> None:
    """Record the scales after a step; nothing is written where there are none.

    Args:
        run: the folder of the run.
        step: 0 before the first one.
        scales: as ``scales_of`` returns them.

    Raises:
        UsageError: the file cannot be written.
    """
    if not scales:
        return
    path = run / FOLDER / f"step_{step:06d}.safetensors"
    with checkpoint.writing(path) as temporary:
        path.parent.mkdir(exist_ok=True)
        save_file({name: table.to("cpu", torch.float32) for name, table in scales.items()}, temporary)


def read_scales(run: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """Read the records of a run.

    Args:
        run: its folder.

    Returns:
        Steps, ascending, and the scales after them, ``[M, C]`` float32 by the names of the norms. Empty where
        there are none, as in runs of earlier versions.

    Raises:
        UsageError: a file is broken.
    """
    return [(step, _read(path)) for step, path in _numbered(run).items()]


def keep_records(run: Path, last_step: int) -> None:
    """Remove the records of later steps, which a run has gone back on, and what a killed one left behind.

    Raises:
        UsageError: a file cannot be removed.
    """
    remove_leftovers(run / FOLDER / "step_*.safetensors")
    for step, path in _numbered(run).items():
        if step > last_step:
            try:
                path.unlink()
            except OSError as error:
                raise UsageError(f"cannot remove {path}: {error.strerror}") from None


def _numbered(run: Path) -> dict[int, Path]:
    """The records' files by their steps, in that order."""
    matches = [(_NUMBERED.fullmatch(path.name), path) for path in (run / FOLDER).glob("step_*.safetensors")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UsageError(f"{path} is broken or no record of scales ({reason}): remove it") from None
