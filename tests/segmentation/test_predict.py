"""predict on video: what is read, what is written, and what is refused; which files belong together."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import models.segmentation.recipes  # noqa: F401 - fills the registry
from models.data import DataError, palette, prepare_synthetic
from models.data.images import Frame, read_depth
from models.segmentation.evaluate import evaluate_checkpoint
from models.segmentation.load import load
from models.segmentation.predict import predict_files
from models.sources import match_frames
from models.training.errors import UsageError
from models.video import Video, writing_video
from tests.helpers.clips import (
    FRAMES,
    SIZE,
    depth_frames,
    read_back,
    rgb_frames,
    save_narrow,
    write_clip,
    write_folder,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a narrow network of random weights."""
    return save_narrow(tmp_path_factory.mktemp("network") / "net.pt")


def test_a_clip_read_back(tmp_path: Path) -> None:
    frames = rgb_frames()
    video = Video(write_clip(tmp_path / "clip.avi", frames, "FFV1"))
    assert (len(video), video.fps, video.bits) == (FRAMES, 12.5, 8)
    for _ in range(2):  # as often as one likes
        for index, (frame, expected) in enumerate(zip(video, frames, strict=True)):
            assert str(frame) == f"{tmp_path}/clip.avi, frame {index}"
            np.testing.assert_array_equal(frame.pixels, expected)


def test_depth_of_16_bits_is_read_whole(tmp_path: Path) -> None:
    frames = depth_frames()
    video = Video(write_clip(tmp_path / "depth.mkv", frames, "FFV1"), depth=True)
    assert video.bits == 16
    for frame, expected in zip(video, frames, strict=True):
        np.testing.assert_array_equal(frame.pixels, expected)
        np.testing.assert_allclose(read_depth(frame, 5000.0)[:, :, 0], expected / 5000, rtol=1e-6)


def test_depth_of_8_bits_has_the_scale_that_is_given(tmp_path: Path) -> None:
    frames = [(frame >> 6).astype(np.uint8) for frame in depth_frames()]
    video = Video(write_clip(tmp_path / "depth.mp4", frames), depth=True)
    assert video.bits == 8
    for frame, expected in zip(video, frames, strict=True):
        assert frame.pixels.dtype == np.uint8
        metres = read_depth(frame, 25.5, bit_shift=3)[:, :, 0]  # which is of 16 bits only
        assert np.abs(metres - expected / 25.5).mean() < 1 / 25.5  # compressed
        brightness = read_depth(frame, None)[:, :, 0]
        np.testing.assert_allclose(brightness, frame.pixels / 255.0, rtol=1e-6)


def test_written_video(tmp_path: Path) -> None:
    frames = rgb_frames()
    with writing_video(tmp_path / "clip.mp4", 12.5) as write:
        for frame in frames:
            write(frame)
        assert not (tmp_path / "clip.mp4").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    found, fps = read_back(tmp_path / "clip.mp4")
    assert fps == 12.5
    for frame, expected in zip(found, frames, strict=True):
        assert np.abs(frame.astype(int) - expected).mean() < 8


def test_a_video_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with writing_video(tmp_path / "clip.mp4", 12.5) as write:
            write(rgb_frames()[0])
            raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        work()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", ["folder", "video of 16 bits", "video of 8 bits"])
def test_predict_video(trained: Path, tmp_path: Path, depth: str) -> None:
    rgb, stored = rgb_frames(), depth_frames()
    clip = write_clip(tmp_path / "clip.avi", rgb, "FFV1")
    overrides = ["eval.frames=true"]
    if depth == "folder":
        source = write_folder(tmp_path / "depth", stored)
    elif depth == "video of 16 bits":
        source = write_clip(tmp_path / "depth.mkv", stored, "FFV1")
    else:
        stored = [np.rint(frame / 5000 * 25.5).astype(np.uint8) for frame in stored]
        source = write_clip(tmp_path / "depth.avi", stored, "FFV1")
        overrides.append("data.depth_scale=25.5")
    output = tmp_path / "out"
    assert predict_files(trained, {"rgb": clip, "depth": source}, output, "depth", overrides) == ["clip"]
    network = load(trained, overrides)
    seen = set()
    overlays, fps = read_back(output / "overlays/clip.mp4")
    assert fps == 12.5
    for index, shown in enumerate(overlays):
        files = {"rgb": Frame("rgb", rgb[index]), "depth": Frame("depth", stored[index], is_video=True)}
        expected = network.predict_some(files)["depth"]
        seen.update(np.unique(expected))
        name = f"clip_{index:06d}.png"
        found = cv2.imread(str(output / "labels" / name), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(found, expected)
        coloured = palette(11)[expected]
        written = cv2.imread(str(output / "coloured" / name))[:, :, ::-1]
        np.testing.assert_array_equal(written, coloured)
        still = cv2.imread(str(output / "overlays" / name))[:, :, ::-1].astype(int)
        assert np.abs(still - (rgb[index] / 2 + coloured / 2)).max() <= 1.5
        assert np.abs(shown - still).mean() < 12  # compressed
    assert len(overlays) == FRAMES
    assert len(seen) > 2  # or the pictures would tell little


def test_of_a_video_only_the_overlays_are_written(trained: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", rgb_frames())
    inputs = {"rgb": clip, "depth": write_folder(tmp_path / "depth", depth_frames())}
    predict_files(trained, inputs, tmp_path / "out", "ensemble", [])
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["clip.mp4"]


def test_of_a_video_without_depth_there_is_the_branch_of_rgb(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_clip(tmp_path / "clip.avi", rgb_frames(), "FFV1")
    predict_files(trained, {"rgb": clip}, tmp_path / "out", "rgb", ["eval.frames=true"])
    assert "note: without depth: the outputs are those of rgb, ensemble\n" in capsys.readouterr().err
    network = load(trained)
    for index, frame in enumerate(rgb_frames()):
        expected = network.predict_some({"rgb": Frame("rgb", frame)})["rgb"]
        found = cv2.imread(str(tmp_path / f"out/labels/clip_{index:06d}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(found, expected)


def test_what_is_absent_reaches_no_label(trained: Path) -> None:
    network = load(trained, ["eval.flip=true", "eval.scales=0.5,1", "eval.window=32"])
    images = torch.randn(2, 3, *SIZE)
    whole = network.label(images)
    for there in (0, 1):
        blind = images.clone()
        blind[1 - there] = float("nan")
        found = network.label(blind, (there,))
        name = ("rgb", "depth")[there]
        assert list(found) == [name, "ensemble"]
        assert torch.equal(found[name], found["ensemble"])
        assert torch.equal(found[name], network.label(images, (there,))[name])
        assert not torch.equal(found[name], whole[name])  # which takes channels from the other


def test_a_folders_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("frame 10", "frame 9", "frame 2", "frame 010b", "start"):
        cv2.imwrite(str(folder / f"{name}.png"), np.zeros((2, 2), np.uint8))
    found = match_frames({"rgb": folder})["rgb"]
    assert [path.stem for path in found] == ["frame 2", "frame 9", "frame 10", "frame 010b", "start"]


def refused(trained: Path, tmp_path: Path, *overrides: str, **inputs: Path) -> str:
    with pytest.raises((UsageError, DataError)) as caught:
        predict_files(trained, inputs, tmp_path / "out", "ensemble", overrides)
    return str(caught.value)


def test_what_is_refused(trained: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", rgb_frames())
    folder = write_folder(tmp_path / "depth", depth_frames())
    short = write_folder(tmp_path / "short", depth_frames()[1:])
    small = write_folder(tmp_path / "small", [frame[::2, ::2] for frame in depth_frames()])
    grey = write_clip(tmp_path / "grey.mp4", [(frame >> 6).astype(np.uint8) for frame in depth_frames()])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:600])

    def error(*overrides: str, **inputs: Path) -> str:
        return refused(trained, tmp_path, *overrides, **inputs)

    assert "short holds 4 frames, but" in error(rgb=clip, depth=short)
    assert "data.depth_scale" in error(rgb=clip, depth=grey)
    assert "found colors" in error("data.depth_scale=25.5", rgb=clip, depth=clip)
    assert "broken.mp4: cannot be read as video" in error(rgb=broken, depth=folder)
    assert "neither a video nor a folder" in error(rgb=clip, depth=folder / "0.png")
    assert "0.png is 32x24, but" in error(rgb=clip, depth=small)
    assert not list((tmp_path / "out").rglob("*.*"))
    with pytest.raises(UsageError, match=r"^--input hha: only rgb and depth are read from video"):
        match_frames({"rgb": folder, "hha": clip})


@pytest.mark.parametrize("files", [{}, {"rgb": "x"}, {"rgb": "x", "depth": "y", "thermal": "z"}])
def test_a_scene_is_read_of_its_files(trained: Path, files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"^expected a file of each of rgb, depth, got "):
        load(trained).read(**files)


def test_classes_in_another_order_are_refused(trained: Path, tmp_path: Path) -> None:
    rooms = prepare_synthetic(tmp_path / "rooms", train=1, val=1, size=SIZE, seed=0)
    names = [f"class {label}" for label in range(11)]
    command = trained, [f"data.root={rooms}", "eval.sheet=0"], tmp_path / "found"

    def named(names: list[str]) -> None:
        (rooms / "classes.txt").write_text("\n".join(names))

    named([*names[:3], names[4], names[3], *names[5:]])
    with pytest.raises(UsageError, match="in another order: class 3 was class 3, here it is class 4"):
        evaluate_checkpoint(*command)
    for harmless in (names, ["void", *names[1:]]):
        named(harmless)
        evaluate_checkpoint(*command)
