"""predict --watch: which scenes are complete, which are done, and how it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import models
from models import watching
from models.__main__ import main
from models.data import DataError
from models.watching import Watch
from tests.helpers import translation_runs
from tests.helpers.clips import depth_frames, rgb_frames, save_narrow
from tests.helpers.signals import until

Files = dict[str, Path]


class Folders:
    """Watched folders of two kinds, and results that name what they are of."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("rgb", "depth", "out"):
            (root / name).mkdir()

    def watch(self) -> Watch:
        kinds = {kind: self.root / kind for kind in ("rgb", "depth")}
        return Watch(kinds, lambda name: [self.root / "out" / name])

    def put(self, kind: str, name: str, text: str = "whole") -> None:
        (self.root / kind / name).write_text(text)

    def predict(self, name: str, files: Files) -> None:
        if any(path.read_text() == "broken" for path in files.values()):
            raise DataError(f"{files['rgb']}: broken")
        (self.root / "out" / name).write_text("done")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def settle(watch: Watch, folders: Folders) -> list[str]:
    """Look, and predict what is ready."""
    ready = watch.look()
    for name, files in ready.items():
        watch.settle(name, files, folders.predict)
    return list(ready)


def test_a_scene_is_ready_once_it_is_complete_and_stays_as_it_is(folders: Folders) -> None:
    watch = folders.watch()
    folders.put("rgb", "a.png")
    assert [settle(watch, folders) for _ in range(3)] == [[], [], []]
    folders.put("depth", "a.npy", "hal")
    assert settle(watch, folders) == []
    folders.put("depth", "a.npy", "half")  # it grows
    assert settle(watch, folders) == []
    assert settle(watch, folders) == ["a"]
    assert settle(watch, folders) == []
    assert (watch.predicted, watch.failed, watch.skipped) == (1, 0, 0)


def test_empty_hidden_and_other_files_are_no_scenes(folders: Folders) -> None:
    watch = folders.watch()
    for kind in ("rgb", "depth"):
        folders.put(kind, "a.png", "")
        folders.put(kind, ".b.png")
        folders.put(kind, "c.png.part")
    assert [settle(watch, folders) for _ in range(3)] == [[], [], []]
    assert watch.waiting() == []


def test_what_is_done_is_skipped_by_the_next_watch(folders: Folders) -> None:
    for kind in ("rgb", "depth"):
        folders.put(kind, "a.png")
        folders.put(kind, "b.png")
    first = folders.watch()
    assert [settle(first, folders) for _ in range(2)] == [[], ["a", "b"]]
    later = time.time() + 60
    os.utime(folders.root / "rgb" / "b.png", (later, later))
    second = folders.watch()
    assert [settle(second, folders) for _ in range(2)] == [[], ["b"]]
    assert (second.predicted, second.skipped) == (1, 1)
    os.utime(folders.root / "rgb" / "a.png", (later, later))  # while it is watched
    assert [settle(second, folders) for _ in range(3)] == [[], ["a"], []]


def test_a_broken_scene_is_noted_once_and_tried_again_when_it_changes(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = folders.watch()
    folders.put("rgb", "a.png", "broken")
    folders.put("depth", "a.png")
    assert [settle(watch, folders) for _ in range(4)] == [[], ["a"], [], []]
    told = f"note: {folders.root}/rgb/a.png: broken; the scene a is skipped until its files change\n"
    assert capsys.readouterr().err == told
    folders.put("rgb", "a.png", "mended")
    assert [settle(watch, folders) for _ in range(3)] == [[], ["a"], []]
    assert (watch.predicted, watch.failed) == (1, 1)


def test_two_files_of_a_scene_are_noted_once(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    watch = folders.watch()
    for name in ("a.jpg", "a.png"):
        folders.put("rgb", name)
    folders.put("depth", "a.png")
    folders.put("depth", "b.png")
    assert [settle(watch, folders) for _ in range(2)] == [[], ["a"]]
    assert capsys.readouterr().err.count("a.png is skipped: ") == 1
    assert watch.told() == "1 scenes predicted, 0 failed, 0 were done before, 1 lack files (b)"


# ---- the command


def write_scene(root: Path, name: str, index: int) -> None:
    """Write a scene as a careful program does: under another name first."""
    images = {"rgb": rgb_frames()[index][:, :, ::-1], "depth": depth_frames()[index]}
    for kind, image in images.items():
        (root / kind).mkdir(parents=True, exist_ok=True)
        part = root / kind / f".{name}.png"
        assert cv2.imwrite(str(part), image)
        part.rename(root / kind / f"{name}.png")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_watch(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 0.01)
    net = save_narrow(tmp_path / "net.pt")
    inbox, output = tmp_path / "inbox", tmp_path / "out"
    for index, name in enumerate(("a", "b")):
        write_scene(inbox, name, index)
    (inbox / "rgb" / "a.png").write_bytes((inbox / "rgb" / "a.png").read_bytes()[:99])
    command = ["predict", str(net), "--watch", str(inbox), "--output", str(output)]
    thread = until(output / "overlays" / "b.png", stop=stop)
    assert main(command) == 0
    thread.join()
    printed = capsys.readouterr()
    assert printed.out == "1 scenes predicted, 1 failed, 0 were done before, 0 lack files\n"
    assert printed.err.count("a.png: broken or truncated image") == 1
    expected = models.load(net).predict(**{kind: inbox / kind / "b.png" for kind in ("rgb", "depth")})
    found = cv2.imread(str(output / "labels" / "b.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(found, expected["ensemble"])
    # Started again, with the scene that was broken in order.
    before = (output / "labels" / "b.png").stat().st_mtime_ns
    write_scene(inbox, "a", 2)
    thread = until(output / "overlays" / "a.png", stop=stop)
    assert main(command) == 0
    thread.join()
    assert capsys.readouterr().out == "1 scenes predicted, 0 failed, 1 were done before, 0 lack files\n"
    assert (output / "labels" / "b.png").stat().st_mtime_ns == before


def test_watch_of_one_modality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 0.01)
    net = save_narrow(tmp_path / "net.pt", "data.modalities=rgb")
    write_scene(tmp_path / "in", "a", 0)
    thread = until(tmp_path / "out/overlays/a.png", stop=signal.SIGTERM)
    # The folder of colors itself, as there is but one modality.
    assert (
        main(["predict", str(net), "--watch", str(tmp_path / "in/rgb"), "--output", str(tmp_path / "out")])
        == 0
    )
    thread.join()
    assert "1 scenes predicted" in capsys.readouterr().out


def test_watch_of_a_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching, "INTERVAL", 0.01)
    views = translation_runs.prepare_views(tmp_path / "views")
    run, output = tmp_path / "run", tmp_path / "out"
    assert main(translation_runs.command(views, run, "run.steps=1", "data.domains=normal,edge_texture")) == 0
    capsys.readouterr()
    thread = until(output / "ensemble" / "point_9_view_0.png", stop=signal.SIGINT)
    assert main(["predict", str(run), "--watch", str(views), "--output", str(output)]) == 0
    thread.join()
    written = list((output / "ensemble").iterdir())
    assert capsys.readouterr().out.startswith(f"{len(written)} scenes predicted, 0 failed, ")
    assert main(["predict", str(run), "--camera", "0", "--output", str(output)]) == 2
    assert "--camera: translation takes images" in capsys.readouterr().err


def test_refused_watches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = save_narrow(tmp_path / "net.pt", "fusion=concat")
    (tmp_path / "in" / "rgb").mkdir(parents=True)
    output = tmp_path / "out"

    def refused(*options: str) -> str:
        assert main(["predict", str(net), "--output", str(output), *options]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    assert f"--watch: {tmp_path}/none does not exist" in refused(f"--watch={tmp_path}/none")
    assert "in/depth is no folder, and the files of depth are to be there" in refused(
        f"--watch={tmp_path}/in"
    )
    assert "--input hha is no input" in refused(f"--watch={tmp_path}/in", f"--input=hha={tmp_path}")
    assert f"--depth: {net} is no folder" in refused(f"--watch={tmp_path}/in", f"--depth={net}")
    assert "exclude each other" in refused(f"--watch={tmp_path}/in", "--camera", "0")
