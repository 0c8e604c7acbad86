"""A generated set of aligned color and thermal images, as a camera pair's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZE = (300, 400)
RANGE = (27000, 31000)  # centikelvin
LAYOUT: dict[str, Any] = {
    "files": {"visible": "visible/{split}/{name}.jpg", "thermal": "thermal/{split}/{name}_ir.png"},
    "lists": "",
    "modalities": {
        "visible": {"kind": "color"},
        "thermal": {"kind": "intensity", "range": list(RANGE), "missing": [0]},
    },
}


def prepare_pairs(folder: Path, size: tuple[int, int] = SIZE, **fields: Any) -> Path:
    """Four pairs to train on, two to evaluate on: warm ellipses before a wall, red where they are warm.

    The thermal images have 16 bits, and a corner in which nothing was measured.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("visible", "thermal"):
            (folder / name / split).mkdir(parents=True)
        for index in range(count):
            warmth = np.full(size, 0.2, np.float32)
            for _ in range(6):
                center = [int(rng.integers(length)) for length in size[::-1]]
                axes = [int(rng.integers(size[0] // 16, size[0] // 4)) for _ in range(2)]
                cv2.ellipse(warmth, center, axes, 0, 0, 360, float(rng.uniform(0.3, 1)), -1)
            visible = np.dstack([50 + 0 * warmth, 200 * (1 - warmth), 60 + 190 * warmth]).astype(np.uint8)
            thermal = np.rint(RANGE[0] + (RANGE[1] - RANGE[0]) * warmth).astype(np.uint16)
            thermal[: size[0] // 8, : size[1] // 8] = 0
            assert cv2.imwrite(str(folder / "visible" / split / f"{index}.jpg"), visible)
            assert cv2.imwrite(str(folder / "thermal" / split / f"{index}_ir.png"), thermal)
    (folder / "layout.json").write_text(json.dumps({**LAYOUT, **fields}))
    return folder


def thermal_kelvin(path: Path) -> np.ndarray:
    """A thermal file, missing values as NaN."""
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float64)
    stored[stored == 0] = np.nan
    return stored
