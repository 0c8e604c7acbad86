"""predict --camera: video files, and live sources that are slow, fast, lost, or of several cameras."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import models
from models import cameras
from models.__main__ import main
from models.cameras import Cameras, Source
from models.data import DataError
from models.data.images import Frame
from models.segmentation.live import _Paced, predict_cameras
from models.training.errors import UsageError
from tests.helpers.clips import (
    FRAMES,
    SIZE,
    depth_frames,
    read_back,
    rgb_frames,
    save_narrow,
    write_clip,
)

Frames = Iterator[np.ndarray | None]  # None: it fails
SCALE = "data.depth_scale=25.5"


class FakeCapture:
    """What OpenCV opens, of the frames of ``sources``; opened again, it goes on where it was left."""

    sources: dict[object, Frames] = {}  # noqa: RUF012 - filled by each test

    def __init__(self, address: object) -> None:
        self.frames = self.sources.get(address)

    def isOpened(self) -> bool:
        return self.frames is not None

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: 10.0}.get(what, 0.0)

    def set(self, what: int, value: float) -> bool:
        return False

    def read(self) -> tuple[bool, np.ndarray | None]:
        frame = next(self.frames, None) if self.frames else None
        return frame is not None, frame

    def release(self) -> None:
        pass


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[object, Frames]:
    """Live sources by what opens them, which the test fills."""
    sources: dict[object, Frames] = {}
    monkeypatch.setattr(FakeCapture, "sources", sources)
    monkeypatch.setattr(cameras, "open_capture", FakeCapture)
    monkeypatch.setattr(cameras, "PAUSE", 0.01)
    return sources


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_narrow(tmp_path_factory.mktemp("network") / "net.pt")


def number(index: int) -> np.ndarray:
    """A frame that tells its number."""
    return np.full((*SIZE, 3), index, np.uint8)


def numbers(count: int | None = None, seconds: float = 0.01, first: int = 0) -> Frames:
    """Frames at a rate; without a count until they have started again at 0."""
    for index in range(first, 10**9 if count is None else first + count):
        time.sleep(seconds)
        yield number(index % 256)


def again(frame: np.ndarray) -> Frames:
    """The same frame for ever."""
    while True:
        time.sleep(0.01)
        yield np.ascontiguousarray(frame)


def shown(files: dict[str, Frame], kind: str = "rgb") -> int:
    return int(files[kind].pixels.flat[0])


def never() -> bool:
    return False


# ---- video files


def test_a_video_as_a_camera(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_clip(tmp_path / "clip.avi", rgb_frames(), "FFV1")
    grey = [np.rint(frame / 5000 * 25.5).astype(np.uint8) for frame in depth_frames()]
    depth = write_clip(tmp_path / "depth.avi", [*grey, grey[0]], "FFV1")
    command = ["predict", str(net), "--camera", str(clip), "--camera", f"depth={depth}", SCALE]
    assert main([*command, "eval.frames=true", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{FRAMES} frames in ")
    assert "dropped" not in printed.out
    assert "depth.avi has more frames than another file: they are left out" in printed.err
    assert main([*command[:2], "--rgb", str(clip), "--depth", str(depth), SCALE, "--output", "x"]) == 2
    trained = models.load(net, [SCALE])
    overlays, fps = read_back(tmp_path / "out/overlays/clip.mp4")
    assert (len(overlays), fps) == (FRAMES, 12.5)
    for index, overlay in enumerate(overlays):
        files = {
            "rgb": Frame("rgb", rgb_frames()[index]),
            "depth": Frame("depth", grey[index], is_video=True),
        }
        expected = trained.predict_some(files)
        written = cv2.imread(str(tmp_path / f"out/labels/clip_{index:06d}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(written, expected.ensemble)
        assert np.abs(overlay.astype(int) - expected.overlay()).mean() < 12  # compressed


def test_some_frames_of_one_camera(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_clip(tmp_path / "clip.avi", rgb_frames(), "FFV1")
    command = ["predict", str(net), "--camera", str(clip), "--frames", "2", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert "without depth: the outputs are those of rgb, ensemble" in capsys.readouterr().err
    assert len(read_back(tmp_path / "out/overlays/clip.mp4")[0]) == 2
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["clip.mp4"]


def test_a_video_that_ends_early_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setattr(cameras, "open_capture", FakeCapture)
    monkeypatch.setattr(
        FakeCapture, "sources", {str(tmp_path / "clip.mp4"): iter([number(1), number(2), None])}
    )
    monkeypatch.setattr(FakeCapture, "get", lambda self, what: 9.0)
    with Cameras({"rgb": str(tmp_path / "clip.mp4")}) as opened:
        assert [shown(shot.files) for shot in opened.shots(never)] == [1, 2]
    assert "note: " + str(tmp_path / "clip.mp4: ended after 2 of 9 frames") in capsys.readouterr().err


# ---- live sources


def test_a_slow_loop_gets_the_newest_frame(live: dict[object, Frames]) -> None:
    """The source waits for the loop to have looked, so that nothing depends on how fast this machine is."""
    looked = threading.Event()

    def frames() -> Frames:
        for index in range(7):
            if index in (1, 5):  # 1 to 4 come while the loop works on 0
                looked.wait(30)
                looked.clear()
            yield number(index)

    live[0] = frames()
    with Cameras({"rgb": "0"}) as opened:
        feed_ends = opened.shots(never)
        assert shown(next(feed_ends).files) == 0
        looked.set()
        feed = opened._feeds["rgb"]
        while feed._frames[-1].number < 4:
            time.sleep(0.01)
        assert shown(next(feed_ends).files) == 4
        assert opened.dropped == 3
        looked.set()
        assert [shown(shot.files) for shot in feed_ends][-1] == 6
        assert str(opened.failure) == "0: the connection is lost, and no frame came in 5 attempts"


def test_a_slow_camera_is_waited_for(live: dict[object, Frames]) -> None:
    live[0] = numbers(3, seconds=0.3)
    with Cameras({"rgb": "0"}) as opened:
        assert [shown(shot.files) for shot in opened.shots(never)] == [0, 1, 2]
    assert opened.dropped == 0


def test_a_lost_connection_is_opened_again(
    live: dict[object, Frames], capsys: pytest.CaptureFixture[str]
) -> None:
    live["rtsp://me:secret@host/door?key=1"] = iter([number(0), None, None, number(1), *[None] * 9])
    with Cameras({"rgb": "rtsp://me:secret@host/door?key=1"}) as opened:
        found = [shown(shot.files) for shot in opened.shots(never)]
    assert found[-1] == 1
    told = "rtsp://host/door: the connection is lost, and no frame came in 5 attempts"
    assert str(opened.failure) == told
    notes = capsys.readouterr().err
    assert notes.count("attempt 1 of 5") == 2
    assert "secret" not in notes
    assert opened.first.source.name == "host_door"


def test_the_video_of_a_lost_camera_is_whole(
    live: dict[object, Frames], net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live[3] = numbers(9, seconds=0.1)
    assert main(["predict", str(net), "--camera", "3", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 3: the connection is lost")
    overlays, fps = read_back(tmp_path / "out/overlays/camera_3.mp4")
    assert fps == 10
    assert overlays
    assert overlays[0].shape == (*SIZE, 3)
    assert [path.name for path in (tmp_path / "out/overlays").iterdir()] == ["camera_3.mp4"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_whole_video(
    live: dict[object, Frames], net: Path, tmp_path: Path, stop: int, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "out/labels/camera_0_000001.png"

    def frames() -> Frames:
        yield from numbers(200, seconds=0.01)  # long enough for some to be labeled
        while not done.is_file():
            time.sleep(0.01)
            yield number(0)
        os.kill(os.getpid(), stop)
        yield from numbers()

    live[0] = frames()
    assert (
        main(["predict", str(net), "--camera", "0", "eval.frames=true", "--output", str(tmp_path / "out")])
        == 0
    )
    printed = capsys.readouterr().out
    count = int(printed.split()[0])
    assert count >= 2
    assert " frames dropped, 0 without a partner" in printed
    assert len(list((tmp_path / "out/labels").iterdir())) == count
    assert len(read_back(tmp_path / "out/overlays/camera_0.mp4")[0]) >= count


def test_live_frames_are_labeled_as_they_are(live: dict[object, Frames], net: Path, tmp_path: Path) -> None:
    live[0] = again(rgb_frames()[0][:, :, ::-1])
    assert predict_cameras(net, {"rgb": "0"}, {}, tmp_path, "rgb", ["eval.frames=true"], 3) == "camera_0"
    expected = models.load(net).predict_some({"rgb": rgb_frames()[0]})
    for index in range(3):
        found = cv2.imread(str(tmp_path / f"labels/camera_0_{index:06d}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(found, expected["rgb"])
    assert not (tmp_path / "labels/camera_0_000003.png").exists()


def test_another_size_in_mid_stream(
    live: dict[object, Frames], net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def frames() -> Frames:
        while not (tmp_path / "labels/camera_0_000000.png").is_file():
            time.sleep(0.01)
            yield number(0)
        yield from again(np.zeros((32, 40, 3), np.uint8))

    live[0] = frames()
    assert predict_cameras(net, {"rgb": "0"}, {}, tmp_path, None, ["eval.frames=true"], 4) == "camera_0"
    assert "a frame is 40x32: in the video it is resized to 64x48" in capsys.readouterr().err
    assert {frame.shape for frame in read_back(tmp_path / "overlays/camera_0.mp4")[0]} == {(*SIZE, 3)}
    last = cv2.imread(str(tmp_path / "labels/camera_0_000003.png"), cv2.IMREAD_UNCHANGED)
    assert last.shape == (32, 40)


# ---- several cameras


def test_the_nearest_frames_are_paired(live: dict[object, Frames]) -> None:
    """Depth sends its 20 and 21 just before and after color's 1; partners of 0 and 2 come too late."""
    pace = {name: threading.Event() for name in ("color", "depth")}

    def frames(name: str, *indices: int) -> Frames:
        for index in indices:
            pace[name].wait(30)
            pace[name].clear()
            yield number(index)

    live[0], live[1] = frames("color", 0, 1, 2), frames("depth", 20, 21)
    with Cameras({"rgb": "0", "depth": "1"}) as opened:
        shots = opened.shots(never)
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.append(next(shots)))
        reader.start()
        pace["color"].set()  # 0, without a partner
        while not opened.unpaired:
            time.sleep(0.01)
        pace["depth"].set()
        while not opened._feeds["depth"]._frames:
            time.sleep(0.01)
        pace["color"].set()
        reader.join(30)
        assert (shown(found[0].files), shown(found[0].files, "depth")) == (1, 20)
        assert opened.unpaired == 1
        near = opened._feeds["depth"]._frames[0].time
        assert opened._feeds["depth"].nearest(near + cameras.WITHIN + 0.01) is None
        pace["depth"].set()
        while len(opened._feeds["depth"]._frames) < 2:
            time.sleep(0.01)
        first, second = opened._feeds["depth"]._frames
        assert opened._feeds["depth"].nearest(first.time - 0.1) is first
        assert opened._feeds["depth"].nearest(second.time + 0.1) is second
        pace["color"].set()


def test_two_cameras_are_labeled_together(live: dict[object, Frames], net: Path, tmp_path: Path) -> None:
    rgb, depth = rgb_frames()[0], np.rint(depth_frames()[0] / 5000 * 25.5).astype(np.uint8)
    live[0] = again(rgb[:, :, ::-1])
    live[1] = again(np.dstack([depth] * 3))
    options = [SCALE, "eval.frames=true"]
    assert predict_cameras(net, {"rgb": "0", "depth": "1"}, {}, tmp_path, None, options, 2) == "camera_0"
    files = {"rgb": Frame("rgb", rgb), "depth": Frame("depth", depth, is_video=True)}
    expected = models.load(net, [SCALE]).predict_some(files)
    found = cv2.imread(str(tmp_path / "labels/camera_0_000001.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found, expected.ensemble)


def test_an_error_in_a_cameras_thread_reaches_the_loop(live: dict[object, Frames]) -> None:
    def frames() -> Frames:
        yield number(0)
        raise RuntimeError("driver")

    live[0] = frames()
    with Cameras({"rgb": "0"}) as opened, pytest.raises(RuntimeError, match="driver"):
        for _ in opened.shots(never):
            pass


def test_a_camera_that_is_lost_ends_the_others(live: dict[object, Frames]) -> None:
    live[0], live[1] = numbers(), iter([number(1)])
    with Cameras({"rgb": "0", "depth": "1"}) as opened:
        for _ in opened.shots(never):
            pass
    assert str(opened.failure).startswith("1: the connection is lost")


# ---- what is refused


def test_sources(tmp_path: Path) -> None:
    assert Source.of("2") == Source(2, "2", "camera_2", live=True)
    clip = write_clip(tmp_path / "clip.mp4", rgb_frames())
    assert Source.of(str(clip)) == Source(str(clip), str(clip), "clip", live=False)
    with pytest.raises(
        UsageError, match=r"--camera: .*clop\.mp4 does not exist; .*; did you mean 'clip\.mp4'"
    ):
        Source.of(str(tmp_path / "clop.mp4"))


def test_refused_cameras(
    live: dict[object, Frames], net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live[0] = live[1] = live["clip.mp4"] = numbers()
    clip = write_clip(tmp_path / "clip.mp4", rgb_frames())
    output = tmp_path / "out"

    def refused(*options: str) -> str:
        assert main(["predict", str(net), "--output", str(output), *options]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    assert "--camera rgb=7: cannot be opened as a video source" in refused("--camera", "7")
    assert "--camera: expected one SOURCE" in refused("--camera", "0", "--camera", "rgb=1")
    assert "--camera: expected one SOURCE" in refused("--camera", "depth=")
    assert "live sources alone" in refused("--camera", "0", "--camera", f"depth={clip}", SCALE)
    assert "--camera hha=SOURCE is no input" in refused("--camera", "0", "--camera", "hha=1")
    assert "leave out --depth" in refused("--camera", "0", "--depth", str(clip))
    assert "--which must be one of rgb, ensemble" in refused("--camera", "0", "--which", "depth")
    assert "--camera depth=1 has 8 bits" in refused("--camera", "0", "--camera", "depth=1")
    assert "--frames: expected a number from 1 on" in refused("--camera", "0", "--frames", "0")
    assert "beside --camera" in refused("--rgb", str(clip), "--frames", "3")
    whole = save_narrow(tmp_path / "whole.pt", "fusion=concat")
    assert main(["predict", str(whole), "--output", str(output), "--camera", "0"]) == 2
    assert "--camera depth=SOURCE is required" in capsys.readouterr().err


def test_images_of_a_live_video_stand_as_long_as_they_were_the_newest() -> None:
    """At 5 frames/s: a slow network, and a pause that is cut once."""
    image, written = np.zeros((4, 6, 3), np.uint8), list[int]()
    paced = _Paced(lambda _: written.append(1), 5.0, live=True)
    counts = []
    for seconds in (0.0, 2.0, 4.0, 4.1, 604.0, 604.2, 604.4):
        written.clear()
        paced.write(image, seconds)
        counts.append(len(written))
    assert counts == [1, 10, 10, 1, 50, 1, 1]


def test_depth_in_colors_is_refused(live: dict[object, Frames]) -> None:
    colored = np.zeros((*SIZE, 3), np.uint8)
    colored[:, :, 0] = 200
    live[0], live[1] = numbers(), again(colored)
    with Cameras({"rgb": "0", "depth": "1"}) as opened:
        for _ in opened.shots(never):
            pass
    assert isinstance(opened.failure, DataError)
    assert "depth must be gray" in str(opened.failure)
