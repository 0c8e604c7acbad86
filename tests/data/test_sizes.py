"""Modalities of another size than their scene's, and of another camera: resized, registered or refused."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from models.__main__ import main
from models.data import (
    DataError,
    Layout,
    Reader,
    SegmentationSet,
    broaden,
    find_layout,
    layout_from_plain,
    prepare_domains,
    to_plain,
)
from models.data.geometry import points, surface_normals
from models.data.images import Frame
from models.data.kinds import Modality
from models.data.registration import register
from models.data.sizes import Reference, fitted, nearest
from models.segmentation.build import build_reader
from models.segmentation.load import load
from models.segmentation.settings import DataSettings
from models.training.errors import UsageError
from tests.helpers.planes import CAMERA, COLOR, LARGE, OWN, POSE, RIG, SIZE, SLANTED, phone, seen
from tests.helpers.trees import write


def opened(root: Path, *modalities: str, split: str = "train") -> SegmentationSet:
    return SegmentationSet(root, split, modalities=modalities or ("rgb", "depth"), num_classes=2)


def stored_depth(root: Path, name: str = "a") -> np.ndarray:
    image = cv2.imread(str(root / f"depth/{name}.png"), cv2.IMREAD_UNCHANGED)
    return (image / np.float32(1000)).astype(np.float32)


# Resizing


@pytest.mark.parametrize("new", [(48, 64), (96, 128), (192, 256), (37, 91), (1440, 1920), (12, 16), (7, 5)])
def test_pixel_centers_correspond(new: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(1, 10**6, (*SIZE, 2))
    rows = [int((i + 0.5) * SIZE[0] / new[0] + 1e-12) for i in range(new[0])]
    columns = [int((j + 0.5) * SIZE[1] / new[1] + 1e-12) for j in range(new[1])]
    np.testing.assert_array_equal(nearest(image, new), image[np.ix_(rows, columns)])


@pytest.mark.parametrize("kind", ["depth", "normals", "points", "categorical", "disparity", "hha"])
@pytest.mark.parametrize("new", [(96, 128), (12, 16), (192, 256)])
def test_surfaces_are_never_averaged_and_what_is_missing_stays_so(kind: str, new: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = rng.uniform(1, 5, (*SIZE, 1)).astype(np.float32)
    image[rng.random(SIZE) < 0.3] = 0
    found = fitted(image, kind, Modality(kind="depth"), Path("x.png"), Reference("y", new))
    assert set(found.ravel().tolist()) <= set(image.ravel().tolist())
    np.testing.assert_array_equal(found == 0, nearest(image == 0, new))
    factor = new[0] // SIZE[0]
    if factor:
        np.testing.assert_array_equal(found, np.kron(image, np.ones((factor, factor, 1))))


def test_brightness_is_averaged_over_what_is_measured(tmp_path: Path) -> None:
    """Missing pixels, 0, pull nothing down."""
    root = phone(tmp_path / "set", modalities={"amplitude": {"kind": "intensity", "missing": 0}})
    image = np.full(SIZE, 51, np.uint8)
    image[10:20, 10:30] = 0
    write(root / "amplitude/a.png", image)
    found = opened(root, "rgb", "amplitude").sample(0).images[1]
    known = found > 0
    np.testing.assert_allclose(found[known], 0.2, rtol=1e-5)
    assert known.mean() == pytest.approx(1 - 200 / (SIZE[0] * SIZE[1]), abs=1e-6)


def sized(root: Path, told: dict[str, Any] | None = None, name: str = "depth") -> Path:
    """The phone's files described as if depth and color were of one camera, the depth's."""
    return phone(root, modalities={} if told is None else {name: told}, camera=list(CAMERA[:4]))


@pytest.mark.parametrize("told", [None, {"size": "any"}])
def test_depth_of_fewer_pixels_is_resized(tmp_path: Path, told: dict[str, Any] | None) -> None:
    root = sized(tmp_path / "set", told)
    sample = opened(root).sample(0)
    np.testing.assert_array_equal(sample.images[1][:, :, 0], np.kron(stored_depth(root), np.ones((4, 4))))
    np.testing.assert_array_equal(opened(root, "depth", "rgb").sample(0).images[0], sample.images[1])


@pytest.mark.parametrize("new", [(192, 256), (24, 32)])
@pytest.mark.parametrize("modality", ["normals", "hha"])
def test_what_is_computed_of_resized_depth_is_the_planes(
    tmp_path: Path, new: tuple[int, int], modality: str
) -> None:
    """Of depth at its own size, whose pixels the camera is in, whatever the labels' size is."""
    depth = (1000 * seen([SLANTED], CAMERA, SIZE)[0]).astype(np.float32) / 1000
    layout = Layout(
        "own",
        {"depth": "d", "labels": "l"},
        camera=CAMERA,
        depth_scale=1000.0,
    )
    frames = {"depth": Frame("depth", depth)}
    (found,) = Reader(layout, (modality,)).read(frames, new)
    (at_its_size,) = Reader(layout, (modality,)).read(frames)
    assert found.shape == (*new, 3)
    np.testing.assert_array_equal(found, nearest(at_its_size, new))
    if modality == "normals":
        expected = np.cross(SLANTED.down, SLANTED.right)
        expected /= np.linalg.norm(expected)
        known = found.any(axis=-1)
        assert known.mean() > 0.9
        np.testing.assert_allclose(found[known] @ (expected * -np.sign(expected[2])), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "told", "words"),
    [
        ((48, 62), None, r"another proportion of the sides, as another camera has; give its camera and pose"),
        ((64, 48), None, r"another proportion"),
        ((46, 64), {"kind": "depth"}, r"another proportion .*\"size\": \"any\" of the modality"),
        ((48, 64), {"size": "same"}, r"\"size\": \"same\" in layout.json forbids"),
        ((168, 224), None, r"about the same size, as of a crop or a border"),
        ((216, 288), None, r"about the same size"),
        (
            (48, 64),
            {"kind": "color"},
            r"label maps are drawn on color images of their size; \"size\": \"any\"",
        ),
    ],
)
def test_what_is_no_copy_is_refused(
    tmp_path: Path, size: tuple[int, int], told: dict[str, Any] | None, words: str
) -> None:
    root = sized(tmp_path / "set", told)
    color = told == {"kind": "color"}
    image = np.full((*size, 3) if color else size, 200, np.uint8 if color else np.uint16)
    for name in "abc":
        write(root / f"depth/{name}.png", image)
    message = rf"depth/a\.png is {size[1]}x{size[0]}, but its labels .*a\.png are 256x192: .*{words}"
    with pytest.raises(DataError, match=message) as caught:
        opened(root).sample(0)
    assert "\n" not in str(caught.value)
    if told != {"size": "same"}:
        (root / "layout.json").write_text(
            json.dumps(
                json.loads((root / "layout.json").read_text())
                | {"modalities": {"depth": {**(told or {}), "size": "any"}}}
            )
        )
        assert opened(root).sample(0).images[1].shape[:2] == LARGE


@pytest.mark.parametrize(
    "size", [(48, 64), (38, 51), (39, 51), (39, 52), (38, 50), (36, 48), (384, 512), (575, 767)]
)
def test_a_pixel_of_rounding_is_no_other_proportion(tmp_path: Path, size: tuple[int, int]) -> None:
    """192x256 scaled and rounded up or down along either side."""
    layout = Layout("own", {"rgb": "r", "depth": "d", "labels": "l"}, depth_scale=1000.0)
    frames = {
        "rgb": Frame("rgb", np.zeros((*LARGE, 3), np.uint8)),
        "depth": Frame("d", np.ones(size, np.uint16)),
    }
    assert Reader(layout, ("rgb", "depth")).read(frames, LARGE)[1].shape == (*LARGE, 1)


def test_color_may_be_of_another_size_where_the_layout_says_so(tmp_path: Path) -> None:
    root = sized(tmp_path / "set", {"size": "any"}, "rgb")
    for name in "abc":
        write(root / f"rgb/{name}.png", np.full((*SIZE, 3), 128, np.uint8))
    sample = opened(root).sample(0)
    assert sample.images[0].shape == (*LARGE, 3)
    np.testing.assert_allclose(
        sample.images[0][50, 50],
        (128 / 255 - np.array((0.485, 0.456, 0.406))) / (0.229, 0.224, 0.225),
        rtol=1e-5,
    )


def test_the_papers_archive_resizes_where_it_is_told_to(tmp_path: Path) -> None:
    """Its larger images are cropped, and copies of fewer pixels refused, without a word."""
    root = tmp_path
    for folder, image in (
        ("rgb", np.zeros((*LARGE, 3), np.uint8)),
        ("masks", np.zeros(LARGE, np.uint8)),
        ("depth", np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE)),
    ):
        write(root / folder / "1.png", image)
    (root / "train.txt").write_text("rgb/1.png masks/1.png depth/1.png\n")
    (root / "layout.json").write_text(json.dumps({"base": "nyu_cen"}))
    with pytest.raises(DataError, match=r"depth/1\.png is 64x48, smaller than its labels"):
        opened(root).sample(0)
    told = {"base": "nyu_cen", "depth_scale": 1, "modalities": {"depth": {"size": "any"}}}
    (root / "layout.json").write_text(json.dumps(told))
    found = opened(root).sample(0).images[1][:, :, 0]
    np.testing.assert_array_equal(found, np.kron(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE), np.ones((4, 4))))


@pytest.mark.parametrize("order", [("rgb", "depth"), ("depth", "rgb"), ("depth", "normals", "rgb")])
def test_without_labels_images_are_as_with_them(tmp_path: Path, order: tuple[str, ...]) -> None:
    """The color image tells the size wherever it stands, and it is said once."""
    root = sized(tmp_path / "set")
    dataset = opened(root, *order)
    paths = {name: path for name, path in dataset.scenes[0].items() if name != "labels"}
    with pytest.warns(UserWarning, match="^depth is 64x48 and is resized to 256x192$"):
        found = dataset.reader.read(paths)
    for image, expected in zip(found, dataset.sample(0).images, strict=True):
        np.testing.assert_array_equal(image, expected)


def test_the_first_look_says_what_is_resized(tmp_path: Path) -> None:
    root = sized(tmp_path / "set")
    with pytest.warns(UserWarning, match="train: depth is 64x48 and is resized to 256x192"):
        opened(root)[0]
    sized(tmp_path / "set", {"size": "any"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(root)[0]


# Registration


def test_a_set_is_registered(tmp_path: Path) -> None:
    root = phone(tmp_path / "set")
    sample = opened(root, "rgb", "depth", "amplitude", "normals", "points", "disparity").sample(0)
    _, depth, amplitude, normals, placed, disparity = sample.images
    expected = register(stored_depth(root), CAMERA, RIG, COLOR, LARGE)
    np.testing.assert_array_equal(depth[:, :, 0], expected.depth)
    stored = cv2.imread(str(root / "amplitude/a.png"), cv2.IMREAD_UNCHANGED)[:, :, None] / np.float32(255)
    np.testing.assert_allclose(amplitude, expected.carried(stored), rtol=1e-6)
    np.testing.assert_array_equal(normals, surface_normals(expected.depth, COLOR))
    np.testing.assert_array_equal(placed, points(expected.depth, COLOR))
    known = depth > 0
    np.testing.assert_allclose(disparity[known], 1 / depth[known], rtol=1e-6)
    # And the labels, which the color camera sees, lie on it: a box at 1.4 m, a wall at 3 m.
    box = (sample.target == 1)[:, :, None]
    inside = cv2.erode(box[:, :, 0].astype(np.uint8), np.ones((9, 9)))[:, :, None] > 0
    assert inside.sum() > 500
    assert depth[inside].max() < 1.6
    outside = cv2.dilate(box[:, :, 0].astype(np.uint8), np.ones((9, 9)))[:, :, None] == 0
    assert depth[outside & known].min() > 2.5


def test_what_is_registered_with_depth_needs_no_depth_among_the_inputs(tmp_path: Path) -> None:
    root = phone(tmp_path / "set")
    dataset = opened(root, "rgb", "amplitude")
    assert dataset.reader.files() == ("rgb", "amplitude", "depth")
    assert dataset.reader.kinds() == ("color", "sparse")
    np.testing.assert_array_equal(
        dataset.sample(1).images[1], opened(root, "rgb", "depth", "amplitude").sample(1).images[2]
    )


def test_the_view_is_that_of_the_color_image_or_of_its_camera(tmp_path: Path) -> None:
    """With a size beside the camera, depth alone is registered, and resized as the labels are."""
    root = phone(tmp_path / "set", camera=[*COLOR[:4], 256, 192])
    expected = opened(root).sample(0).images[1]
    alone = opened(root, "depth")
    np.testing.assert_array_equal(alone.sample(0).images[0], expected)
    (unlabeled,) = alone.reader.read({"depth": root / "depth/a.png"})
    np.testing.assert_array_equal(unlabeled, expected)
    for name in "abc":
        labels = cv2.imread(str(root / f"labels/{name}.png"), cv2.IMREAD_UNCHANGED)
        write(root / f"labels/{name}.png", labels[2::4, 2::4])
    np.testing.assert_array_equal(alone.sample(0).images[0], expected[2::4, 2::4])
    layout = find_layout(root)
    plain = Reader(replace(layout, camera=COLOR), ("depth",))
    with pytest.raises(
        DataError, match=r"depth/a\.png: the size of the images that depth is registered to is"
    ):
        plain.read({"depth": root / "depth/a.png"})


def test_cameras_of_their_own_files_are_the_reference(tmp_path: Path) -> None:
    root = phone(tmp_path / "set")
    expected = [sample.images[1] for sample in map(opened(root).sample, range(2))]
    description = json.loads((root / "layout.json").read_text())
    description["files"]["camera"] = "camera/{name}.txt"
    (root / "layout.json").write_text(json.dumps(description | {"camera": None}))
    (root / "camera").mkdir()
    for name, shift in (("a", 0), ("b", 5), ("c", 0), ("f", 0)):
        fx, fy, cx, cy = COLOR[:4]
        (root / f"camera/{name}.txt").write_text(f"{fx} 0 {cx + shift}\n0 {fy} {cy}\n0 0 1\n")
    dataset = opened(root)
    np.testing.assert_array_equal(dataset.sample(0).images[1], expected[0])
    found = dataset.sample(1).images[1]
    np.testing.assert_allclose(found[:, 5:], expected[1][:, :-5], rtol=1e-5)


def test_the_record_carries_cameras_and_poses(tmp_path: Path) -> None:
    layout = find_layout(phone(tmp_path / "set", camera=[*COLOR[:4], 256, 192]))
    assert layout.modality("depth").camera == CAMERA
    assert layout.modality("depth").pose == RIG
    assert layout_from_plain(json.loads(json.dumps(to_plain(layout)))) == layout
    plain = to_plain(layout)
    for told in plain["modalities"].values():  # as versions before wrote them
        for name in ("size", "camera", "pose", "registered_with"):
            told.pop(name)
    assert layout_from_plain(plain).modality("depth") == Modality(kind="depth")


TURNED = [[*row[:3], 0] for row in ((0, 1, 0), (1, 0, 0), (0, 0, 1))]  # of determinant -1
LONG = [[1.02 * value for value in row] for row in POSE]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"depth": {"pose": POSE}}, r"pose of depth needs its camera beside it: fx, fy, cx, cy"),
        ({"depth": {"camera": OWN["camera"]}}, r"camera of depth needs its pose beside it: three rows"),
        ({"depth": {**OWN, "pose": TURNED}}, r"pose of depth is no rotation and shift: .*determinant 1"),
        ({"depth": {**OWN, "pose": LONG}}, r"pose of depth is no rotation and shift: .*orthonormal to"),
        (
            {"depth": {**OWN, "pose": POSE[:2]}},
            r"pose of depth is \[\[.*; expected three rows of four numbers",
        ),
        ({"depth": {**OWN, "pose": [1, 2]}}, r"pose of depth is \[1, 2\]"),
        ({"depth": {**OWN, "camera": [0, 1, 2, 3]}}, r"camera of depth is \[0, 1, 2, 3\]; expected fx, fy"),
        ({"depth": {**OWN, "camera": [1, 1, 2, 3, 64]}}, r"camera of depth is \[1, 1, 2, 3, 64\]"),
        ({"depth": {**OWN, "camera": [1, 1, 2, 3, 64, 0]}}, r"camera of depth is .*width and height"),
        ({"depth": {**OWN, "size": "any"}}, r"size of depth is that of the images it is registered to"),
        ({"depth": {"size": "large"}}, r"size of depth is 'large'; expected any, .* or same"),
        ({"amplitude": OWN}, r"pose of amplitude is for depth, but its kind is None.*registered_with"),
        (
            {"amplitude": {"registered_with": "depth"}},
            r"registered_with of amplitude is 'depth'; expected depth with",
        ),
        (
            {"depth": OWN, "amplitude": {"registered_with": "dept"}},
            r"registered_with of amplitude is 'dept'; .*such as depth; did you mean 'depth'",
        ),
        ({"depth": OWN, "amplitude": {"registered_with": 3}}, r"registered_with of amplitude is 3"),
        (
            {"depth": OWN, "amplitude": {"kind": "depth", "registered_with": "depth"}},
            r"registered_with of amplitude .* its kind is depth; give it a camera and a pose",
        ),
        (
            {"depth": OWN, "amplitude": {"kind": "normals", "registered_with": "depth"}},
            r"registered_with of amplitude .* its kind is normals: have it computed",
        ),
        (
            {"depth": {**OWN, "registered_with": "depth"}},
            r"registered_with of depth is 'depth', but it has a pose of its own",
        ),
        (
            {"depth": OWN, "amplitude": {"registered_with": "depth", "size": "any"}},
            r"size of amplitude is that of the images",
        ),
    ],
)
def test_wrong_descriptions_are_refused_naming_the_field(
    tmp_path: Path, told: dict[str, Any], words: str
) -> None:
    files = {kind: f"{kind}/{{name}}.png" for kind in ("rgb", "depth", "amplitude", "labels")}
    (tmp_path / "layout.json").write_text(json.dumps({"files": files, "modalities": told}))
    with pytest.raises(DataError, match=rf"layout\.json: .*{words}") as caught:
        find_layout(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_registering_needs_is_asked_for_before_any_file_is_read(tmp_path: Path) -> None:
    root = phone(tmp_path / "set", camera=None)
    settings = DataSettings(root=root, modalities=("rgb", "depth"), num_classes=2)
    with pytest.raises(
        UsageError, match=r"^data: camera is not known, to whose images the pose of depth leads"
    ):
        build_reader(settings)
    assert build_reader(replace(settings, modalities=("rgb",))).files() == ("rgb",)
    reader = build_reader(replace(settings, camera=COLOR[:4], given=("camera",)))
    assert reader.layout.camera == COLOR


def test_depth_that_cannot_be_registered_is_refused_naming_its_file(tmp_path: Path) -> None:
    root = phone(tmp_path / "set", depth_scale=None)
    with pytest.raises(DataError, match=r"depth/a\.png: depth has a pose, which needs meters, .*depth_scale"):
        opened(root).sample(0)
    phone(root)
    write(root / "amplitude/b.png", np.ones((24, 32), np.uint8))
    with pytest.raises(DataError, match=r"amplitude/b\.png is 32x24, but .*depth/b\.png, .* is 64x48"):
        opened(root, "rgb", "amplitude").sample(1)
    phone(root, modalities={"depth": {**OWN, "camera": [*CAMERA[:4], 64, 64]}})
    with pytest.raises(
        DataError, match=r"depth/a\.png: the camera of 64x64 does not tell .*; correct camera of"
    ):
        opened(root).sample(0)


def told_by_the_data_command(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    settings = [f"data.root={root}", "data.num_classes=2", "data.modalities=rgb,depth", "run.workers=0"]
    settings += ["data.crop=96", "data.shorter_side=96", "eval.sheet=2"]
    assert main(["data", "synthetic_demo", *settings, "--output", str(root / "sheet.png")]) == 0
    printed = capsys.readouterr()
    assert cv2.imread(str(root / "sheet.png")) is not None
    return printed.out, printed.err


def test_the_data_command_says_what_is_left_and_what_looks_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = phone(tmp_path / "set")
    share = (opened(root).sample(0).images[1] > 0).mean()
    out, err = told_by_the_data_command(root, capsys)
    assert out.count(f"  depth registered: {share:.1%} of pixels have a value\n") == 2
    assert "depth: 16 bits and 1 channel, 64x48, " in out
    assert "pose" not in err
    millimeters = [[*row[:3], 1000 * row[3]] for row in POSE]
    phone(root, modalities={"depth": {**OWN, "pose": millimeters}})
    _, err = told_by_the_data_command(root, capsys)
    assert re.search(r"train: depth: its pose puts its camera 64 m away .*: give the shift in meters", err)
    assert re.search(r"train: depth: once registered 100% of the pixels are missing: does its pose map", err)
    sized(root)
    out, err = told_by_the_data_command(root, capsys)
    assert out.count("  depth is 64x48 and is resized to 256x192\n") == 2


def test_a_network_is_fed_by_predict_as_it_was_in_training(tmp_path: Path) -> None:
    """Trained a step on registered depth and amplitude; predict reads the same of the same files."""
    root = phone(tmp_path / "set")
    settings = [f"data.root={root}", "data.num_classes=2", "data.modalities=rgb,depth,amplitude"]
    settings += ["data.batch_size=2", "data.crop=64", "data.shorter_side=64", "run.steps=1", "run.workers=0"]
    settings += ["run.device=cpu", "model.width=4", "model.encoder=resnet18"]
    settings += ["model.frozen_statistics=false", "eval.pictures=0", "eval.sheet=0", "eval.limit=1"]
    run = tmp_path / "run"
    assert main(["train", "nyudv2_cen_refinenet50", *settings, f"run.output={run}"]) == 0
    trained = load(run, ["run.device=cpu"])
    sample = opened(root, "rgb", "depth", "amplitude", split="val").sample(1)
    expected = np.stack([image.transpose(2, 0, 1) for image in broaden(sample.images, 3)])
    files = {kind: root / kind / "e.png" for kind in ("rgb", "depth", "amplitude")}
    found = trained.read(**files)
    assert torch.equal(found, torch.from_numpy(expected))
    flags = [part for kind, path in files.items() for part in ("--input", f"{kind}={path}")]
    (root / "layout.json").unlink()  # predict needs the run alone
    assert main(["predict", str(run), *flags, "--output", str(tmp_path / "out")]) == 0
    labels = cv2.imread(str(tmp_path / "out/labels/e.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels, trained.label(found)["ensemble"].numpy())
    assert labels.shape == LARGE


def test_domains_are_derived_of_registered_depth(tmp_path: Path) -> None:
    root = phone(tmp_path / "set")
    out = prepare_domains(tmp_path / "out", root, processes=1)
    stored = cv2.imread(
        str(out / "depth_zbuffer/point_0_view_0_domain_depth_zbuffer.png"), cv2.IMREAD_UNCHANGED
    )
    depth = opened(root).sample(0).images[1][:, :, 0]
    np.testing.assert_array_equal(stored == 65535, depth == 0)
    np.testing.assert_allclose(stored[depth > 0] / 512, depth[depth > 0], atol=0.5 / 512 + 1e-6)
    assert json.loads((out / "prepared.json").read_text())["pose"] == list(RIG)
    sized(root)
    with pytest.raises(DataError, match=r"rgb/a\.png is 256x192, but its depth is 64x48"):
        prepare_domains(tmp_path / "others", root, processes=1)
