"""The predict command on cameras, streams, and video files read like them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from models.cameras import Cameras, Shot
from models.data.layouts import CAMERA
from models.segmentation.load import TrainedNetwork, load
from models.segmentation.predict import check_depth_unit, chosen_output, make_folders
from models.segmentation.prediction import OVERLAYS
from models.sources import check_kinds, note, option_of, why_all
from models.training.errors import UsageError, existing
from models.training.interrupt import Interrupt
from models.video import writing_video
from models.visualize import Image


def predict_cameras(
    checkpoint: Path,
    cameras: Mapping[str, str],
    inputs: Mapping[str, Path],
    output: Path,
    which: str | None,
    overrides: Sequence[str],
    limit: int | None = None,
) -> str:
    """Label what cameras show; write ``overlays/<name>.mp4`` and, with ``eval.frames``, frames as of video.

    Live sources are labeled as fast as the network is, always the newest frame (``models.cameras``), and the
    video goes on at the source's rate. It ends with the files, after ``limit`` frames, by Ctrl-C or SIGTERM,
    or where a source is lost: the video is whole in all of these cases. How many frames per second there
    were, and how late, is printed.

    Args:
        checkpoint: run folder or checkpoint.
        cameras: by modality, ``rgb`` or ``depth``, a device's number, a video file or a URL. Modalities that
            are not given are absent.
        inputs: nothing but a camera's file, where depth needs one.
        output, which, overrides: as for ``predict.predict_files``.
        limit: frames to label at most.

    Returns:
        The video's name.

    Raises:
        UsageError: a source cannot be opened; a modality, output or scale as for ``predict.predict_files``.
        DataError: a live source is lost and does not come back.
    """
    trained = load(checkpoint, overrides)
    for kind in inputs:
        if kind != CAMERA:
            raise UsageError(f"--camera takes the place of files: leave out {option_of(kind)}")
        existing(inputs[kind], option_of(kind))
    given = [*cameras, *inputs]
    why = why_all(trained.recipe.fusion)
    check_kinds(given, trained.reader.files(), why, lambda kind: f"--camera {kind}=SOURCE")
    which = chosen_output(trained, given, which)
    with Interrupt() as interrupt, Cameras(cameras) as opened:
        if "depth" in opened.cameras:
            depth = opened.cameras["depth"]
            check_depth_unit(trained, f"--camera depth={depth.source.shown}", depth.bits, overrides)
        make_folders(output)
        name = opened.first.source.name
        shots = opened.shots(lambda: bool(interrupt))
        count = _write(trained, opened, shots, inputs, output / OVERLAYS / f"{name}.mp4", which, limit)
        if opened.failure is not None:
            raise opened.failure
    if count == 0 and not interrupt:
        raise UsageError(f"--camera {opened.first.source.shown}: no frame was labeled")
    return name


def _write(
    trained: TrainedNetwork,
    cameras: Cameras,
    shots: Iterator[Shot],
    inputs: Mapping[str, Path],
    video: Path,
    which: str,
    limit: int | None,
) -> int:
    """Write the video, and the frames if ``eval.frames``; how many were labeled."""
    first = next(shots, None)
    if (
        first is not None and cameras.live
    ):  # it pays the costs of the first call; newer ones have come meanwhile
        trained.predict_some({**first.files, **inputs})
        first = next(shots, None)
    if first is None:
        return 0
    output, latencies = video.parent.parent, []
    start = time.monotonic()
    with writing_video(video, cameras.first.fps) as write:
        paced = _Paced(write, cameras.first.fps, live=cameras.live)
        progress = tqdm(islice(chain([first], shots), limit), desc="predict", total=limit, disable=None)
        for index, shot in enumerate(progress):
            prediction = trained.predict_some({**shot.files, **inputs})
            paced.write(prediction.overlay(which), shot.time - first.time)
            if trained.recipe.eval.frames:
                prediction.write(output, f"{video.stem}_{index:06d}", which)
            latencies.append(time.monotonic() - shot.time)
    print(_told(cameras, latencies, time.monotonic() - start), flush=True)
    return len(latencies)


_LONGEST = 10.0  # seconds that a video stands still; a longer pause, such as a lost connection, is cut


class _Paced:
    """Writes images to a video of a fixed rate and size.

    Args:
        write: appends an image to the video.
        fps: its frames per second.
        live: whether images are to be shown as long as they were the newest; else each makes a frame.
    """

    def __init__(self, write: Callable[[Image], None], fps: float, *, live: bool) -> None:
        self._write, self._fps, self._live = write, fps, live
        self._due = 0  # frames, those of long pauses included
        self._size: tuple[int, int] | None = None

    def write(self, image: Image, seconds: float) -> None:
        """Append an image that arrived so many seconds after the first."""
        height, width = image.shape[:2]
        if self._size is None:
            self._size = (width, height)
        elif self._size != (width, height):
            note(
                f"a frame is {width}x{height}: in the video it is resized to {self._size[0]}x{self._size[1]}"
            )
            image = np.asarray(cv2.resize(image, self._size), np.uint8)
        due = max(1, round(seconds * self._fps) + 1 - self._due) if self._live else 1
        for _ in range(min(due, max(1, round(_LONGEST * self._fps)))):
            self._write(image)
        self._due += due


def _told(cameras: Cameras, latencies: Sequence[float], seconds: float) -> str:
    """How fast it was, in words."""
    mean, late = 1000 * np.mean(latencies), 1000 * np.percentile(latencies, 95)
    told = (
        f"{len(latencies)} frames in {seconds:.1f} s: {len(latencies) / seconds:.2f} frames/s; from a frame's"
        f" arrival to its overlay {mean:.0f} ms (95 %: {late:.0f} ms)"
    )
    if cameras.live:
        told += f"; {cameras.dropped} frames dropped, {cameras.unpaired} without a partner"
    return told
