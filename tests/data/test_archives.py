"""Preparations from miniature archives of the official structure."""

import json
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.data import DataError, SegmentationSet, archives, nyudv2, prepare_nyudv2, prepare_sunrgbd, sunrgbd

h5py = pytest.importorskip("h5py")
io = pytest.importorskip("scipy.io")

SIZE = (12, 16)


class Nyu(NamedTuple):
    """The archive's folder and what it holds."""

    folder: Path
    images: np.ndarray  # [N, H, W, 3]
    depths: np.ndarray  # [N, H, W] in metres
    labels: np.ndarray  # [N, H, W] of 894
    classes: np.ndarray  # 1 ... 40 of each of the 894


TRAIN, VAL = (2, 5, 6), (1, 4)  # image 3 is in neither


@pytest.fixture
def nyu(tmp_path: Path) -> Nyu:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, *SIZE, 3), np.uint8)
    depths = rng.uniform(0.7, 10, (6, *SIZE)).astype(np.float32)
    depths[1, 0, :3] = 0, np.nan, 14
    labels = rng.integers(0, 895, (6, *SIZE)).astype(np.uint16)
    classes = rng.integers(1, 41, 894)
    folder = tmp_path / "archive"
    folder.mkdir()
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depths.transpose(0, 2, 1)
        file["labels"] = labels.transpose(0, 2, 1)
    io.savemat(
        folder / "splits.mat",
        {"trainNdxs": np.array(TRAIN, float)[:, None], "testNdxs": np.array(VAL, np.uint16)[:, None]},
    )
    names = np.array([f"class {i}" for i in range(40)], object)
    io.savemat(
        folder / "classMapping40.mat",
        {"mapClass": classes[None].astype(float), "className": names[None]},
        do_compression=True,
    )
    return Nyu(folder, images, depths, labels, classes)


def archive(nyu: Nyu) -> Path:
    return nyu.folder / "nyu_depth_v2_labeled.mat"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_nyudv2(nyu: Nyu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["prepare", "nyudv2", str(out), "--archive", str(archive(nyu))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"data.root={out}"
    for split, numbers in (("train", TRAIN), ("val", VAL)):
        dataset = SegmentationSet(out, split)
        assert dataset.layout.name == "nyu_cen"
        assert [sample.name for sample in map(dataset.__getitem__, range(len(dataset)))] == [
            f"{number:06d}" for number in numbers
        ]
        for index, number in enumerate(numbers):
            sample = dataset[index]
            stored = cv2.imread(str(out / f"rgb/{number:06d}.png"))[:, :, ::-1]
            np.testing.assert_array_equal(stored, nyu.images[number - 1])
            label = nyu.labels[number - 1].astype(int)
            expected = np.where(label == 0, 255, nyu.classes[np.maximum(label, 1) - 1] - 1)
            np.testing.assert_array_equal(sample.target, expected)
            depth = nyu.depths[number - 1]
            depth = np.where(np.isfinite(depth) & (depth < 13), depth, 0)
            np.testing.assert_allclose(sample.images[1][:, :, 0], depth, atol=1.01e-4)


class Sun(NamedTuple):
    """The release's folder, and of each of its images by their folders what they hold."""

    folder: Path
    scenes: dict[str, tuple[bytes, bytes, np.ndarray]]
    test: list[str]
    train: list[str]


@pytest.fixture
def sun(tmp_path: Path) -> Sun:
    """Five images; meta data and labels in another order than the splits."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "release"
    scenes, meta, labels = {}, [], []
    names = [f"SUNRGBD/kv{1 + i % 2}/data/{i:04d} of b" for i in range(5)]
    for name in names:
        picture = cv2.imencode(".jpg", rng.integers(0, 256, (*SIZE, 3), np.uint8))[1].tobytes()
        depth = cv2.imencode(".png", rng.integers(0, 2**16, SIZE, np.uint16))[1].tobytes()
        label = rng.integers(0, 38, SIZE, np.uint8)
        scenes[name] = picture, depth, label
        labels.append(label)
        base = f"/n/fs/sun3d/data/{name}"
        meta.append(
            {"rgbpath": f"{base}/image/a.jpg", "rgbname": "a.jpg", "depthname": "b.png", "K": np.eye(3)}
        )
        for file, content in (
            ("image/a.jpg", picture),
            ("depth_bfx/b.png", depth),
            ("depth/b.png", b""),
            ("intrinsics.txt", b"20 0 8 0 21 6 0 0 1 \n"),
        ):
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    toolbox = folder / "SUNRGBDtoolbox"
    (toolbox / "Metadata").mkdir(parents=True)
    (toolbox / "traintestSUNRGBD").mkdir()
    kinds = [(field, object) for field in meta[0]]
    table = np.array([tuple(entry.values()) for entry in meta], dtype=kinds)
    io.savemat(toolbox / "Metadata/SUNRGBDMeta.mat", {"SUNRGBDMeta": table[None]})
    test, train = [names[3], names[0]], [names[4], names[1], names[2]]
    split = {
        key: np.array([f"/n/fs/sun3d/data/{name}/" for name in value], object)[None]
        for key, value in (("alltest", test), ("alltrain", train))
    }
    io.savemat(toolbox / "traintestSUNRGBD/allsplit.mat", split)
    with h5py.File(toolbox / "Metadata/SUNRGBD2Dseg.mat", "w", userblock_size=512) as file:
        references = file.create_dataset("SUNRGBD2Dseg/seglabel", (5, 1), h5py.ref_dtype)
        for i, label in enumerate(labels):
            references[i, 0] = file.create_dataset(f"#refs#/{i}", data=label.T).ref
    return Sun(folder, scenes, test, train)


@pytest.mark.parametrize("zipped", [False, True])
def test_sunrgbd(sun: Sun, tmp_path: Path, zipped: bool) -> None:
    out, release = tmp_path / "out", sun.folder
    if zipped:
        release = tmp_path / "SUNRGBD.zip"
        with ZipFile(release, "w") as file:
            for path in (sun.folder / "SUNRGBD").rglob("*"):
                file.write(path, path.relative_to(sun.folder))
    toolbox = sun.folder / "SUNRGBDtoolbox"
    command = ["prepare", "sunrgbd", str(out), "--archive", str(release), "--toolbox", str(toolbox)]
    assert main(command) == 0
    for split, names in (("train", sun.train), ("val", sun.test)):
        dataset = SegmentationSet(out, split, num_classes=37, modalities=("depth", "normals"))
        assert (dataset.layout.name, len(dataset)) == ("sun_handa", len(names))
        for index, name in enumerate(names):
            sample = dataset[index]
            picture, depth, label = sun.scenes[name]
            folder = "train" if split == "train" else "test"
            assert (out / f"SUNRGBD-{folder}_images/img-{index + 1:06d}.jpg").read_bytes() == picture
            np.testing.assert_array_equal(sample.target, np.where(label == 0, 255, label.astype(int) - 1))
            stored = cv2.imdecode(np.frombuffer(depth, np.uint8), cv2.IMREAD_UNCHANGED)
            millimetres = (stored >> 3) | (stored << 13)
            np.testing.assert_allclose(sample.images[0][:, :, 0], millimetres / np.float32(1000), rtol=1e-6)
            number = index + 1 + (len(sun.test) if split == "train" else 0)
            assert sample.name == f"img-{number:06d}"


def prepared(request: pytest.FixtureRequest, name: str, out: Path) -> Path:
    if name == "nyudv2":
        return prepare_nyudv2(out, archive(request.getfixturevalue("nyu")))
    made = request.getfixturevalue("sun")
    return prepare_sunrgbd(out, made.folder, made.folder / "SUNRGBDtoolbox")


@pytest.mark.parametrize("name", ["nyudv2", "sunrgbd"])
def test_stopped_and_resumed(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of every file in turn, it goes on, keeps what was whole, and ends the same."""
    whole = snapshot(prepared(request, name, tmp_path / "whole"))
    out = tmp_path / "stopped"
    write = Path.write_bytes
    stops = 0
    while True:
        left = [stops % 6 + 2]

        def stopping(path: Path, content: bytes, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] == 0:
                write(path, content[: len(content) // 2])
                raise KeyboardInterrupt
            return write(path, content)

        before = snapshot(out) if out.exists() else {}
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", stopping)
            try:
                prepared(request, name, out)
                break
            except KeyboardInterrupt:
                stops += 1
        after = snapshot(out)
        for file in before.keys() & whole.keys() - {"prepared.json"}:
            assert after[file][0] == before[file][0] == whole[file][0]
    assert stops > 3
    files = {file: content[0] for file, content in snapshot(out).items()}
    assert files == {file: content[0] for file, content in whole.items()}


@pytest.mark.parametrize("name", ["nyudv2", "sunrgbd"])
def test_once_complete_it_is_left_alone(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prepared(request, name, tmp_path / "out")
    before = snapshot(out)
    prepared(request, name, out)
    assert "already there" in capsys.readouterr().out
    assert snapshot(out) == before
    gone = max(file for file in before if file.endswith(".png"))
    (out / gone).unlink()
    prepared(request, name, out)
    assert (out / gone).read_bytes() == before[gone][0]


@pytest.mark.parametrize("name", ["nyudv2", "sunrgbd"])
def test_other_contents_are_refused(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(DataError, match=r"out: not empty, and no prepared data set"):
        prepared(request, name, out)
    (out / "prepared.json").write_text(json.dumps({"dataset": "other", "complete": True}))
    with pytest.raises(DataError, match=r"out: made from something else: .*other"):
        prepared(request, name, out)
    (out / "prepared.json").write_text("{")
    with pytest.raises(DataError, match=r"prepared\.json: broken"):
        prepared(request, name, out)


def test_broken_nyudv2(nyu: Nyu, tmp_path: Path) -> None:
    def error(message: str) -> None:
        with pytest.raises(DataError, match=message):
            prepare_nyudv2(tmp_path / "out", archive(nyu))
        assert not (tmp_path / "out").exists()

    io.savemat(nyu.folder / "splits.mat", {"trainNdxs": [1, 7], "testNdxs": [2]})
    error(r"splits\.mat: the train indices are not among the 6 images")
    io.savemat(nyu.folder / "splits.mat", {"trainNdxs": [1, 2]})
    error(r"splits\.mat: expected the variable testNdxs; it holds trainNdxs")
    (nyu.folder / "splits.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    error(r"splits\.mat: broken or truncated")
    (nyu.folder / "splits.mat").unlink()
    error(r"splits\.mat: no such file; expected the split of NYUDv2")
    io.savemat(nyu.folder / "splits.mat", {"trainNdxs": [1, 2], "testNdxs": [3]})
    io.savemat(nyu.folder / "classMapping40.mat", {"mapClass": [0, 41]})
    error(r"classMapping40\.mat: mapClass has values from 0 to 41, expected 1 to 40")
    io.savemat(nyu.folder / "classMapping40.mat", {"mapClass": nyu.classes})
    with h5py.File(archive(nyu), "a") as file:
        del file["depths"]
    error(r"labeled\.mat: expected the variable depths; it holds images, labels")
    archive(nyu).write_bytes(archive(nyu).read_bytes()[:3000])
    error(r"labeled\.mat: broken or truncated")


def test_broken_sunrgbd(sun: Sun, tmp_path: Path) -> None:
    toolbox = sun.folder / "SUNRGBDtoolbox"

    def error(message: str, release: Path = sun.folder) -> None:
        with pytest.raises(DataError, match=message):
            prepare_sunrgbd(tmp_path / "out", release, toolbox)

    (tmp_path / "SUNRGBD.zip").write_bytes(b"PK but no zip")
    error(r"SUNRGBD\.zip: broken or truncated, or no zip file", tmp_path / "SUNRGBD.zip")
    error(r"expected the folder SUNRGBD of the release in it", toolbox)
    with h5py.File(toolbox / "Metadata/SUNRGBD2Dseg.mat", "a") as file:
        file["#refs#/3"][...] = 38
    error(r"SUNRGBD2Dseg\.mat: image 4 has label 38, above 37")
    (sun.folder / sun.test[0] / "depth_bfx/b.png").unlink()
    with h5py.File(toolbox / "Metadata/SUNRGBD2Dseg.mat", "a") as file:
        file["#refs#/3"][...] = 37
    error(r"cannot read SUNRGBD/.*/depth_bfx/b\.png of it")
    io.savemat(toolbox / "traintestSUNRGBD/allsplit.mat", {"alltest": ["/x/SUNRGBD/none"], "alltrain": ["y"]})
    error(r"SUNRGBDMeta\.mat: nothing about SUNRGBD/none, which .*allsplit\.mat names")


@pytest.mark.parametrize("module", [nyudv2, sunrgbd])
def test_without_the_libraries(
    module: object, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    request.getfixturevalue("nyu" if name == "nyudv2" else "sun")

    def absent(wanted: str) -> None:
        raise ImportError(wanted)

    monkeypatch.setattr(archives.importlib, "import_module", absent)
    with pytest.raises(DataError, match=r"is needed to read .*: pip install 'cen_ext\[prepare\]'"):
        prepared(request, name, tmp_path / "out")
