"""Train on your own three modalities: ``python examples/three_modalities.py [FOLDER] [FIELD=VALUE ...]``.

FOLDER has files of one name a scene for each modality and for the label maps (gray values: the class, 255
where there is none), ``train.txt`` and ``val.txt`` with a name a line, and ``layout.json``, which says what
is stored where, as ``LAYOUT`` does; docs/data.md describes its fields. Without FOLDER a small set is
made, in which each sensor sees one thing: color the poster, depth the box, heat the pipe. FIELD=VALUE are
settings, as ``cen train`` takes them. Started again, it takes up where it stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np

from models.cli import main as cen
from models.data import DataError, SegmentationSet, find_layout

MADE = Path("runs/three_modalities")
LAYOUT = {
    "files": {
        "rgb": "color/{name}.png",
        "depth": "depth/{name}.png",  # uint16, millimeters; 0 is missing
        "thermal": "thermal/{name}.tiff",  # float32, degrees Celsius; NaN is missing
        "labels": "labels/{name}.png",
    },
    "classes": ["wall", "poster", "box", "pipe"],
    "depth_scale": 1000,
    "modalities": {"thermal": {"kind": "intensity", "range": [15, 40]}},
}
# For photographs rather: data.shorter_side=480 data.crop=480 model.encoder=resnet50 model.weights=FILE.
SMALL = (
    "model.network=light_refinenet data.batch_size=4 data.shorter_side=64 data.crop=64 run.steps=300 "
    "loss.sparsity=5e-3"
)


def make_set(root: Path, counts: dict[str, int], size: tuple[int, int] = (64, 80)) -> None:
    """Write scenes, so many a split, of which each thing but the wall shows in one modality alone."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        names = [f"{split}_{number}" for number in range(count)]
        for name in names:
            labels = np.zeros(size, np.uint8)
            for label, (height, width) in enumerate(((28, 36), (28, 28), (64, 12)), 1):
                top, left = rng.integers(0, np.subtract(size, (height, width)) + 1)
                labels[top : top + height, left : left + width] = label
            wall, poster = rng.integers(50, 110, 3), rng.integers(140, 200, 3)
            color = np.where((labels == 1)[..., None], poster, wall) + rng.normal(0, 8, (*size, 3))
            depth = np.where(labels == 2, 2500, 3000) + rng.normal(0, 30, size)
            heat = np.where(labels == 3, 30, 20) + rng.normal(0, 1, size)
            images = (color.astype(np.uint8), depth.astype(np.uint16), heat.astype(np.float32), labels)
            for template, image in zip(LAYOUT["files"].values(), images, strict=True):
                path = root / template.format(name=name)
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
        (root / f"{split}.txt").write_text("\n".join(names))
    (root / "layout.json").write_text(json.dumps(LAYOUT, indent=2))


def main(root: Path, *settings: str) -> int:
    """Look at the data, train, evaluate, and predict a scene; the exit code."""
    layout, run = find_layout(root), Path("runs") / f"{root.resolve().name}_run"
    if not layout.classes:
        raise DataError(f'{root}: expected the classes\' names, "classes", in layout.json')
    modalities = [kind for kind in layout.files if kind not in ("labels", "camera")]
    count = len(layout.classes)
    scene = SegmentationSet(root, "val", modalities=modalities, num_classes=count).scenes[0]
    data = [f"data.root={root}", f"data.modalities={','.join(modalities)}", f"data.num_classes={count}"]
    goes_on = ["--resume", f"{run}"] if (run / "last.pt").is_file() else [f"run.output={run}"]
    inputs = [word for kind in modalities for word in ("--input", f"{kind}={scene[kind]}")]
    for words in (
        ["data", "synthetic_demo", *data, *SMALL.split(), "--output", f"{run}_samples.png"],
        ["train", "synthetic_demo", *data, *SMALL.split(), *settings, *goes_on],
        ["evaluate", f"{run}"],
        ["predict", f"{run}", *inputs, "--output", f"{run}/predicted"],
    ):
        print(f"\n$ cen {shlex.join(words)}", flush=True)
        if code := cen(words):
            return code
    return 0


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:] if "=" not in word]
    try:
        if not given and not (MADE / "layout.json").is_file():
            make_set(MADE, {"train": 60, "val": 12})
        sys.exit(main(*given or [MADE], *(word for word in sys.argv[1:] if "=" in word)))
    except DataError as error:
        sys.exit(f"error: {error}")
