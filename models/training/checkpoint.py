"""Checkpoints: one file of tensors and plain containers, loaded with ``weights_only=True``.

Contents: ``format``; ``recipe``, the recipe's name; ``config``, its settings (``config.to_plain``); ``loop``,
the loop's progress; ``task``, networks and optimisers; ``rng``, the generators' states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.messages import first_line
from models.training import config, registry
from models.training.errors import UsageError, existing
from models.training.files import replacing

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint; the file at ``path`` is the old one or the new one, never a part."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **contents}, temporary)


def load(path: Path, prefer: str = LAST) -> tuple[Path, dict[str, Any]]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a checkpoint, or a run folder.
        prefer: which one of a run folder; the other where this is missing.

    Returns:
        The checkpoint's path and contents.

    Raises:
        UsageError: nothing there, or not a checkpoint of this project.
    """
    existing(path, "checkpoint")
    if path.is_dir():
        found = [path / name for name in (prefer, LAST, BEST) if (path / name).is_file()]
        if not found:
            raise UsageError(f"checkpoint: the folder {path} holds neither {LAST} nor {BEST}")
        path = found[0]
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own errors on foreign bytes are of every kind
        raise UsageError(f"checkpoint: {path} is broken or no checkpoint ({first_line(error)})") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UsageError(
            f"checkpoint: {path} was not written by `python -m models train`, or by another version"
        )
    return path, contents


def system(path: Path) -> registry.System:
    """What the commands do for the kind of network in a checkpoint or run folder.

    Raises:
        UsageError: as ``load``.
    """
    _, contents = load(path)
    return registry.find(contents["recipe"]).system


def settings(contents: dict[str, Any]) -> Any:
    """The recipe's settings as the checkpoint's run had them."""
    return config.from_plain(registry.find(contents["recipe"]), contents["config"])
