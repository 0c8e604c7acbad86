"""Video in and out, a frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.data.images import DataError, Frame
from models.training.errors import UsageError
from models.training.files import replacing
from models.visualize import Image

_GRAY_16 = int.from_bytes(b"Y1\0\x10", "little")  # FFmpeg's tag of the pixel format gray16le
_CODEC = cv2.VideoWriter.fourcc(*"mp4v")  # MPEG-4 Part 2, which every build of OpenCV can write
_UNKNOWN_RATE = 25.0
_COLORED = 8.0  # mean difference of an image's channels that no compression of a gray one makes


class Video:
    """The frames of a file, decoded as they are asked for.

    Args:
        path: the file.
        depth: whether it holds depth: its frames are single channels then, of 8 bits, or of 16 where the file
            has them, as FFV1 in Matroska does.

    Attributes:
        bits: 8 or 16.
        fps: frames per second; 25 where the file does not say.

    Raises:
        DataError: the file cannot be opened or holds no frame; from iterating: a frame is broken, or depth is
            colored.
    """

    def __init__(self, path: Path, *, depth: bool = False) -> None:
        self.path, self.depth = path, depth
        with self._opened() as capture:
            self.bits, self.fps = bits_of(capture), rate_of(capture)
            # Headers estimate the number at times; decoding alone, 640x480, takes half a millisecond a frame.
            self._count = 0
            while capture.grab():
                self._count += 1
        if self._count == 0:
            raise DataError(f"{path}: no frame can be read: broken or truncated, or of a format not known")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Frame]:
        with self._opened() as capture:
            if self.bits == 16:
                capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
            for index in range(len(self)):
                name = f"{self.path}, frame {index}"
                found, pixels = capture.read()
                if not found:
                    raise DataError(f"{name}: cannot be read")
                yield video_frame(name, pixels, depth=self.depth)

    @contextmanager
    def _opened(self) -> Iterator[cv2.VideoCapture]:
        capture = cv2.VideoCapture(str(self.path))
        try:
            if not capture.isOpened():
                raise DataError(f"{self.path}: cannot be read as video")
            yield capture
        finally:
            capture.release()


def bits_of(capture: cv2.VideoCapture) -> int:
    """The bits of a value of an opened video: 8, or 16 where it is gray of 16."""
    return 16 if int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT)) == _GRAY_16 else 8


def rate_of(capture: cv2.VideoCapture) -> float:
    """The frames per second of an opened video; 25 where it does not say."""
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if 0 < rate < float("inf") else _UNKNOWN_RATE


def video_frame(name: str, pixels: NDArray[Any], *, depth: bool) -> Frame:
    """What OpenCV decoded as a frame of a video, colors red first.

    Raises:
        DataError: depth is colored.
    """
    if pixels.ndim == 3:
        pixels = _gray(name, pixels) if depth else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return Frame(name, pixels, is_video=True)


@contextmanager
def writing_video(path: Path, fps: float) -> Iterator[Callable[[Image], None]]:
    """A function that appends an image to an MP4 file, which is there once the block is left.

    All images are of the first one's size; of an odd side the last row or column is lost.

    Raises:
        UsageError: it cannot be written there.
    """
    writer = cv2.VideoWriter()
    with replacing(path) as temporary:

        def write(image: Image) -> None:
            height, width = image.shape[:2]
            if not writer.isOpened() and not writer.open(str(temporary), _CODEC, fps, (width, height)):
                raise UsageError(f"{path}: cannot be written as video")
            writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            writer.release()


def _gray(name: str, pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """The one channel of a gray image that was decoded as blue, green and red."""
    blue, green, red = cv2.split(pixels)
    if max(cv2.mean(cv2.absdiff(blue, green))[0], cv2.mean(cv2.absdiff(green, red))[0]) > _COLORED:
        raise DataError(f"{name}: depth must be gray, darker the nearer, found colors")
    return np.asarray(green)
