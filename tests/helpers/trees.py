"""Small folders in every layout of segmentation data, written without the description that readers use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

SIZE = (48, 64)
COUNTS = {"train": 3, "val": 2}


class Scene(NamedTuple):
    """The sample that is expected."""

    rgb: np.ndarray  # [H, W, 3] uint8, red first
    depth: np.ndarray  # [H, W] float64 in metres, whole millimetres, 0 where missing
    classes: np.ndarray  # [H, W], -1 for void


class Tree(NamedTuple):
    """A folder and what is in it."""

    root: Path
    num_classes: int
    scenes: dict[str, list[Scene]]
    modalities: tuple[str, ...]


def scene(seed: int, num_classes: int) -> Scene:
    """Soft colours, a slanted floor with a hole, blocks of classes."""
    rng = np.random.default_rng(seed)
    rgb = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    depth = np.rint(1000 * (4 - 0.05 * rows + 0.005 * columns * rng.uniform(0.5, 1.5))) / 1000
    depth[:5, :7] = 0
    classes = np.kron(rng.integers(-1, num_classes, (6, 8)), np.ones((8, 8), int))
    classes[0, :2] = -1, num_classes - 1
    return Scene(rgb, depth, classes)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = image[:, :, ::-1] if image.ndim == 3 else image
    quality = [cv2.IMWRITE_JPEG_QUALITY, 100] if path.suffix == ".jpg" else []
    assert cv2.imwrite(str(path), stored, quality)


def void_255(classes: np.ndarray) -> np.ndarray:
    return np.where(classes < 0, 255, classes).astype(np.uint8)


def void_0(classes: np.ndarray) -> np.ndarray:
    return (classes + 1).astype(np.uint8)


def units(depth: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(scale * depth).astype(np.uint16)


def rotated(depth: np.ndarray) -> np.ndarray:
    """Millimetres as SUN RGB-D stores them: rotated by three bits to the left."""
    millimetres = units(depth, 1000).astype(np.uint32)
    return ((millimetres << 3 | millimetres >> 13) & 0xFFFF).astype(np.uint16)


def grey(depth: np.ndarray) -> np.ndarray:
    return np.rint(depth / 5 * 255).astype(np.uint8)


def _scenes(num_classes: int) -> dict[str, list[Scene]]:
    return {
        split: [scene(100 * k + i, num_classes) for i in range(count)]
        for k, (split, count) in enumerate(COUNTS.items())
    }


def nyu_cen(root: Path) -> Tree:
    scenes = _scenes(40)
    number = 0
    for split, those in scenes.items():
        lines = []
        for one in those:
            number += 1
            names = [f"{folder}/{number:06d}.png" for folder in ("rgb", "masks", "depth")]
            for name, image in zip(
                names, (one.rgb, void_255(one.classes), units(one.depth, 5000)), strict=True
            ):
                write(root / name, image)
            lines.append("\t".join(names))
        (root / f"{split}.txt").write_text("\n".join(lines))
    return Tree(root, 40, scenes, ("rgb", "depth"))


def nyu_lwrf(root: Path) -> Tree:
    scenes = _scenes(40)
    for split, those in scenes.items():
        lines = []
        for i, one in enumerate(those):
            write(root / f"{split}_images/{i:06d}.png", one.rgb)
            write(root / f"{split}_labels/{i:06d}.png", void_255(one.classes))
            lines.append(f"{split}_images/{i:06d}.png\t{split}_labels/{i:06d}.png\n")
        (root / f"{split}.nyu").write_text("".join(lines))
    return Tree(root, 40, scenes, ("rgb",))


def nyu_rgbx(root: Path) -> Tree:
    scenes = _scenes(40)
    number = 0
    for split, those in scenes.items():
        lines = []
        for one in those:
            number += 1
            write(root / f"RGB/{number}.jpg", one.rgb)
            write(root / f"HHA/{number}.jpg", one.rgb[::-1])
            write(root / f"Depth/{number}.png", grey(one.depth))
            write(root / f"Label/{number}.png", void_0(one.classes))
            lines.append(f"{number}\n")
        (root / f"{'test' if split == 'val' else split}.txt").write_text("".join(lines))
    return Tree(root, 40, scenes, ("rgb", "hha"))


def _dformer(root: Path, labels: str, num_classes: int) -> Tree:
    scenes = _scenes(num_classes)
    number = 0
    for split, those in scenes.items():
        lines = []
        for one in those:
            number += 1
            write(root / f"RGB/{number:04d}.jpg", one.rgb)
            write(root / f"Depth/{number:04d}.png", grey(one.depth))
            write(root / f"{labels}/{number:04d}.png", void_0(one.classes))
            lines.append(f"RGB/{number:04d}.jpg {labels}/{number:04d}.png\n")
        (root / f"{'test' if split == 'val' else split}.txt").write_text("".join(lines))
    return Tree(root, num_classes, scenes, ("rgb", "depth"))


def nyu_dformer(root: Path) -> Tree:
    return _dformer(root, "Label", 40)


def sun_dformer(root: Path) -> Tree:
    return _dformer(root, "labels", 37)


def nyu_esanet(root: Path) -> Tree:
    scenes = _scenes(40)
    number = 0
    for split, those in scenes.items():
        folder, lines = "test" if split == "val" else split, []
        for one in those:
            number += 1
            write(root / f"{folder}/rgb/{number:04d}.png", one.rgb)
            write(root / f"{folder}/depth/{number:04d}.png", units(one.depth, 1000))
            write(root / f"{folder}/depth_raw/{number:04d}.png", units(one.depth, 1000))
            write(root / f"{folder}/labels_40/{number:04d}.png", void_0(one.classes))
            lines.append(f"{number:04d}\n")
        (root / f"{folder}.txt").write_text("".join(lines))
    return Tree(root, 40, scenes, ("rgb", "depth"))


def sun_handa(root: Path) -> Tree:
    scenes = _scenes(37)
    for split, folder, first in (("train", "train", 5050), ("val", "test", 0)):
        for i, one in enumerate(scenes[split], 1):
            write(root / f"SUNRGBD-{folder}_images/img-{i:06d}.jpg", one.rgb)
            write(root / f"sunrgbd_{folder}_depth/{i}.png", units(one.depth, 10000))
            write(root / f"sunrgbd_train_test_labels/img-{first + i:06d}.png", void_0(one.classes))
    return Tree(root, 37, scenes, ("rgb", "depth"))


def sun_original(root: Path) -> Tree:
    scenes = _scenes(37)
    for split, those in scenes.items():
        lists: dict[str, list[str]] = {"rgb": [], "depth": [], "label": []}
        for i, one in enumerate(those):
            base = f"kv{1 + i % 2}/some data/{split}{i:03d}"
            for kind, name in (
                ("rgb", "image/0.jpg"),
                ("depth", "depth_bfx/0.png"),
                ("label", "label/label.npy"),
            ):
                lists[kind].append(f"{base}/{name}\n")
            folder = root / "SUNRGBD" / base
            write(folder / "image/0.jpg", one.rgb)
            write(folder / "depth_bfx/0.png", rotated(one.depth))
            (folder / "label").mkdir()
            np.save(folder / "label/label.npy", void_0(one.classes))
            (folder / "intrinsics.txt").write_text("60 0 32 \n0 60 24 \n0 0 1 \n")
        name = "test" if split == "val" else split
        for kind, lines in lists.items():
            (root / f"{name}_{kind}.txt").write_text("".join(lines))
    return Tree(root, 37, scenes, ("rgb", "depth"))


CITYSCAPES_LABELS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
FOCAL, BASELINE = 60.0, 0.25


def cityscapes(root: Path) -> Tree:
    scenes = _scenes(19)
    for split, those in scenes.items():
        for i, one in enumerate(those):
            name = f"{split}/aachen/aachen_{i:06d}_000019"
            disparity = np.divide(FOCAL * BASELINE, one.depth, out=np.zeros(SIZE), where=one.depth > 0)
            stored = np.where(one.depth > 0, np.rint(256 * disparity) + 1, 0).astype(np.uint16)
            labels = np.array([*CITYSCAPES_LABELS, 4])[one.classes]  # 4 is static: void
            write(root / f"leftImg8bit/{name}_leftImg8bit.png", one.rgb)
            write(root / f"disparity/{name}_disparity.png", stored)
            write(root / f"gtFine/{name}_gtFine_labelIds.png", labels.astype(np.uint8))
            camera = {
                "extrinsic": {"baseline": BASELINE, "pitch": 0.05},
                "intrinsic": {"fx": FOCAL, "fy": FOCAL, "u0": 31.5, "v0": 23.5},
            }
            path = root / f"camera/{name}_camera.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(camera))
    return Tree(root, 19, scenes, ("rgb", "depth"))


TREES: dict[str, Callable[[Path], Tree]] = {
    make.__name__: make
    for make in (
        nyu_cen,
        nyu_lwrf,
        nyu_rgbx,
        nyu_dformer,
        sun_dformer,
        nyu_esanet,
        sun_handa,
        sun_original,
        cityscapes,
    )
}
