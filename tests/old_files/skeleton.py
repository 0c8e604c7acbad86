"""Checkpoints small enough for a repository: as they were written, but for the values of large tensors.

A skeleton is JSON that keeps a file's every container, key, number and small tensor. Of a large tensor it
keeps shape, memory format and the range of values, from which ``restore`` draws new ones: a function of the
tensor's place in the file, the same with every version of NumPy and PyTorch.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

LARGE = 8  # elements; a tensor of more floating-point numbers than these is drawn anew
_Json = Any


def read(path: Path) -> dict[str, _Json]:
    """The JSON in a compressed file."""
    return json.loads(gzip.decompress(path.read_bytes()))


def write(path: Path, contents: dict[str, _Json]) -> None:
    """Write compressed JSON, the same bytes for the same contents."""
    path.write_bytes(gzip.compress(json.dumps(contents).encode(), mtime=0))


def strip(path: Path) -> _Json:
    """The skeleton of a ``.pt`` or ``.safetensors`` file; of any other file, its text."""
    if path.suffix == ".pt":
        return _stripped(torch.load(path, map_location="cpu", weights_only=True), "")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {"metadata": file.metadata(), "tensors": _stripped(tensors, "net/")}
    return path.read_text()


def restore(path: Path, skeleton: _Json) -> None:
    """Write the file of a skeleton."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(_restored(skeleton, ""), path)
    elif path.suffix == ".safetensors":
        save_file(_restored(skeleton["tensors"], "net/"), path, skeleton["metadata"])
    else:
        path.write_text(skeleton)


def pack(array: np.ndarray) -> dict[str, _Json]:
    """An array as JSON, to the bit."""
    values = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "values": values}


def unpack(packed: dict[str, _Json]) -> np.ndarray:
    """The array that ``pack`` made JSON of."""
    values = np.frombuffer(base64.b64decode(packed["values"]), packed["dtype"])
    return values.reshape(packed["shape"]).copy()


def _stripped(value: Any, place: str) -> _Json:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel() > LARGE:
            return {"drawn": _drawing(value, place)}
        return {"tensor": pack(value.numpy())}
    if isinstance(value, dict):  # pairs, because JSON's keys are text and an optimizer's are numbers
        return {"dict": [[key, _stripped(each, f"{place}{key}/")] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_stripped(each, f"{place}{i}/") for i, each in enumerate(value)]}
    return value


def _restored(skeleton: _Json, place: str) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "drawn":
        return _drawn(value, place)
    if kind == "tensor":
        return torch.from_numpy(unpack(value))
    if kind == "dict":
        return {key: _restored(each, f"{place}{key}/") for key, each in value}
    made = [_restored(each, f"{place}{i}/") for i, each in enumerate(value)]
    return tuple(made) if kind == "tuple" else made


def _drawing(value: Tensor, place: str) -> dict[str, _Json]:
    """How to draw the like of a tensor: uniformly, with its mean and deviation, within its extremes."""
    assert value.dtype == torch.float32, place
    low, high = value.min().item(), value.max().item()
    mean, reach = value.mean().item(), math.sqrt(3) * value.std().item()
    low, high = max(low, mean - reach), min(high, mean + reach)
    if value.dim() <= 2 and place.endswith("weight/"):
        low = -high  # scales of norms, so that some are below any threshold and some below zero
    low, high = (float(f"{end:.3g}") for end in (low, high))
    channels_last = value.dim() == 4 and not value.is_contiguous()
    return {"shape": list(value.shape), "low": low, "high": high, "channels_last": channels_last}


def _drawn(how: dict[str, _Json], place: str) -> Tensor:
    random = np.random.RandomState(zlib.crc32(place.encode()))  # frozen: draws the same for ever
    values = how["low"] + (how["high"] - how["low"]) * random.random_sample(how["shape"])
    made = torch.from_numpy(values.astype(np.float32))
    return made.contiguous(memory_format=torch.channels_last) if how["channels_last"] else made
