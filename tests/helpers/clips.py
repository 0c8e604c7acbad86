"""Short videos, the same as folders of frames, and a network to label them."""

from pathlib import Path

import cv2
import numpy as np
import torch

import models.segmentation.recipes  # noqa: F401 - fills the registry
from models.data import LAYOUTS, Reader
from models.segmentation.build import build_network
from models.segmentation.load import describe
from models.training import checkpoint, config, registry
from tests.helpers.networks import randomise_norms

SIZE = (48, 64)
FRAMES = 5


def rgb_frames() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    soft = [rng.integers(0, 256, (3, 4, 3), np.uint8) for _ in range(FRAMES)]
    return [cv2.resize(frame, SIZE[::-1], interpolation=cv2.INTER_LINEAR) for frame in soft]


def depth_frames() -> list[np.ndarray]:
    """Of 16 bits, 5000 units per metre."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return [(5000 + 100 * rows + 50 * columns + 400 * index).astype(np.uint16) for index in range(FRAMES)]


def write_clip(path: Path, frames: list[np.ndarray], codec: str = "mp4v") -> Path:
    """A video; of frames [H, W], a grey one of their bits."""
    grey, wide = frames[0].ndim == 2, frames[0].dtype == np.uint16
    options = [cv2.VIDEOWRITER_PROP_IS_COLOR, int(not grey)]
    options += [cv2.VIDEOWRITER_PROP_DEPTH, cv2.CV_16U if wide else cv2.CV_8U]
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), 12.5, frames[0].shape[1::-1], options
    )
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame if grey else frame[:, :, ::-1])
    writer.release()
    return path


def write_folder(path: Path, frames: list[np.ndarray], name: str = "{}") -> Path:
    path.mkdir()
    for index, frame in enumerate(frames):
        stored = frame if frame.ndim == 2 else frame[:, :, ::-1]
        cv2.imwrite(str(path / f"{name.format(index)}.png"), stored)
    return path


def read_back(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1][:, :, ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def save_narrow(path: Path, *overrides: str) -> Path:
    """Write a narrow network of random weights, of RGB and depth with 5000 units per metre."""
    torch.manual_seed(0)
    options = ["model.width=8", "data.layout=nyu_cen", *overrides]
    recipe = config.override(registry.find("synthetic_demo"), options)
    net = build_network(recipe)
    randomise_norms(net)
    reader = Reader(LAYOUTS["nyu_cen"], recipe.data.modalities)
    contents = {
        "recipe": "synthetic_demo",
        "config": config.to_plain(recipe),
        "task": {"net": net.state_dict()},
        **describe(reader, [f"class {label}" for label in range(recipe.data.num_classes)]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save_network(path, contents)
    return path
