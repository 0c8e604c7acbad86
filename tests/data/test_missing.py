"""Scenes without a file of some modality: refused, left out, or kept without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.data import Batch, DataError, SegmentationSet, TrainTransform, collate
from models.data.survey import survey
from tests.helpers.trees import SIZE, scene, units, void_255, write

OPTIONS: dict[str, Any] = {"modalities": ("rgb", "depth", "thermal"), "num_classes": 4}
NAMES = ("a", "b", "c", "d")


def layout(**fields: Any) -> dict[str, Any]:
    kinds = {"rgb": "rgb/{name}.png", "depth": "depth/{name}.png", "thermal": "thermal/{name}.png"}
    known = {
        "files": {**kinds, "labels": "labels/{name}.png"},
        "depth_scale": 1000,
        "camera": [60, 60, 32, 24],
        "modalities": {"thermal": {"kind": "intensity", "range": [0, 255]}},
    }
    return {**known, **fields}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four scenes of three modalities."""
    (tmp_path / "layout.json").write_text(json.dumps(layout()))
    for name in NAMES:
        one = scene(ord(name), 4)
        write(tmp_path / f"rgb/{name}.png", one.rgb)
        write(tmp_path / f"depth/{name}.png", units(one.depth, 1000))
        write(tmp_path / f"thermal/{name}.png", one.rgb[:, :, 0])
        write(tmp_path / f"labels/{name}.png", void_255(one.classes))
    (tmp_path / "train.txt").write_text("\n".join(NAMES))
    return tmp_path


def lose(root: Path, *files: str) -> None:
    for file in files:
        (root / f"{file}.png").unlink()


def opened(root: Path, missing: str, **options: Any) -> SegmentationSet:
    return SegmentationSet(root, "train", missing=missing, **{**OPTIONS, **options})


def test_refuse_names_the_file_and_the_remedy(root: Path) -> None:
    lose(root, "depth/b", "thermal/b")
    message = r"depth/b\.png: listed in train\.txt, .*no such file \(and 1 more\); data\.missing=skip leaves"
    with pytest.raises(DataError, match=message):
        opened(root, "refuse")
    with pytest.raises(ValueError, match="missing must be one of refuse, skip, fill, got 'drop'"):
        opened(root, "drop")


def test_skip_leaves_scenes_out(root: Path) -> None:
    lose(root, "depth/b", "thermal/b", "rgb/d")
    found = opened(root, "skip")
    assert [sample.name for sample in found] == ["a", "c"]
    assert not any(sample.absent for sample in found)
    (note,) = found.absences.notes()
    assert note == (
        "train: 2 of 4 scenes are left out, as they lack files (missing=skip): 1 lack depth (the first "
        f"{root}/depth/b.png), 1 lack thermal (the first {root}/thermal/b.png), 1 lack rgb (the first "
        f"{root}/rgb/d.png)"
    )
    lose(root, "rgb/a", "rgb/c")
    with pytest.raises(DataError, match=r"no scene of train has all its files: 3 lack rgb .*1 lack depth"):
        opened(root, "skip")


def test_fill_keeps_scenes_without_what_they_lack(root: Path) -> None:
    lose(root, "depth/b", "thermal/b", "rgb/d")
    found, whole = opened(root, "fill"), [scene(ord(name), 4) for name in NAMES]
    assert [sample.absent for sample in found] == [(), (1, 2), (), (0,)]
    for one, sample in zip(whole, found, strict=True):
        assert all(image.shape[:2] == SIZE for image in sample.images)
        for m in sample.absent:
            assert not sample.images[m].any()
        if 1 not in sample.absent:
            np.testing.assert_allclose(sample.images[1][:, :, 0], one.depth, rtol=1e-6)
        np.testing.assert_array_equal(sample.target, void_255(one.classes))
    (note,) = found.absences.notes()
    assert "of 4 scenes some lack files" in note
    assert f"1 lack thermal (the first {root}/thermal/b.png)" in note
    assert opened(root, "fill", modalities=("rgb", "thermal")).absences.counts == {
        "thermal": 1,
        "rgb": 1,
    }
    looked = survey(found)
    assert sum(looked.values["depth"].kinds.values()) == 3


def test_every_scene_whole_is_as_before(root: Path) -> None:
    before = [collate([sample]) for sample in SegmentationSet(root, "train", **OPTIONS)]
    for missing in ("refuse", "skip", "fill"):
        found = opened(root, missing)
        assert found.absences.notes() == []
        for sample, batch in zip(found, before, strict=True):
            assert torch.equal(collate([sample]).images, batch.images)
            assert batch.absent == ()


def test_what_is_refused_in_any_case(root: Path) -> None:
    lose(root, "labels/c")
    for missing in ("refuse", "skip", "fill"):
        with pytest.raises(
            DataError, match=r"labels/c\.png: listed in train\.txt, but there is no such file$"
        ):
            opened(root, missing)
    write(root / "labels/c.png", void_255(scene(0, 4).classes))
    lose(root, "rgb/c", "depth/c", "thermal/c")
    with pytest.raises(
        DataError, match=r"rgb/c\.png: the scene has no file of any modality.*data\.missing=skip"
    ):
        opened(root, "fill")
    assert len(opened(root, "skip")) == 3
    (root / "rgb/b.png").write_bytes((root / "rgb/b.png").read_bytes()[:50])
    with pytest.raises(DataError, match=r"b\.png"):
        opened(root, "skip")[1]


def test_without_a_list_any_modality_tells_of_a_scene(root: Path) -> None:
    (root / "layout.json").write_text(json.dumps(layout(lists="")))
    lose(root, "rgb/a", "depth/a", "depth/d")
    assert [sample.name for sample in opened(root, "fill")] == ["a", "b", "c", "d"]
    assert [sample.name for sample in opened(root, "skip")] == ["b", "c"]
    with pytest.raises(DataError, match=r"depth/d\.png"):
        opened(root, "refuse")
    # A folder that the splits share does not tell of which of them a scene is.
    shared = {**layout()["files"], "rgb": "{split}/rgb/{name}.png"}
    (root / "layout.json").write_text(json.dumps(layout(lists="", files=shared)))
    write(root / "train/rgb/b.png", scene(ord("b"), 4).rgb)
    assert [sample.name for sample in opened(root, "fill")] == ["b"]
    numbered = {**layout()["files"], "rgb": "rgb/{number:03d}.png", "depth": "depth/{number}.png"}
    numbered.pop("thermal")
    numbered["labels"] = "labels/{number}.png"
    (root / "layout.json").write_text(json.dumps(layout(lists="", files=numbered, modalities={})))
    one = scene(1, 4)
    write(root / "rgb/007.png", one.rgb)
    for number in (7, 8):
        write(root / f"depth/{number}.png", units(one.depth, 1000))
        write(root / f"labels/{number}.png", void_255(one.classes))
    found = opened(root, "fill", modalities=("rgb", "depth"))
    assert [(sample.name, sample.absent) for sample in found] == [("7", ()), ("8", (0,))]


def test_what_is_computed_is_absent_with_its_source(root: Path) -> None:
    own = layout(files={**layout()["files"], "camera": "cameras/{name}.txt"})
    own.pop("camera")
    (root / "layout.json").write_text(json.dumps(own))
    (root / "cameras").mkdir()
    for name in "acd":
        (root / f"cameras/{name}.txt").write_text("60 0 32 0 60 24 0 0 1")
    lose(root, "depth/b")
    found = opened(root, "fill", modalities=("rgb", "depth", "hha", "normals"))
    assert [sample.absent for sample in found] == [(), (1, 2, 3), (), ()]
    (root / "cameras/c.txt").unlink()
    with pytest.raises(DataError, match=r"cameras/c\.txt: listed in train\.txt, but there is no such file"):
        opened(root, "fill", modalities=("rgb", "hha"))


def test_kinds_are_told_by_the_files_that_there_are(root: Path) -> None:
    (root / "layout.json").write_text(json.dumps(layout(modalities={})))
    lose(root, "thermal/a", "thermal/b")
    assert opened(root, "fill").layout.modality("thermal").kind == "intensity"


def test_a_modality_is_left_out_without_a_look_for_its_files(root: Path) -> None:
    lose(root, *(f"depth/{name}" for name in NAMES))
    found = opened(root, "refuse", without=("depth",))
    assert {sample.absent for sample in found} == {(1,)}
    assert found.absences.notes() == ["train: without depth"]
    read = opened(root, "refuse", modalities=("rgb", "thermal"), without=("rgb",))
    assert not read[0].images[0].any()
    for without in (("rgb", "depth", "thermal"), ("sonar",)):
        with pytest.raises(ValueError, match="without must be some of rgb,depth,thermal, not all"):
            opened(root, "refuse", without=without)


def test_augmentation_and_batches_carry_it_along(root: Path) -> None:
    lose(root, "depth/b", "thermal/b", "rgb/d")
    transform = TrainTransform(crop=32, shorter_side=40)
    samples = [transform(sample, np.random.default_rng(0)) for sample in opened(root, "fill")]
    batch = collate(samples)
    assert batch.absent == ((), (1, 2), (), (0,))
    images = batch.images.unflatten(0, (3, 4))
    parts = batch.by_presence()
    assert [present for present, _ in parts] == [None, (1, 2), (0,)]
    for (present, part), rows in zip(parts, ([0, 2], [3], [1]), strict=True):
        chosen = range(3) if present is None else present
        assert torch.equal(part.images, images[list(chosen)][:, rows].flatten(0, 1))
        assert part.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(part.target, batch.target[rows])
        assert part.names == [NAMES[n] for n in rows]
        assert part.kinds == tuple(batch.kinds[m] for m in chosen)
    halves = batch.split(2)
    assert [half.absent for half in halves] == [((), (1, 2)), ((), (0,))]
    # What is dropped is left to scenes that have nothing else.
    dropped = {present: part.names for present, part in batch.by_presence([0])}
    assert dropped == {(1, 2): ["a", "c", "d"], (0,): ["b"]}
    whole = Batch(batch.images, batch.target, batch.names)
    assert whole.by_presence() == [(None, whole)]
    ((present, part),) = whole.by_presence([2])
    assert present == (0, 1)
    assert torch.equal(part.images, images[:2].flatten(0, 1))


def test_a_crop_to_the_labels_needs_no_modality_in_particular(tmp_path: Path) -> None:
    """The paper's archive, whose depth is larger than its labels."""
    for name in ("1", "2"):
        one = scene(int(name), 4)
        write(tmp_path / f"rgb/{name}.png", one.rgb[2:-2, 3:-3])
        write(tmp_path / f"depth/{name}.png", units(one.depth, 5000))
        write(tmp_path / f"masks/{name}.png", void_255(one.classes)[2:-2, 3:-3])
    lines = [f"rgb/{name}.png masks/{name}.png depth/{name}.png" for name in ("1", "2")]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    lose(tmp_path, "rgb/1", "depth/2")
    found = SegmentationSet(tmp_path, "train", num_classes=4, layout="nyu_cen", missing="fill")
    first, second = found[0], found[1]
    assert (first.absent, second.absent) == ((0,), (1,))
    assert {image.shape[:2] for sample in (first, second) for image in sample.images} == {(44, 58)}
    np.testing.assert_allclose(first.images[1][:, :, 0], scene(1, 4).depth[2:-2, 3:-3], rtol=1e-6)
