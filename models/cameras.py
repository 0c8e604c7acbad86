"""Frames of cameras, streams and video files, and which of several sources' belong together."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2

from models.data import DataError
from models.data.images import Frame
from models.sources import VIDEO_KINDS, note
from models.training.errors import UsageError, existing
from models.video import bits_of, rate_of, video_frame

WITHIN = 0.5  # seconds that frames of two live sources may arrive apart
RETRIES, PAUSE = 5, 1.0  # how often a lost connection is opened again, and seconds before each time
_KEPT = 16  # newest frames of a live source, to choose the partner of another's from
_WAIT = 0.1  # seconds between two looks at whether to stop

open_capture = cv2.VideoCapture


@dataclass(frozen=True)
class Source:
    """A device, a video file or a stream.

    Attributes:
        address: what OpenCV opens.
        shown: its name in messages, without a password.
        name: its name in those of files.
        live: whether it goes on while nobody reads.
    """

    address: int | str
    shown: str
    name: str
    live: bool

    @classmethod
    def of(cls, text: str) -> Source:
        """A source of a device's number or path, a file, or a URL (``rtsp://...``, ``http://...``).

        Raises:
            UsageError: there is no such file.
        """
        if text.isdecimal():
            return cls(int(text), text, f"camera_{text}", live=True)
        if "://" in text:
            parts = urlsplit(text)
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
            name = re.sub(r"\W+", "_", shown.partition("://")[2]).strip("_")
            return cls(text, shown, name or "camera", live=True)
        path = existing(Path(text), "--camera")
        return cls(str(path), str(path), path.stem, live=not path.is_file())


class Camera:
    """An opened source.

    Args:
        source: what to open.
        kind: the modality that it gives, one of ``VIDEO_KINDS``.

    Attributes:
        bits: 8 or 16, of a value.
        fps: frames per second; 25 where it does not say.

    Raises:
        UsageError: it cannot be opened.
    """

    def __init__(self, source: Source, kind: str) -> None:
        self.source, self.kind = source, kind
        self.bits, self.fps = 8, 0.0
        self._read = 0
        if not self.open():
            raise UsageError(f"--camera {kind}={source.shown}: cannot be opened as a video source")

    def open(self) -> bool:
        """Open it, again if it was; whether that worked."""
        self._capture = open_capture(self.source.address)
        if not self._capture.isOpened():
            return False
        self.bits, self.fps = bits_of(self._capture), rate_of(self._capture)
        if self.bits == 16:
            self._capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)
        return True

    def read(self) -> Frame | None:
        """The next frame; None where there is none, at the end or because the connection is lost.

        Raises:
            DataError: depth is colored.
        """
        found, pixels = self._capture.read()
        if not found:
            return None
        name = f"{self.source.shown}, frame {self._read}"
        self._read += 1
        return video_frame(name, pixels, depth=self.kind == "depth")

    def missed(self) -> str:
        """In words, what a file's header promises beyond the frames that were read; empty: nothing."""
        told = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return f"{self.source.shown}: ended after {self._read} of {told} frames" if told > self._read else ""

    def release(self) -> None:
        """Close it."""
        self._capture.release()


class Arrived(NamedTuple):
    """A frame of a live source."""

    number: int
    time: float  # of ``time.monotonic``
    frame: Frame


class Feed(threading.Thread):
    """Reads a live source all the time, so that the newest frame is one of now; older ones are dropped.

    Args:
        camera: which it closes in the end.

    Attributes:
        failure: why it has ended; None: it has not, or was told to.
    """

    def __init__(self, camera: Camera) -> None:
        super().__init__(daemon=True, name=f"camera {camera.source.shown}")
        self.camera = camera
        self.failure: Exception | None = None
        self._frames: deque[Arrived] = deque(maxlen=_KEPT)
        self._changed = threading.Condition()
        self._stopped = threading.Event()

    def run(self) -> None:
        number = failures = 0
        try:
            while not self._stopped.is_set():
                frame = self.camera.read()
                if frame is None:
                    failures += 1
                    self._reconnect(failures)
                    continue
                failures = 0
                with self._changed:
                    self._frames.append(Arrived(number, time.monotonic(), frame))
                    self._changed.notify_all()
                number += 1
        except Exception as error:  # of any kind: who waits for a frame would wait forever
            self.failure = error
        finally:
            self.camera.release()

    def newer(self, than: int) -> Arrived | None:
        """The newest frame, if its number is above ``than``, or else the next one; None: not before long.

        Raises:
            DataError: there will be none.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._frames and self._frames[-1].number > than, _WAIT):
                if self.failure is not None:
                    raise self.failure
                return None
            return self._frames[-1]

    def nearest(self, moment: float) -> Arrived | None:
        """The frame that arrived nearest to a moment, of the last ones; None: not within ``WITHIN`` seconds.

        Raises:
            DataError: the source is lost.
        """
        if self.failure is not None:
            raise self.failure
        with self._changed:
            near = min(self._frames, key=lambda each: abs(each.time - moment), default=None)
        return near if near is not None and abs(near.time - moment) <= WITHIN else None

    def stop(self) -> None:
        """End it, unless its camera does not answer: the program's end then does."""
        self._stopped.set()
        self.join(2)

    def _reconnect(self, attempt: int) -> None:
        """Open the source again after a while; an attempt without success shows when it is read."""
        name = self.camera.source.shown
        if attempt > RETRIES:
            raise DataError(f"{name}: the connection is lost, and no frame came in {RETRIES} attempts")
        note(f"{name}: no frame; it is opened again, attempt {attempt} of {RETRIES}")
        self.camera.release()
        if not self._stopped.wait(PAUSE):
            self.camera.open()


class Shot(NamedTuple):
    """Frames that belong together."""

    files: dict[str, Frame]
    time: float  # of ``time.monotonic``, when it arrived


class Cameras:
    """Opened sources, by the modality that each gives: all of them live, or all files.

    Files are read frame by frame to the end of the shortest. Of live sources the first leads: its newest
    frame goes with the frame of every other that arrived nearest to it, at most ``WITHIN`` seconds apart;
    frames that came while the one before was worked on are dropped.

    Args:
        sources: by modality a device's number, a file or a URL.

    Attributes:
        live: whether they are.
        dropped, unpaired: how many of the first one's frames were, and had no partner in time.
        failure: why the frames have ended before they were to.

    Raises:
        UsageError: one cannot be opened, or is of a modality that frames cannot hold; files beside live ones.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        for kind in sources:
            if kind not in VIDEO_KINDS:
                raise UsageError(f"--camera {kind}: only {' and '.join(VIDEO_KINDS)} are read from video")
        found = {kind: Source.of(text) for kind, text in sources.items()}
        if len({source.live for source in found.values()}) > 1:
            told = ", ".join(f"{kind}={source.shown}" for kind, source in found.items())
            raise UsageError(f"--camera: give live sources alone, or video files alone, got {told}")
        self.cameras: dict[str, Camera] = {}
        self.dropped = self.unpaired = 0
        self.failure: DataError | None = None
        self.live = next(iter(found.values())).live
        self._feeds: dict[str, Feed] = {}
        try:
            for kind, source in found.items():
                self.cameras[kind] = Camera(source, kind)
        except UsageError:
            self._release()
            raise
        self.first = next(iter(self.cameras.values()))

    def __enter__(self) -> Cameras:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for feed in self._feeds.values():
            feed.stop()
        if not self._feeds:
            self._release()

    def shots(self, stopped: Callable[[], bool]) -> Iterator[Shot]:
        """Frames that belong together, until ``stopped`` says so, files end or a source fails.

        Raises:
            DataError: a file's depth is colored.
        """
        if not self.live:
            yield from self._of_files(stopped)
            return
        self._feeds = {kind: Feed(camera) for kind, camera in self.cameras.items()}
        for feed in self._feeds.values():
            feed.start()
        try:
            yield from self._newest(stopped)
        except DataError as error:
            self.failure = error

    def _of_files(self, stopped: Callable[[], bool]) -> Iterator[Shot]:
        while not stopped():
            start = time.monotonic()
            frames = {kind: camera.read() for kind, camera in self.cameras.items()}
            files = {kind: frame for kind, frame in frames.items() if frame is not None}
            if len(files) == len(frames):
                yield Shot(files, start)
                continue
            for kind, camera in self.cameras.items():
                if kind in files:
                    note(f"{camera.source.shown} has more frames than another file: they are left out")
                elif missed := camera.missed():
                    note(missed)
            return

    def _newest(self, stopped: Callable[[], bool]) -> Iterator[Shot]:
        (leading, leader), *others = self._feeds.items()
        last = -1
        while not stopped():
            newest = leader.newer(last)
            if newest is None:
                continue
            self.dropped += newest.number - last - 1
            last = newest.number
            partners = {kind: feed.nearest(newest.time) for kind, feed in others}
            there = {kind: partner.frame for kind, partner in partners.items() if partner is not None}
            if len(there) < len(partners):
                self.unpaired += 1
            else:
                yield Shot({leading: newest.frame, **there}, newest.time)

    def _release(self) -> None:
        for camera in self.cameras.values():
            camera.release()
