"""Copies of a run's tables with other contents, which take no training."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TABLES = ("config.json", "environment.json", "losses.csv", "speed.csv", "metrics.csv")


def copy(
    run: Path,
    folder: Path,
    settings: dict[str, Any] | None = None,
    metrics: Callable[[list[dict[str, str]]], list[dict[str, str]]] = list,
) -> Path:
    """A run's tables without its checkpoints, some settings and the table of metrics changed."""
    folder.mkdir()
    for name in TABLES:
        shutil.copy(run / name, folder / name)
    header = json.loads((folder / "config.json").read_text())
    for path, value in (settings or {}).items():
        group, _, name = path.partition(".")
        header["config"][group][name] = value
    (folder / "config.json").write_text(json.dumps(header))
    with (run / "metrics.csv").open(newline="") as file:
        rows = metrics(list(csv.DictReader(file)))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def shifted(by: float) -> Callable[[list[dict[str, str]]], list[dict[str, str]]]:
    """Metrics of every evaluation, larger by that."""
    kept = ("step", "epoch")
    return lambda rows: [
        {name: cell if name in kept else str(float(cell) + by) for name, cell in row.items()} for row in rows
    ]
