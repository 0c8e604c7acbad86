"""Every layout: told from its folder, read to the values that went in, and trained on with one command."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LAYOUTS,
    NYU13,
    DataError,
    SegmentationSet,
    find_layout,
)
from models.data.layout_file import looks_like
from tests.helpers.trees import COUNTS, SIZE, TREES, Tree, grey, write


@pytest.fixture(scope="module", params=TREES)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tree]:
    return request.param, TREES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Tree:
    """A tree of its own for a test that breaks it."""
    return TREES[request.param](tmp_path)


def opened(tree: Tree, split: str = "train", **options) -> SegmentationSet:
    options = {"modalities": tree.modalities, "num_classes": tree.num_classes, **options}
    return SegmentationSet(tree.root, split, **options)


def test_all_layouts_have_a_tree() -> None:
    assert TREES.keys() == LAYOUTS.keys()


def test_told_from_the_folder(tree: tuple[str, Tree]) -> None:
    name, (root, *_) = tree
    assert [layout.name for layout in LAYOUTS.values() if looks_like(root, layout)] == [name]
    assert find_layout(root) is LAYOUTS[name]


@pytest.mark.parametrize("split", COUNTS)
def test_values(tree: tuple[str, Tree], split: str) -> None:
    name, made = tree
    dataset = opened(made, split)
    assert len(dataset) == COUNTS[split]
    for sample, scene in zip(dataset, made.scenes[split], strict=False):
        np.testing.assert_array_equal(sample.target, np.where(scene.classes < 0, 255, scene.classes))
        images = dict(zip(sample.modalities, sample.images, strict=True))
        expected = (scene.rgb / 255 - IMAGENET_MEAN) / IMAGENET_STD
        lossy = 0.0 if LAYOUTS[name].files["rgb"].endswith("png") else 0.1
        assert np.abs(images["rgb"] - expected).mean() <= max(lossy, 1e-6)
        if "hha" in images:
            assert np.abs(images["hha"] - expected[::-1]).mean() <= lossy
        if "depth" in images:
            if LAYOUTS[name].depth_scale is None:
                np.testing.assert_allclose(images["depth"][:, :, 0], grey(scene.depth) / 255, rtol=1e-6)
            else:  # disparity is stored in steps
                off = 0.06 if name == "cityscapes" else 1e-6
                np.testing.assert_allclose(images["depth"][:, :, 0], scene.depth, atol=off, rtol=1e-6)


def test_trains_with_one_command(tree: tuple[str, Tree], tmp_path: Path) -> None:
    _, (root, num_classes, _, modalities) = tree
    given = [
        f"data.root={root}",
        f"data.num_classes={num_classes}",
        f"data.modalities={','.join(modalities)}",
    ]
    tiny = ["data.batch_size=2", "data.crop=32", "data.shorter_side=32", "model.width=4", "eval.pictures=0"]
    run = [
        "run.steps=1",
        "run.log_steps=1",
        "run.workers=0",
        "eval.limit=1",
        f"run.output={tmp_path / 'run'}",
    ]
    assert main(["train", "synthetic_demo", *given, *tiny, *run]) == 0
    with (tmp_path / "run" / "losses.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert all(np.isfinite(float(row[f"loss/{name}"])) for name in ("loss", *modalities, "ensemble"))


def modality(tree: Tree, name: str, **options) -> np.ndarray:
    return opened(tree, modalities=(name,), **options)[0].images[0]


@pytest.mark.parametrize("name", ["nyu_cen", "nyu_esanet", "sun_original", "cityscapes"])
def test_computed_from_depth(name: str, tmp_path: Path) -> None:
    """Every representation, where the camera is known: of a slanted plane one normal; missing depth is 0."""
    tree = TREES[name](tmp_path)
    names = ("depth", "disparity", "normals", "hha", "points")
    images = depth, inverse, normals, encoded, points = [modality(tree, name) for name in names]
    assert [image.shape for image in images] == [(*SIZE, n) for n in (1, 1, 3, 3, 3)]
    scene = tree.scenes["train"][0]
    missing = scene.depth == 0
    known = depth[~missing]
    unit = 60 * 0.25 / 64 if name == "cityscapes" else 1  # pixels / 64, or 1 / m
    np.testing.assert_allclose(inverse[~missing], unit / known, rtol=1e-5)
    for image in images:
        assert not image[missing].any()
    np.testing.assert_allclose(np.linalg.norm(normals[~missing], axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(points[:, :, 2:], depth)
    first = encoded[:, :, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    np.testing.assert_allclose(255 * first[~missing], 310 / np.maximum(known[:, 0], 1), rtol=1e-4)


def test_what_needs_a_camera_or_a_scale_says_so(tmp_path: Path) -> None:
    handa, dformer = TREES["sun_handa"](tmp_path / "handa"), TREES["nyu_dformer"](tmp_path / "dformer")
    with pytest.raises(DataError, match=r"1\.png: its camera is not known .* give camera=fx,fy,cx,cy"):
        modality(handa, "hha")
    assert modality(handa, "hha", camera=(60.0, 60.0, 31.5, 23.5)).any()
    with pytest.raises(DataError, match=r"0001\.png: normals needs depth in meters, .* nyu_dformer"):
        modality(dformer, "normals")
    cropped = TREES["nyu_cen"](tmp_path / "cen")
    for path in (cropped.root / "depth").iterdir():
        write(path, np.full((48, 60), 5000, np.uint16))
        write(cropped.root / "masks" / path.name, np.zeros((48, 60), np.uint8))
    message = r"depth/000001\.png: the camera of 640x480 does not tell that of 60x48; give camera=fx,fy"
    with pytest.raises(DataError, match=message):
        modality(cropped, "normals")


def test_fields_override_the_layout(tmp_path: Path) -> None:
    tree = TREES["nyu_esanet"](tmp_path)
    doubled = opened(tree, depth_scale=500.0, bit_shift=1)[0].images[1]
    stored = np.rint(1000 * tree.scenes["train"][0].depth).astype(np.uint16)
    np.testing.assert_allclose(
        doubled[:, :, 0], ((stored >> 1) | (stored << 15)) / np.float32(500), rtol=1e-6
    )
    classes = tree.scenes["train"][0].classes
    np.testing.assert_array_equal(
        opened(tree, label_offset=2)[0].target, np.where(classes < 1, 255, classes - 1)
    )
    (tmp_path / "few.txt").write_text("0002\n")
    (tmp_path / "others.txt").write_text("0005\n")
    few = opened(tree, lists=("few.txt", "others.txt"))
    assert [sample.name for sample in (few[0],)] == ["0002"]
    assert opened(tree, "val", lists=("few.txt", "others.txt"))[0].name == "0005"
    with pytest.raises(ValueError, match=r"lists must be two paths"):
        opened(tree, lists=("few.txt",))
    with pytest.raises(ValueError, match=r"unknown layout 'nyu_esane': .*; did you mean 'nyu_esanet'"):
        opened(tree, layout="nyu_esane")


def test_merged_classes(tmp_path: Path) -> None:
    nyu, sun = TREES["nyu_cen"](tmp_path / "nyu"), TREES["sun_handa"](tmp_path / "sun")
    named = {
        "wall": "wall",
        "bookshelf": "furniture",
        "desk": "table",
        "night stand": "furniture",
        "bag": "objects",
    }
    for tree in (nyu, sun):
        before = opened(tree)
        after = opened(tree, num_classes=13, merge="nyu13")
        assert after.class_names[10] == "television"
        for one, other in zip(before, after, strict=False):
            for label in np.unique(one.target[one.target != 255]):
                (merged,) = np.unique(other.target[one.target == label])
                wanted = named.get(before.class_names[label], after.class_names[merged])
                assert after.class_names[merged] == wanted
            np.testing.assert_array_equal(one.target == 255, other.target == 255)
    assert opened(sun, num_classes=13, merge="nyu13").class_names == NYU13  # not SUN RGB-D's own
    with pytest.raises(
        DataError, match=r"37 classes, wall to bag, but num_classes=40; give data\.num_classes"
    ):
        opened(sun, num_classes=40)
    with pytest.raises(ValueError, match="merge=nyu13 gives 13 classes, not num_classes=40"):
        opened(nyu, merge="nyu13")


def broken(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "smaller":
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        write(path, image[:-8] if image.ndim == 2 else image[:-8, :, ::-1])
    else:
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        image[3, 4] = 200
        write(path, image)


FILES = {
    "nyu_cen": ("depth/000001.png", "masks/000001.png"),
    "nyu_lwrf": ("train_images/000000.png", "train_labels/000000.png"),
    "nyu_rgbx": ("HHA/1.jpg", "Label/1.png"),
    "nyu_dformer": ("Depth/0001.png", "Label/0001.png"),
    "sun_dformer": ("Depth/0001.png", "labels/0001.png"),
    "nyu_esanet": ("train/depth/0001.png", "train/labels_40/0001.png"),
    "sun_handa": ("sunrgbd_train_depth/1.png", "sunrgbd_train_test_labels/img-005051.png"),
    "sun_original": ("SUNRGBD/kv1/some data/train000/depth_bfx/0.png", None),
    "cityscapes": (
        "disparity/train/aachen/aachen_000000_000019_disparity.png",
        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
    ),
}
MESSAGES = {
    "missing": "no such file",
    "truncated": "broken or truncated",
    "smaller": "is 64x40, ",
    "label": "label 200 at row 3, column 4 is out of range: expected",
}


@pytest.mark.parametrize(
    ("made", "how", "name"),
    [
        (layout, how, labels if how == "label" else image)
        for layout, (image, labels) in FILES.items()
        for how in MESSAGES
        if how != "label" or labels  # those of sun_original are arrays: test_broken_arrays
    ],
    indirect=["made"],
)
def test_errors_name_the_file(made: Tree, how: str, name: str) -> None:
    broken(made.root / name, how)
    with pytest.raises(DataError) as caught:
        opened(made)[0]
    path = made.root / name
    assert str(path.with_suffix("")) in str(caught.value)
    assert MESSAGES[how] in str(caught.value)


@pytest.mark.parametrize("made", ["sun_original"], indirect=True)
def test_broken_arrays(made: Tree) -> None:
    path = made.root / "SUNRGBD/kv1/some data/train000/label/label.npy"
    np.save(path, np.full(SIZE, 38, np.uint8))
    with pytest.raises(DataError, match=r"label\.npy: label 38 .* expected 1 to 37"):
        opened(made)[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"label\.npy: broken or truncated"):
        opened(made)[0]
    np.save(path, np.zeros(SIZE))
    with pytest.raises(DataError, match=r"label\.npy: expected labels of 8 or 16 bits"):
        opened(made)[0]


@pytest.mark.parametrize("made", ["sun_original"], indirect=True)
def test_parallel_lists(made: Tree) -> None:
    path = made.root / "train_depth.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(f"SUNRGBD/{line}" for line in lines))  # as other preparations write them
    assert opened(made)[0].images[1].any()
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(DataError, match=r"train_depth\.txt: 2 lines, but train_rgb\.txt has 3"):
        opened(made)


@pytest.mark.parametrize("made", ["nyu_esanet"], indirect=True)
def test_two_files_of_one_name(made: Tree) -> None:
    shutil.copy(made.root / "train/rgb/0001.png", made.root / "train/rgb/0001.webp")
    with pytest.raises(DataError, match=r"0001\.png and 0001\.webp differ in the suffix only"):
        opened(made)


def test_no_layout_or_several(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"looks like none of nyu_cen \(rgb/ masks/ train\.txt\), .* data\.layout"
    ):
        find_layout(tmp_path)
    TREES["nyu_cen"](tmp_path)
    TREES["nyu_esanet"](tmp_path)
    with pytest.raises(DataError, match="looks like nyu_cen, nyu_esanet of"):
        find_layout(tmp_path)
    assert find_layout(tmp_path, "nyu_cen").name == "nyu_cen"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ('{"base": "nyu_ce"}', "did you mean 'nyu_cen'"),
        ('{"base": "nyu_cen", "depthscale": 1}', "unknown field 'depthscale'; expected"),
        ('{"base": ["nyu_cen"]}', "base is .* expected nyu_cen"),
        ('{"files": {"rgb": "a/{name}.*"}}', "files must give the paths of labels and of every modality"),
    ],
)
def test_bad_descriptions(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(DataError, match=rf"layout\.json: .*{message}"):
        find_layout(tmp_path)


def _files(**paths: object) -> str:
    return json.dumps({"rgb": "a/{name}.*", "labels": "b/{name}.*", **paths})


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("name", ["1"], "expected a text"),
        ("depth_scale", ['"1"', "0", "-5", "NaN", "Infinity", "true"], "expected stored units per meter"),
        ("label_offset", ["-1", "1.0", "true"], "expected an integer from 0"),
        ("ignore_index", ["-1", "65536", "null"], "expected an integer from 0"),
        ("bit_shift", ["-1", "16", "true"], "expected an integer from 0 to 15"),
        (
            "camera",
            ["[1, 2]", "[0, 1, 1, 1]", "[1, -1, 1, 1]", "[1, 1, NaN, 1]", '[1, 1, 1, "1"]'],
            "expected fx, fy, cx, cy",
        ),
        ("splits", ['["a"]', '["a", 1]', '"ab"'], "expected two names"),
        ("classes", ["[1]", '"ab"'], "expected a list of names"),
        ("label_map", ["[0.5]", "[-2]", "[255]", "[true]", "3"], "expected a list of classes"),
        ("label_shift", ['{"train": "1"}', '{"train": 0.5}', "[1]"], "expected an integer by split"),
        ("lines", ['"row"', "[]"], "expected paths, path or name"),
        (
            "ranges",
            [
                '{"rgb": 1}',
                '{"rgb": [1]}',
                '{"rgb": [5, 5]}',
                '{"rgb": [0, Infinity]}',
                '{"rgb": ["0", "1"]}',
            ],
            "expected two different numbers by modality",
        ),
        ("ranges", ['{"depht": [0, 1]}'], "of 'depht'; expected those of rgb, .*; did you mean 'depth'"),
        ("lists", ["1", "null"], "expected a path"),
        (
            "lists",
            ['"{split.txt"', '"{spilt}.txt"', '"{}.txt"', '"{split:d}.txt"'],
            "expected a path with {split}",
        ),
        ("files", ["[]", '{"rgb": 1, "labels": "b"}'], "expected a path for every kind of file"),
        (
            "files",
            [
                _files(**{"labels": path})
                for path in ("{nam}", "{name", "{}", "{name.x}", "{name[x]}", "{name:d}")
            ],
            "of labels is .*; expected a path with {name}, {number}, {split}, {rgb}$",
        ),
        ("files", [_files(rgb="{rgb}/a")], "of rgb is .*'rgb' is unknown.*; expected a path with"),
    ],
)
def test_bad_values(field: str, values: list[str], message: str, tmp_path: Path) -> None:
    for value in values:
        (tmp_path / "layout.json").write_text(f'{{"base": "nyu_cen", "{field}": {value}}}')
        with pytest.raises(DataError, match=rf"layout\.json: {field} .*{message}") as caught:
            find_layout(tmp_path)
        assert "\n" not in str(caught.value), value


def test_without_lists_names_come_of_the_first_kind(tmp_path: Path) -> None:
    for name, path in (("a", "all.png"), ("b 2", "{name}/{name}_rgb.png")):
        write(tmp_path / path.format(name=name), np.zeros((*SIZE, 3), np.uint8))
        write(tmp_path / f"labels/{name}.png", np.zeros(SIZE, np.uint8))
    files = {"rgb": "{name}/{name}_rgb.png", "labels": "labels/{name}.png"}
    (tmp_path / "layout.json").write_text(json.dumps({"lists": "", "files": files}))
    assert [sample.name for sample in SegmentationSet(tmp_path, "train", modalities=("rgb",))] == ["b 2"]
    (tmp_path / "layout.json").write_text(json.dumps({"lists": "", "files": files | {"rgb": "all.png"}}))
    with pytest.raises(DataError, match=r"files of rgb is 'all\.png'; expected {name} in it"):
        find_layout(tmp_path)


@pytest.mark.parametrize("made", ["nyu_cen"], indirect=True)
def test_a_description_changes_a_known_layout(made: Tree) -> None:
    (made.root / "layout.json").write_text(
        json.dumps({"base": "nyu_cen", "depth_scale": 2500, "ignore_index": 254})
    )
    sample = opened(made)[0]
    np.testing.assert_allclose(sample.images[1][:, :, 0], 2 * made.scenes["train"][0].depth, rtol=1e-6)
    write(made.root / "masks/000001.png", np.full(SIZE, 254, np.uint8))
    assert (opened(made)[0].target == 255).all()
