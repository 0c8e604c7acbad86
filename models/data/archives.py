"""Official archives to data sets: what the preparations have in common."""

from __future__ import annotations

import importlib
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from models.data.images import DataError
from models.data.workers import start_worker

_RECORD = "prepared.json"


def required(module: str) -> Any:
    """A module of the optional extra ``prepare``.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{module} is needed to read the official archives: pip install 'cen_ext[prepare]'"
        ) from error


def existing_file(path: Path, what: str) -> Path:
    """The path, if a file is there.

    Raises:
        DataError: none is.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {what}")
    return path


def open_hdf5(path: Path) -> Any:
    """An HDF5 file (MATLAB 7.3), open for reading.

    Raises:
        DataError: it cannot be read, h5py is not installed.
    """
    try:
        return required("h5py").File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: broken or truncated, or no HDF5 file ({error})") from error


def load_mat(path: Path, *names: str) -> list[Any]:
    """Variables of a MATLAB file of version 5, unwrapped from arrays of one element.

    Raises:
        DataError: the file is broken or lacks a variable; scipy is not installed.
    """
    try:
        found = required("scipy.io").loadmat(path, squeeze_me=True, struct_as_record=False)
    except DataError:
        raise
    except Exception as error:  # scipy raises whatever the bytes bring it to
        raise DataError(f"{path}: broken or truncated, or no MATLAB file of version 5 ({error})") from error
    for name in names:
        if name not in found:
            there = ", ".join(key for key in found if not key.startswith("__"))
            raise DataError(f"{path}: expected the variable {name}; it holds {there}")
    return [found[name] for name in names]


def write_image(path: Path, image: NDArray[Any]) -> None:
    """Write an image, red first if in color; it is whole or not there at all."""
    stored = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    write_bytes(path, cv2.imencode(path.suffix, np.ascontiguousarray(stored))[1].tobytes())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    temporary.replace(path)


def prepare(
    out: Path,
    source: Mapping[str, Any],
    folders: Sequence[str],
    samples: Sequence[Any],
    files: Callable[[Any], Sequence[str]],
    write: Callable[[Any], None],
    lists: Mapping[str, str],
    processes: int = 1,
) -> Path:
    """Write the samples that are not there yet, then the lists, and last of all the record that all is done.

    Stopped at any moment it goes on where it was when called again; once complete it leaves everything alone.

    Args:
        out: the data set's folder.
        source: what the data set is made from and how, in plain values; another one is refused.
        folders: to make below ``out``.
        samples: whatever ``files`` and ``write`` understand.
        files: paths of a sample's files relative to ``out``.
        write: writes them, each whole.
        lists: further files and their contents.
        processes: how many write at a time; with more than one, ``write`` must be picklable.

    Raises:
        DataError: ``out`` holds something else, or cannot be written.
    """
    record = out / _RECORD
    state = json.loads(_json({**source, "complete": False}))  # converted as reading it will convert it
    found = _read_record(out, record)
    if found is not None and {**found, "complete": False} != state:
        raise DataError(f"{out}: made from something else: {found}, asked for {source}; name another folder")
    missing = [sample for sample in samples if not all((out / name).is_file() for name in files(sample))]
    if found is not None and found["complete"] and not missing:
        print(f"{out}: already there, complete; kept")
        return out
    try:
        for folder in folders:
            (out / folder).mkdir(parents=True, exist_ok=True)
        write_bytes(record, _json(state))
        _write_all(missing, write, processes, f"writing {out.name}")
        for name, content in lists.items():
            write_bytes(out / name, content.encode())
        write_bytes(record, _json({**source, "complete": True}))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error
    return out


def _write_all(
    samples: Sequence[Any], write: Callable[[Any], None], processes: int, description: str
) -> None:
    processes = min(processes, len(samples))
    with (
        multiprocessing.Pool(processes, start_worker) if processes > 1 else nullcontext() as pool,
        tqdm(total=len(samples), desc=description, unit="image", disable=None) as progress,
    ):
        for _ in pool.imap_unordered(write, samples, chunksize=4) if pool else map(write, samples):
            progress.update()


def _read_record(out: Path, record: Path) -> dict[str, Any] | None:
    if not record.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: not empty, and no prepared data set (no {_RECORD}); name another folder")
        return None
    try:
        return dict(json.loads(record.read_text()))
    except ValueError as error:
        raise DataError(f"{record}: broken ({error}); remove {out} to make the data set anew") from error


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
