"""A data set of procedural rooms, written in the ``nyu_cen`` layout."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from models.data.archives import write_bytes
from models.data.classes import NAMES_FILE
from models.data.images import DataError
from models.data.layout_file import LAYOUT_FILE
from models.data.scenes import CLASSES, DEPTH_SCALE, camera, render
from models.data.workers import start_worker

_RECORD = "synthetic.json"
_GENERATOR = 1  # raise it with every change of what the same parameters give


def prepare_synthetic(
    out: Path | str,
    *,
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Render ``train`` + ``val`` rooms of 11 classes (``models.data.scenes``) in the ``nyu_cen`` layout.

    Their camera, which is not NYUDv2's, is in ``layout.json``.

    The same parameters give the same files, whatever the number of processes; the images of one split do
    not depend on the length of the other. The folder appears under its name once it is complete; one that is
    there already, from the same parameters, is kept.

    Args:
        out: folder to make; its parents are made as well.
        train, val: images in each split.
        size: height and width.
        seed: not negative.
        processes: how many render at a time; None takes as many as there are processors.

    Returns:
        ``out`` as a Path.

    Raises:
        ValueError: an argument is out of range.
        DataError: ``out`` is there and holds something else, or cannot be made.
    """
    out = Path(out)
    parameters = {"train": train, "val": val, "height": size[0], "width": size[1], "seed": seed}
    check_parameters(parameters)
    record = {"generator": _GENERATOR, **parameters, "depth_scale": DEPTH_SCALE}
    names = {
        "train": [f"{i + 1:06d}" for i in range(train)],
        "val": [f"{train + i + 1:06d}" for i in range(val)],
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_finished(out, record, names)
        if not (out / LAYOUT_FILE).exists():
            with suppress(OSError):  # nothing is lost where it cannot be written
                write_bytes(out / LAYOUT_FILE, _layout(size).encode())
        print(f"{out}: already there, made with the same parameters; kept")
        return out
    partial_out = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    try:
        _make_folders(partial_out)
        _render_all(partial_out, names, size, seed, processes)
        for split, stems in names.items():
            (partial_out / f"{split}.txt").write_text("".join(f"{_line(stem)}\n" for stem in stems))
        (partial_out / NAMES_FILE).write_text("".join(f"{name}\n" for name in CLASSES))
        (partial_out / LAYOUT_FILE).write_text(_layout(size))
        (partial_out / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        partial_out.replace(out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return out


def check_parameters(parameters: dict[str, int]) -> None:
    """Check the arguments of a preparation of rooms by their names.

    Raises:
        ValueError: one is out of range.
    """
    for name, least in {"train": 1, "val": 1, "height": 16, "width": 16, "seed": 0}.items():
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {parameters[name]}")


def _check_finished(out: Path, record: dict[str, int], names: dict[str, list[str]]) -> None:
    """Raise unless ``out`` holds the files of this very record and no others."""
    path = out / _RECORD
    if not path.is_file():
        raise DataError(f"{out}: not empty, and no synthetic data set (no {_RECORD}); name another folder")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: broken ({error}); remove {out} to make the data set anew") from error
    if found != record:
        raise DataError(
            f"{out}: holds a data set of other parameters: {found}, asked for {record}; name another folder"
        )
    expected = {"train.txt", "val.txt", NAMES_FILE, _RECORD}
    expected.update(file for stems in names.values() for stem in stems for file in _line(stem).split("\t"))
    differing = expected ^ {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    differing.discard(LAYOUT_FILE)  # sets made before rooms told their camera have none
    if differing:
        raise DataError(
            f"{out / min(differing)}: missing or not of this data set, like {len(differing) - 1} other files;"
            f" remove {out} to make the data set anew"
        )


def _layout(size: tuple[int, int]) -> str:
    """The content of ``layout.json``: nyu_cen's own camera is NYUDv2's."""
    fx, fy, cx, cy, *_ = camera(size)
    return json.dumps({"base": "nyu_cen", "camera": [fx, fy, cx, cy]}, indent=2) + "\n"


def _make_folders(out: Path) -> None:
    try:
        for folder in ("rgb", "masks", "depth"):
            (out / folder).mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out.parent}: no folder can be made there ({error.strerror})") from None


def _line(stem: str) -> str:
    return f"rgb/{stem}.png\tmasks/{stem}.png\tdepth/{stem}.png"


def _render_all(
    out: Path, names: dict[str, list[str]], size: tuple[int, int], seed: int, processes: int | None
) -> None:
    jobs = [
        (stem, (seed, split, i)) for split, stems in enumerate(names.values()) for i, stem in enumerate(stems)
    ]
    work = partial(_render_one, out, size)
    workers = min(processes or os.cpu_count() or 1, len(jobs))
    with (
        multiprocessing.Pool(workers, start_worker) as pool,
        tqdm(total=len(jobs), desc="rendering rooms", unit="image", disable=None) as progress,
    ):
        for _ in pool.imap_unordered(work, jobs, chunksize=4):
            progress.update()


def _render_one(out: Path, size: tuple[int, int], job: tuple[str, tuple[int, int, int]]) -> None:
    stem, seed = job
    rgb, depth, labels = render(size, np.random.default_rng(seed))
    for folder, image in (("rgb", rgb[:, :, ::-1]), ("depth", depth), ("masks", labels)):
        path = out / folder / f"{stem}.png"
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
