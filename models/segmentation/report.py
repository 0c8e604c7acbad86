"""The results of an evaluation by class: as a table of text, as JSON and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import isnan
from pathlib import Path

from models.segmentation.metrics import SegmentationMetrics
from models.training.files import replacing

SHARE = "share of pixels"

ClassRows = dict[str, dict[str, float | None]]


def class_rows(counts: SegmentationMetrics, class_names: Sequence[str]) -> ClassRows:
    """By class its share of the pixels that count and its IoU in every output, as fractions.

    The IoU is None for a class that is neither in the truth nor in the output.
    """
    columns = {SHARE: counts.class_shares(), **{name: counts.class_iou(name) for name in counts.names}}
    return {
        label: {column: None if isnan(values[index]) else values[index] for column, values in columns.items()}
        for index, label in enumerate(class_names)
    }


def class_table(rows: ClassRows) -> str:
    """The rows as aligned text, in per cent; ``-`` where there is no IoU."""
    columns = list(next(iter(rows.values())))
    width = max(map(len, ("IoU", *rows)))
    widths = [max(7, len(column)) for column in columns]

    def line(label: str, cells: Sequence[str]) -> str:
        return f"{label:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    body = [line(label, [shown(row[column]) for column in columns]) for label, row in rows.items()]
    return "\n".join([line("IoU", columns), *body])


def write_class_csv(path: Path, rows: ClassRows) -> None:
    """Write the rows as CSV, a class a line; nothing where there is no IoU."""
    columns = list(next(iter(rows.values())))
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["class", *columns])
        writer.writeheader()
        writer.writerows({"class": label, **row} for label, row in rows.items())
