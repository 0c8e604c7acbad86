"""Folders as people's systems leave them: links, hidden files, byte order marks, accents; who may crop."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.data import LAYOUTS, DataError, Reader, SegmentationSet, find_layout, geometry, prepare_domains
from models.data.files import walk
from models.data.geometry import hha, surface_normals
from models.data.inputs import InputSpec, input_specs
from models.data.layouts import CAMERA, LABELS
from models.data.taskonomy import find_views
from models.segmentation.settings import DataSettings
from models.segmentation.visualize import show_input
from models.sources import images_of, match_files
from models.training import checkpoint
from models.training.errors import UsageError
from tests.helpers.trees import TREES, scene, units, void_255, write

SIZE = (6, 8)
MARK = "﻿".encode()
SYSTEM = ("._{}", ".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini", ".hidden.png", "._.DS_Store")
SUBFOLDERS = (".git", ".thumbnails", ".Trashes")
ACCENTED = "Münster_Café_Å"


def gray(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, SIZE).astype(np.uint8)


def own(root: Path, names: tuple[str, ...] = ("a", "b"), place: str = "{kind}/{{name}}.*", **fields) -> Path:
    """A folder of ``rgb`` and ``labels``; the labels tell which scene it is."""
    files = {kind: place.format(kind=kind) for kind in ("rgb", "labels")}
    root.mkdir(exist_ok=True)
    (root / "layout.json").write_text(json.dumps({"files": files, **fields}))
    for number, name in enumerate(names):
        for kind in files:
            path = root / place.format(kind=kind).replace("{split}", "train").format(name=name)
            image = gray(number) if kind == "labels" else np.zeros((*SIZE, 3), np.uint8)
            write(path.with_name(path.name.replace(".*", ".png")), image)
    return root


def opened(root: Path, **options) -> SegmentationSet:
    return SegmentationSet(root, "train", **{"modalities": ("rgb",), "num_classes": 3, **options})


def targets(dataset: SegmentationSet) -> list[np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [dataset[index].target for index in range(len(dataset))]


def assert_scenes(dataset: SegmentationSet, count: int) -> None:
    assert len(dataset) == count
    for number, target in enumerate(targets(dataset)):
        np.testing.assert_array_equal(target, gray(number))


def litter(folder: Path) -> None:
    """Files that macOS, Windows and version control leave in a folder are no images."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    for pattern in SYSTEM:
        for name in names:
            (folder / pattern.format(name)).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    for name in SUBFOLDERS:
        (folder / name).mkdir(exist_ok=True)
        for other in names:
            (folder / name / other).write_bytes(b"none")


# Hidden and system files


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("place", ["{kind}/{{split}}/{{name}}.*", "{kind}/{{split}}/{{name}}.png"])
def test_files_that_systems_leave_are_no_scenes(tmp_path: Path, place: str, listed: bool) -> None:
    own(tmp_path, place=place, lists="{split}.txt" if listed else "")
    if listed:
        (tmp_path / "train.txt").write_text("a\nb\n")
    for kind in ("rgb", "labels"):
        litter(tmp_path / kind / "train")
    litter(tmp_path / "rgb")
    assert_scenes(opened(tmp_path), 2)


def test_names_with_their_suffix_leave_system_files_out(tmp_path: Path) -> None:
    """A path that any file would fit: what systems leave fits it as well."""
    own(tmp_path, ("a.png", "b.png"), place="{kind}/{{split}}/{{name}}", lists="")
    litter(tmp_path / "rgb/train")
    assert_scenes(opened(tmp_path), 2)


def test_a_scene_and_its_resource_fork_do_not_differ_in_the_suffix(tmp_path: Path) -> None:
    own(tmp_path, names=("a", "b"))
    (tmp_path / "train.txt").write_text("a\nb\n")
    write(tmp_path / "rgb/a.jpg", np.zeros((*SIZE, 3), np.uint8))
    (tmp_path / "rgb/b.txt").write_text("notes")
    with pytest.raises(DataError, match=r"rgb: a\.jpg and a\.png differ in the suffix only"):
        opened(tmp_path)
    (tmp_path / "rgb/a.jpg").rename(tmp_path / "rgb/._a.jpg")
    assert_scenes(opened(tmp_path), 2)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".Tiff", ".npy"])
def test_folders_to_predict_of_hold_images_only(tmp_path: Path, suffix: str) -> None:
    for name in ("b", "a.1"):
        (tmp_path / f"{name}{suffix}").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    litter(tmp_path)
    found = images_of(tmp_path)
    assert found == {"a.1": tmp_path / f"a.1{suffix}", "b": tmp_path / f"b{suffix}"}


def test_a_folder_of_nothing_but_system_files_holds_no_image(tmp_path: Path) -> None:
    litter(tmp_path)
    (tmp_path / "._a.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds no image"):
        images_of(tmp_path)


def views(root: Path, building: str = "") -> Path:
    for point in range(6):
        for domain in ("rgb", "normal"):
            name = f"point_{point}_view_0_domain_{domain}.png"
            write(root / building / domain / name, np.zeros((*SIZE, 3), np.uint8))
    return root


def points(root: Path) -> list[str]:
    found = [find_views(root, split, ("normal", "rgb")) for split in ("train", "val")]
    return sorted(view.name for those in found for view in those)


def test_taskonomys_scan_leaves_hidden_files_out(tmp_path: Path) -> None:
    views(tmp_path)
    expected = points(tmp_path)
    assert len(expected) == 6
    for folder in ("rgb", "normal"):
        litter(tmp_path / folder)
    litter(tmp_path)
    assert points(tmp_path) == expected


# Links


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    """Data often lies on another disk, and is linked a folder or a part of one at a time."""
    own(tmp_path / "set", place="{kind}/{{split}}/{{name}}.*", lists="")
    for kind in ("rgb", "labels"):
        (tmp_path / f"set/{kind}/train").rename(tmp_path / f"{kind} elsewhere")
        (tmp_path / f"set/{kind}/train").symlink_to(tmp_path / f"{kind} elsewhere")
    assert_scenes(opened(tmp_path / "set"), 2)
    for kind in ("rgb", "labels"):
        (tmp_path / f"more {kind}").mkdir()
        image = gray(2) if kind == "labels" else np.zeros((*SIZE, 3), np.uint8)
        write(tmp_path / f"more {kind}/c.png", image)
        (tmp_path / f"{kind} elsewhere/more").symlink_to(tmp_path / f"more {kind}")
    dataset = opened(tmp_path / "set")
    assert [sample["rgb"].stem for sample in dataset.scenes] == ["a", "b", "c"]
    assert_scenes(dataset, 3)


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "mutual"])
def test_loops_of_links_are_noticed(tmp_path: Path, target: str) -> None:
    """Every scene is found once, and the walk ends."""
    own(tmp_path, place="{kind}/{{split}}/{{name}}.*", lists="")
    place = tmp_path / "rgb/train"
    if target == "mutual":
        (tmp_path / "other").mkdir()
        (place / "to other").symlink_to(tmp_path / "other")
        (tmp_path / "other/back").symlink_to(place)
    elif target == "sub":
        (place / "sub").mkdir()
        (place / "sub/up").symlink_to(place)
    else:
        (place / "loop").symlink_to(place / target)
    assert_scenes(opened(tmp_path), 2)
    folders = [folder for folder, _, _ in walk(place)]
    assert len(folders) == len({folder.resolve() for folder in folders}) <= 2


def test_taskonomys_buildings_may_be_links_and_loops(tmp_path: Path) -> None:
    views(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/house").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "root")
    found = points(tmp_path / "root")
    assert found == [f"house_point_{point}_view_0" for point in range(6)]


def test_a_broken_link_is_a_missing_file(tmp_path: Path) -> None:
    own(tmp_path)
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "labels/a.png").unlink()
    (tmp_path / "labels/a.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"labels/a\.png: listed in train\.txt, but there is no such file"):
        opened(tmp_path)


# Lists as Windows writes them


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("what", ["train.txt", "layout.json", "classes.txt", "all"])
def test_marks_and_line_endings_change_nothing(tmp_path: Path, what: str, ending: str, mark: bytes) -> None:
    own(tmp_path)
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "classes.txt").write_text("soil\ncrop\nweed\n")
    for name in ("train.txt", "layout.json", "classes.txt"):
        if what in (name, "all"):
            text = (tmp_path / name).read_text().replace("\n", ending)
            (tmp_path / name).write_bytes(mark + text.encode())
    dataset = opened(tmp_path)
    assert_scenes(dataset, 2)
    assert dataset.class_names == ("soil", "crop", "weed")


@pytest.mark.parametrize("name", ["train.txt", "layout.json", "classes.txt"])
def test_files_of_another_encoding_are_named(tmp_path: Path, name: str) -> None:
    """Notepad's "Unicode" is UTF-16."""
    own(tmp_path)
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "classes.txt").write_text("soil\ncrop\nweed\n")
    (tmp_path / name).write_bytes((tmp_path / name).read_text().encode("utf-16"))
    with pytest.raises(DataError, match=rf"{name}: "):
        opened(tmp_path)


WITH_PATHS = ("nyu_cen", "nyu_lwrf", "nyu_dformer", "sun_dformer", "sun_original")


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("layout", WITH_PATHS)
def test_backslashes_in_lists_of_known_layouts(tmp_path: Path, layout: str, mark: bytes) -> None:
    """Windows' separators, and its mark and line endings beside: the layout is still told from the folder."""
    tree = TREES[layout](tmp_path)
    options = {"modalities": ("rgb",), "num_classes": tree.num_classes}
    expected = SegmentationSet(tmp_path, "train", **options)
    for path in tmp_path.glob("*.*"):
        if path.suffix in (".txt", ".nyu"):
            path.write_bytes(mark + path.read_bytes().replace(b"/", b"\\").replace(b"\n", b"\r\n"))
    found = SegmentationSet(tmp_path, "train", **options)
    assert found.layout.name == layout
    assert found.scenes == expected.scenes


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ("name", "part\\{}"),
        ("name", "part/{}.png"),
        ("path", ".\\rgb\\part\\{}.png"),
        ("paths", "rgb\\{0}.png labels\\{0}.png"),
        ("paths", "C\\..\\rgb\\{0}.png\tlabels\\{0}.png"),
    ],
)
def test_backslashes_in_lists_of_every_kind(tmp_path: Path, lines: str, line: str) -> None:
    folder = "{kind}/part" if lines == "name" else "{kind}"
    own(tmp_path, place=f"{folder}/{{{{name}}}}.*", lines=lines)
    (tmp_path / "C").mkdir()
    if lines == "name":
        own_files = {kind: f"{kind}/{{name}}.*" for kind in ("rgb", "labels")}
        (tmp_path / "layout.json").write_text(json.dumps({"files": own_files, "lines": lines}))
    (tmp_path / "train.txt").write_text("\r\n".join(line.format(name) for name in "ab"))
    assert_scenes(opened(tmp_path), 2)


def test_backslashes_and_marks_in_taskonomys_lists(tmp_path: Path) -> None:
    views(tmp_path)
    for split, those in (("train", range(4)), ("val", range(4, 6))):
        lines = [f"{{domain}}\\point_{point}_view_0_domain_{{domain}}.png" for point in those]
        (tmp_path / f"{split}.txt").write_bytes(MARK + "\r\n".join(lines).encode())
    assert len(points(tmp_path)) == 6


# Accents


def rename_all(root: Path, form: str) -> None:
    """Every name below a folder in one Unicode form, as file systems store it."""
    for path in sorted(root.rglob("*"), key=lambda path: -len(path.parts)):
        path.rename(path.with_name(unicodedata.normalize(form, path.name)))


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
@pytest.mark.parametrize("lines", ["name", "path", "paths"])
@pytest.mark.parametrize("suffix", [".*", ".png"])
def test_accents_are_the_same_letter_in_lists_and_on_disk(
    tmp_path: Path, suffix: str, lines: str, listed: str, disk: str
) -> None:
    """macOS stores ü as u and two dots; other systems as one letter."""
    names = (f"{ACCENTED}_1", f"{ACCENTED}_2")
    own(tmp_path, names, place=f"{{kind}}/{{{{name}}}}{suffix}", lines=lines)
    line = {"name": "{0}", "path": "rgb/{0}.png", "paths": "rgb/{0}.png\tlabels/{0}.png"}[lines]
    text = "\n".join(line.format(name) for name in names)
    (tmp_path / "train.txt").write_text(unicodedata.normalize(listed, text), encoding="utf-8")
    rename_all(tmp_path, disk)
    assert_scenes(opened(tmp_path), 2)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", [False, True])
def test_accents_in_the_folders_of_layout_json(tmp_path: Path, form: str, listed: bool) -> None:
    """The description is written on one system and the folder on another."""
    place = f"{ACCENTED}/{{kind}}/{{{{name}}}}.png"
    own(tmp_path, place=place, lists="{split}.txt" if listed else "")
    (tmp_path / "train.txt").write_text("a\nb\n")
    description = (tmp_path / "layout.json").read_text()
    other = "NFD" if form == "NFC" else "NFC"
    text = unicodedata.normalize(other, json.dumps(json.loads(description), ensure_ascii=False))
    rename_all(tmp_path, form)
    (tmp_path / "layout.json").write_text(text, encoding="utf-8")
    assert_scenes(opened(tmp_path), 2)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_two_kinds_of_files_without_lists(tmp_path: Path, forms: tuple[str, str]) -> None:
    own(tmp_path, (f"{ACCENTED}_1", f"{ACCENTED}_2"), place="{kind}/{{name}}.*", lists="")
    for kind, form in zip(("rgb", "labels"), forms, strict=True):
        rename_all(tmp_path / kind, form)
    assert_scenes(opened(tmp_path), 2)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_when_files_are_matched_to_predict(tmp_path: Path, forms: tuple[str, str]) -> None:
    folders = {modality: tmp_path / modality for modality in ("rgb", "depth")}
    for (modality, folder), form in zip(folders.items(), forms, strict=True):
        folder.mkdir()
        for number in (1, 2):
            (folder / unicodedata.normalize(form, f"{ACCENTED}_{number}_{modality}.png")).write_bytes(b"")
    found = match_files(folders, {name: f"_{name}" for name in folders})
    assert list(found) == [unicodedata.normalize("NFC", f"{ACCENTED}_{number}") for number in (1, 2)]
    for files in found.values():
        assert {modality: path.parent for modality, path in files.items()} == folders
        assert all(path.is_file() for path in files.values())


def test_names_that_differ_in_their_letters_stay_apart(tmp_path: Path) -> None:
    own(tmp_path, ("a", "ä"))
    (tmp_path / "train.txt").write_text("a\nä\n", encoding="utf-8")
    assert_scenes(opened(tmp_path), 2)


# Crops: of the paper's archive alone, whose RGB and labels lack the frame's white border


SMALL, WHOLE = (43, 56), (48, 64)  # about as 425x560 is to 480x640
TOP, LEFT = (WHOLE[0] - SMALL[0]) // 2, (WHOLE[1] - SMALL[1]) // 2
MIDDLE = np.s_[TOP : TOP + SMALL[0], LEFT : LEFT + SMALL[1]]


def room(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB, whole millimetres of depth, classes; a floor that rises and a wall."""
    one = scene(seed, 40)
    rgb = cv2.resize(one.rgb, size[::-1])
    rows, columns = np.mgrid[: size[0], : size[1]] * (48 / size[0])
    depth = np.rint(1000 * np.minimum(2.5 + 0.01 * columns, 90 / (rows + 8))) / 1000
    classes = cv2.resize(void_255(one.classes), size[::-1], interpolation=cv2.INTER_NEAREST)
    return rgb, depth, classes


def archive(
    root: Path, small: tuple[int, int] = SMALL, whole: tuple[int, int] = WHOLE, count: int = 2
) -> Path:
    for split, first in (("train", 0), ("val", count)):
        lines = []
        for number in range(first, first + (count if split == "train" else 1)):
            rgb, depth, classes = room(number, whole)
            top, left = (whole[0] - small[0]) // 2, (whole[1] - small[1]) // 2
            cut = np.s_[top : top + small[0], left : left + small[1]]
            write(root / f"rgb/{number}.png", rgb[cut])
            write(root / f"masks/{number}.png", classes[cut])
            write(root / f"depth/{number}.png", units(depth, 5000))
            lines.append(f"rgb/{number}.png\tmasks/{number}.png\tdepth/{number}.png\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("modalities", [("rgb", "depth"), ("depth", "rgb"), ("depth",), ("rgb",)])
def test_the_papers_archive_crops_each_input_by_itself(tmp_path: Path, modalities: tuple[str, ...]) -> None:
    """RGB is of the labels' size already; of the depth the middle belongs to them."""
    archive(tmp_path)
    sample = SegmentationSet(tmp_path, "train", modalities=modalities)[1]
    rgb, depth, classes = room(1, WHOLE)
    mean, std = (np.array(each) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = {"rgb": (rgb[MIDDLE] / 255.0 - mean) / std, "depth": depth[MIDDLE][:, :, None]}
    for name, image in zip(modalities, sample.images, strict=True):
        np.testing.assert_allclose(image, expected[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sample.target, classes[MIDDLE])


@pytest.mark.parametrize("what", ["normals", "hha", "points", "disparity"])
def test_what_is_computed_is_computed_of_the_whole_depth(tmp_path: Path, what: str) -> None:
    """Its camera is that of the whole frame; of a crop with that camera floors would tilt."""
    archive(tmp_path)
    depth = room(0, WHOLE)[1].astype(np.float32)
    camera = LAYOUTS["nyu_cen"].camera.scaled(*WHOLE)
    if what == "normals":
        expected = surface_normals(depth, camera)
    elif what == "points":
        expected = geometry.points(depth, camera)
    elif what == "hha":
        encoded = hha(depth, camera)
        known = encoded.any(axis=-1, keepdims=True)
        expected = (encoded / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225) * known
    else:
        expected = 1 / depth[:, :, None]
    found = SegmentationSet(tmp_path, "train", modalities=("rgb", what))[0].images[1]
    np.testing.assert_allclose(found, expected[MIDDLE], rtol=1e-4, atol=1e-5)
    assert found.any()


def test_depth_is_normalized_but_where_it_is_missing(tmp_path: Path) -> None:
    archive(tmp_path)
    for number in (0, 1):
        depth = units(room(number, WHOLE)[1], 5000)
        depth[::3] = 0
        write(tmp_path / f"depth/{number}.png", depth)
    plain = SegmentationSet(tmp_path, "train", modalities=("rgb", "depth", "normals"))
    scaled = SegmentationSet(
        tmp_path, "train", modalities=("rgb", "depth", "normals"), depth_mean=2.5013, depth_std=0.5
    )
    (rgb, depth, normals), (same, found, also) = plain[0].images, scaled[0].images
    assert (depth == 0).any()
    np.testing.assert_allclose(found, np.where(depth == 0, 0, (depth - 2.5013) / 0.5), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(rgb, same)
    np.testing.assert_array_equal(normals, also)  # of meters
    assert input_specs(plain.reader)[1] == InputSpec("depth", "metre")
    assert input_specs(scaled.reader)[1] == InputSpec("depth", "metre", mean=(2.5013,), std=(0.5,))
    pictures = [
        show_input(np.tile(image, 3).transpose(2, 0, 1), "depth", DataSettings(**settings))
        for image, settings in ((depth, {}), (found, {"depth_mean": 2.5013, "depth_std": 0.5}))
    ]
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
    with pytest.raises(ValueError, match="depth_mean and depth_std are of depth, none of rgb,normals"):
        SegmentationSet(tmp_path, "train", modalities=("rgb", "normals"), depth_std=0.5)


@pytest.mark.parametrize("order", [("rgb", "depth"), ("depth", "rgb"), ("depth", "rgb", "normals")])
def test_without_labels_the_smallest_image_tells_the_size(tmp_path: Path, order: tuple[str, ...]) -> None:
    archive(tmp_path)
    reader = Reader(LAYOUTS["nyu_cen"], order)
    images = reader.read({kind: tmp_path / kind / "1.png" for kind in ("rgb", "depth")})
    labeled = SegmentationSet(tmp_path, "train", modalities=order)[1].images
    for found, expected in zip(images, labeled, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((86, 112), r"a copy of fewer pixels"),
        ((129, 168), r"a copy of fewer pixels"),
        ((42, 64), r"smaller than its labels"),
        ((48, 55), r"smaller than its labels"),
        ((43, 55), r"smaller than its labels"),
        ((20, 30), r"smaller than its labels"),
    ],
)
@pytest.mark.parametrize("kind", ["rgb", "depth"])
def test_copies_of_other_resolution_and_smaller_inputs_are_refused(
    tmp_path: Path, kind: str, size: tuple[int, int], words: str
) -> None:
    archive(tmp_path)
    rgb, depth, _ = room(0, size)
    write(tmp_path / f"{kind}/0.png", rgb if kind == "rgb" else units(depth, 5000))
    with pytest.raises(DataError, match=words) as caught:
        SegmentationSet(tmp_path, "train")[0]
    for part in (f"{kind}/0.png", "masks/0.png", f"{size[1]}x{size[0]}", "56x43"):
        assert part in str(caught.value)


@pytest.mark.parametrize("scale", [0.6, 0.75, 1.5])
def test_resized_copies_are_no_crops(tmp_path: Path, scale: float) -> None:
    """Labels of 640x480 resized beside whole depth: warned of, as a crop cannot be ruled out, or refused."""
    size = (round(480 * scale / 4), round(640 * scale / 4))
    archive(tmp_path, small=(60, 80), whole=(60, 80))
    large = (120, 160)
    rgb, depth, classes = room(0, large)
    write(tmp_path / "depth/0.png", units(depth, 5000))
    write(tmp_path / "rgb/0.png", cv2.resize(rgb, size[::-1]))
    write(tmp_path / "masks/0.png", cv2.resize(classes, size[::-1], interpolation=cv2.INTER_NEAREST))
    if scale > 1:
        with pytest.raises(DataError, match=r"depth/0\.png is 160x120, smaller than"):
            SegmentationSet(tmp_path, "train")[0]
        return
    with pytest.warns(
        UserWarning, match=f"label maps of {size[1]}x{size[0]} are taken for the middle of images of 160x120"
    ):
        SegmentationSet(tmp_path, "train")[0]


def enlarge(path: Path) -> tuple[int, int]:
    """Give an image a border of two pixels; its new height and width."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    bordered = cv2.copyMakeBorder(image, 2, 2, 3, 3, cv2.BORDER_REPLICATE)
    assert cv2.imwrite(str(path), bordered)
    return bordered.shape[:2]


@pytest.mark.parametrize("layout", [name for name in TREES if name != "nyu_cen"])
def test_other_known_layouts_refuse_inputs_of_another_size(tmp_path: Path, layout: str) -> None:
    """Both files and both sizes are said; nothing is cropped in silence."""
    tree = TREES[layout](tmp_path)
    dataset = SegmentationSet(tmp_path, "val", modalities=tree.modalities, num_classes=tree.num_classes)
    kinds = [kind for kind in dataset.reader.files() if kind != CAMERA]
    for kind in kinds:
        paths = dataset.scenes[1]
        kept = paths[kind].read_bytes()
        height, width = enlarge(paths[kind])
        with pytest.raises(DataError) as caught:
            dataset.sample(1)
        for part in (paths[kind], paths[LABELS], f"{width}x{height}", "64x48"):
            assert str(part) in str(caught.value)
        paths[kind].write_bytes(kept)
        assert dataset.sample(1).target.shape == (48, 64)


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind in ("rgb", "thermal") for change in ("larger", "smaller", "turned")]
    + [("rgb", "twice")],  # of other kinds a copy of other resolution is resized: test_sizes
)
def test_an_own_layout_refuses_inputs_of_another_size(tmp_path: Path, kind: str, change: str) -> None:
    size = {"larger": (8, 10), "twice": (12, 16), "smaller": (5, 8), "turned": (8, 6)}[change]
    own(tmp_path)
    description = json.loads((tmp_path / "layout.json").read_text())
    description["files"]["thermal"] = "thermal/{name}.png"
    description["modalities"] = {"thermal": {"kind": "intensity"}}
    (tmp_path / "layout.json").write_text(json.dumps(description))
    (tmp_path / "train.txt").write_text("a\nb\n")
    for name in "ab":
        write(tmp_path / f"thermal/{name}.png", gray(0) + 1)
    write(tmp_path / f"{kind}/a.png", np.ones((*size, 3) if kind == "rgb" else size, np.uint8))
    with pytest.raises(DataError) as caught:
        opened(tmp_path, modalities=("rgb", "thermal")).sample(0)
    for part in (f"{kind}/a.png", "labels/a.png", f"{size[1]}x{size[0]}", "8x6"):
        assert part in str(caught.value)


@pytest.mark.parametrize("base", [None, "nyu_esanet"])
def test_an_archive_like_the_papers_is_cropped_only_where_the_layout_says_so(
    tmp_path: Path, base: str | None
) -> None:
    archive(tmp_path)
    files = {"rgb": "rgb/{name}.*", "depth": "depth/{name}.*", "labels": "masks/{name}.*"}
    description = {"files": files, "lines": "path", "lists": "{split}.txt", "splits": ["train", "val"]}
    description |= {"depth_scale": 5000, "label_offset": 0, **({"base": base} if base else {})}
    (tmp_path / "layout.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"depth/0\.png is 64x48, but its labels .*masks/0\.png are 56x43"):
        SegmentationSet(tmp_path, "train").sample(0)
    (tmp_path / "layout.json").write_text('{"base": "nyu_cen", "depth_scale": 2500}')
    depth = SegmentationSet(tmp_path, "train").sample(0).images[1]
    np.testing.assert_allclose(depth[:, :, 0], 2 * room(0, WHOLE)[1][MIDDLE], rtol=1e-6)


def test_domains_are_derived_of_the_papers_archive(tmp_path: Path) -> None:
    archive(tmp_path / "set")
    out = prepare_domains(tmp_path / "out", tmp_path / "set", processes=1)
    sources = (out / "sources.txt").read_text().split("\n")
    for line in filter(None, sources):
        point, name = line.split("\t")
        rgb, depth, _ = room(int(Path(name).stem), WHOLE)
        files = {domain: out / domain / f"{point}_domain_{domain}.png" for domain in ("rgb", "depth_zbuffer")}
        stored = {domain: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for domain, path in files.items()}
        np.testing.assert_array_equal(stored["rgb"][:, :, ::-1], rgb[MIDDLE])
        np.testing.assert_allclose(stored["depth_zbuffer"] / 512.0, depth[MIDDLE], atol=0.5 / 512 + 1e-6)
    assert len(sources) == 4


def test_the_papers_archive_trains_a_step(tmp_path: Path, one_thread: Callable[[], None]) -> None:
    """At its own sizes, 560x425 and 640x480, with HHA that is computed."""
    archive(tmp_path / "set", (425, 560), (480, 640))
    settings = ["data.modalities=rgb,hha", "model.encoder=resnet18", "model.frozen_statistics=false"]
    settings += ["model.width=4", "data.batch_size=2", "data.crop=32", "data.shorter_side=32"]
    settings += ["eval.pictures=0", "run.steps=1", "run.workers=0", "run.device=cpu"]
    command = ["train", "nyudv2_cen_refinenet101", f"data.root={tmp_path / 'set'}", *settings]
    assert main([*command, f"run.output={tmp_path / 'run'}"]) == 0
    contents = checkpoint.load(tmp_path / "run/last.pt")[1]
    assert contents["layout"]["crop_to_labels"] is True
    assert [spec["name"] for spec in contents["inputs"]] == ["rgb", "hha"]
    row = (tmp_path / "run/metrics.csv").read_text().splitlines()[1].split(",")
    assert all(np.isfinite(float(value)) for value in row if value)


@pytest.mark.parametrize("files", [False, True])
def test_only_the_archives_own_files_are_cropped(tmp_path: Path, files: bool) -> None:
    """A layout that is based on it, with files of its own, is another data set."""
    archive(tmp_path)
    fields = {"files": {**LAYOUTS["nyu_cen"].files}} if files else {"depth_scale": 5000}
    (tmp_path / "layout.json").write_text(json.dumps({"base": "nyu_cen", **fields}))
    assert find_layout(tmp_path).crop_to_labels is not files
