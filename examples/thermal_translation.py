"""Color to heat on your own pairs: ``python examples/thermal_translation.py [FOLDER] [FIELD=VALUE ...]``.

FOLDER has aligned images of one name a view and ``layout.json``, as ``LAYOUT`` below; docs/data.md
describes its fields. Heat is made of colors and depth, which exchange channels. FIELD=VALUE are settings, as
``cen train`` takes them: pairs of colors and heat alone need ``data.domains=visible``, and
``data.domains=thermal data.target=visible`` turns them around. Without FOLDER views are made, in which red
things are warm but red paint on the wall is not, which depth alone can tell. Started again, it takes up where
it stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np

import models
from models.cli import main as cen
from models.data import DataError, TranslationSet
from models.training.errors import UsageError

MADE = Path("runs/thermal_translation")
LAYOUT = {
    "files": {
        "visible": "visible/{split}/{name}.png",
        "depth": "depth/{split}/{name}.png",  # uint16, millimeters; 0 is missing
        "thermal": "thermal/{split}/{name}.png",  # uint16, hundredths of a kelvin; 0 is missing
    },
    "lists": "",  # a view for every file of the first kind
    "depth_scale": 1000,
    "modalities": {
        "visible": {"kind": "color"},
        "thermal": {"kind": "intensity", "range": [28800, 31200], "missing": [0]},
    },
}
# U-Nets for images that are halved six times. For photographs rather: data.resize=286 data.crop=256
# model.size=256 model.base_width=64 model.discriminator_width=64 optim.stages.0.steps=100000.
SMALL = "data.domains=visible,depth data.target=thermal optim.stages.0.steps=400 run.log_steps=50"


def make_set(root: Path, counts: dict[str, int], size: tuple[int, int] = (72, 96)) -> None:
    """Write views, so many a split, of disks: things before the wall, and paint on it, red or blue."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name in range(count):
            color = np.full((*size, 3), 140.0)
            depth, heat = np.full(size, 3000.0), np.full(size, 29300.0)  # 20 degrees Celsius
            for solid, red in ((False, False), (False, True), (True, False), (True, True)):
                disk = np.zeros(size, np.uint8)
                column, row = rng.integers(0, size[1]), rng.integers(0, size[0])
                cv2.circle(disk, (int(column), int(row)), int(rng.integers(12, 22)), 1, -1)
                color[disk > 0] = (50, 60, 200) if red else (200, 90, 50)  # blue first, as OpenCV writes
                depth[disk > 0] = 1500 if solid else 3000
                heat[disk > 0] = 30700 if solid and red else 29300
            images = (color + rng.normal(0, 8, color.shape), depth + rng.normal(0, 20, size), heat)
            types = (np.uint8, np.uint16, np.uint16)
            for template, image, dtype in zip(LAYOUT["files"].values(), images, types, strict=True):
                path = root / template.format(split=split, name=name)
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image.astype(dtype))
    (root / "layout.json").write_text(json.dumps(LAYOUT, indent=2))


def main(root: Path, *settings: str) -> int:
    """Train, evaluate, and write what the generator makes of the first validation view; the exit code."""
    run = Path("runs") / f"{root.resolve().name}_run"
    train = ["train", "synthetic_translation_demo", f"data.root={root}", *SMALL.split(), *settings]
    goes_on = ["--resume", f"{run}"] if (run / "last.pt").is_file() else [f"run.output={run}"]
    for words in ([*train, *goes_on], ["evaluate", f"{run}"]):
        print(f"\n$ cen {shlex.join(words)}", flush=True)
        if code := cen(words):
            return code
    trained = models.load(run)
    data = trained.recipe.data
    views = TranslationSet(data.root, "val", domains=data.domains, target=data.target, lists=data.lists)
    files = views.files(0)
    found = trained.predict(**{domain: files[domain] for domain in data.domains})
    for which in found:  # each domain's branch, and the ensemble, as the target's files are stored
        found.write(run / "predicted", files[data.target].stem, which)
        print(f"{which}: {found[which].dtype} {found[which].min()} to {found[which].max()}")
    print(f"written: {run / 'predicted'}; the sheet beside the scores shows more views")
    return 0


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:] if "=" not in word]
    try:
        if not given and not (MADE / "layout.json").is_file():
            make_set(MADE, {"train": 60, "val": 12})
        sys.exit(main(*given or [MADE], *(word for word in sys.argv[1:] if "=" in word)))
    except (DataError, UsageError) as error:
        sys.exit(f"error: {error}")
