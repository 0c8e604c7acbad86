"""Weights from files: safe reading, and pretrained weights for the encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cen_ext.tables import table_shapes
from models.networks.encoders.base import Backbone
from models.networks.messages import first_line
from models.networks.private import PrivateConv2d

_WRAPPERS = ("segmenter", "state_dict", "model")  # under which training scripts file the state dict
_PARALLEL = "module."  # the prefix that DataParallel puts before every key


class LoadReport(NamedTuple):
    """Keys that the network has and the file lacks (they keep their values), and the other way round."""

    missing: list[str]
    unexpected: list[str]


def load_imagenet(
    encoder: Backbone,
    path: str | Path,
    *,
    bgr: bool = False,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
) -> LoadReport:
    """Load pretrained weights in the names of torchvision or timm, whichever the encoder is.

    Private entries start alike in every modality. A stem that reads one channel gets the mean of the weights
    for red, green and blue.

    Args:
        encoder: changed in place, and only if every shape fits.
        path: a local ``.pth`` or ``.safetensors`` file. Its classifier is left out.
        bgr: the weights were trained on images with blue first: the stem is turned to take red first.
        scale: for red, green and blue, the factor from what the encoder is fed to what the weights were
            trained on; the stem takes it in.

    Returns:
        What did not match. Batch counters are not counted as missing: old files have none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is a folder; the file is not a state dict, shares no key with the encoder, or
            has another shape; a stem that cannot take in what bgr and scale say.
    """
    if not encoder.stem_weights and (bgr or any(factor != 1 for factor in scale)):
        raise ValueError(
            f"{path}: {encoder.weights_kind} rearranges the image before its first convolution, which cannot "
            "be turned to other inputs than those of its weights: choose weights trained on red first"
        )
    own = encoder.state_dict()
    read = read_state_dict(path)
    state = encoder.from_pretrained(read)
    usable = {key: value for key, value in state.items() if key in own}
    if not usable:
        raise ValueError(f"{path}: no key of {encoder.weights_kind} in it; it starts with {some(read)}")
    for key in usable.keys() & set(encoder.stem_weights):
        usable[key] = _stem(usable[key], own[key].shape[1], bgr, scale)
    shapes = _single_modality_shapes(encoder)
    wrong = [
        f"{key} is {tuple(value.shape)} in the file, but {tuple(expected.shape)} in the encoder"
        for key, value in usable.items()
        for expected in [own[key]]
        if value.shape not in (expected.shape, shapes.get(key))
    ]
    if wrong:
        raise ValueError(f"{path}: wrong shapes: {some(wrong)}")
    encoder.load_state_dict(usable, strict=False)
    return LoadReport(
        missing=[k for k in own if k not in state and not k.endswith(".num_batches_tracked")],
        unexpected=[k for k in state if k not in own],
    )


def _stem(weight: Tensor, channels: int, bgr: bool, scale: Sequence[float]) -> Tensor:
    """The weight of a stem that reads so many channels, of one for red, green and blue; others unchanged."""
    if weight.shape[1:2] != (len(scale),):
        return weight
    ordered = weight.flip(1) if bgr else weight
    scaled = ordered * torch.tensor(scale, dtype=weight.dtype).view(-1, 1, 1)
    return scaled.mean(1, keepdim=True) if channels == 1 else scaled


def _single_modality_shapes(encoder: Backbone) -> dict[str, torch.Size]:
    """The shapes that private entries, norms' and convolutions', have in a network of a single modality."""
    shapes = {key: torch.Size(shape[1:]) for key, shape in table_shapes(encoder).items()}
    for name, module in encoder.named_modules():
        if isinstance(module, PrivateConv2d):
            shapes[f"{name}.weight"] = module.weight[: module.out_channels].shape
    return shapes


def read_state_dict(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict in a file or a loaded checkpoint.

    A wrapping entry (``segmenter``, ``state_dict``, ``model``) is opened, and DataParallel's ``module.``
    taken off every key. Files are read without running any code in them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read safely, or is not a state dict.
    """
    content = source if isinstance(source, Mapping) else _read(Path(source))
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    if isinstance(content, Mapping):
        content = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), content)
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{where}: not a state dict (a mapping of names to tensors)")
    prefix = _PARALLEL if all(key.startswith(_PARALLEL) for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def misfits(shapes: Mapping[str, Sequence[int]], state: Mapping[str, Tensor]) -> str:
    """Describe entries that a state dict lacks, has too many or in other shapes than a network's; or ""."""
    problems = {
        "missing": [name for name in shapes if name not in state],
        "left over": [name for name in state if name not in shapes],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} (expected {tuple(shape)})"
            for name, shape in shapes.items()
            if name in state and state[name].shape != shape
        ],
    }
    return "; ".join(f"{what}: {some(entries)}" for what, entries in problems.items() if entries)


def misfits_of(net: nn.Module, state: Mapping[str, Tensor]) -> str:
    """``misfits`` of a state dict of this project with a network, whose norms also load tables ``[M, C]``."""
    own, tables = net.state_dict(), table_shapes(net)
    flat = {
        key: value.flatten() if key in tables and value.shape == tables[key] != own[key].shape else value
        for key, value in state.items()
    }
    return misfits({key: value.shape for key, value in own.items()}, flat)


def some(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many more there are; for error messages."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest


def _numpy_globals() -> list[Any]:
    """The functions and types that make numpy's numbers and arrays, such as a score saved beside weights.

    Their module has another name from numpy 2 on, by which files of either version are to be read.
    """
    import numpy as np  # here, so that the networks need torch alone

    functions: tuple[Any, ...] = (np.float64().__reduce__()[0], np.empty(0).__reduce__()[0])
    return [
        *(
            (function, f"numpy.{core}.multiarray.{function.__name__}")
            for function in functions
            for core in ("core", "_core")
        ),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
    ]


def _read(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a .pth or .safetensors file of weights")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # here, so that the networks need torch alone

            return load_file(path)
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's own errors on foreign bytes are of every kind
        reason = first_line(error)
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            reason = (
                f"beside the weights it holds {found[1]}, and reading that runs code of the file. If you "
                "trust it, write the weights alone: torch.save(torch.load(FILE, weights_only=False)"
                "['segmenter'], 'weights.pth')"
            )
        raise ValueError(f"{path}: not a file of weights that can be loaded safely ({reason})") from error
