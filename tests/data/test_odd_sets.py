"""Sets with one oddity each: the right words, of a field or file, before any work; sound ones in silence."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.data import DataError, SegmentationSet
from models.segmentation.build import open_split
from models.segmentation.overview import overview
from models.segmentation.settings import DataSettings
from models.training.errors import UsageError
from tests.helpers import odd_sets
from tests.helpers.odd_sets import CLASSES, ODD_SETS, OddSet, make, sound

IN_ONE_SET = [name for name, odd in ODD_SETS.items() if odd.in_one_set]
REFUSED = [name for name, odd in ODD_SETS.items() if odd.refused]
WARNED = [name for name, odd in ODD_SETS.items() if not odd.refused]


def opened(root: Path, odd: OddSet | None = None, split: str = "train") -> SegmentationSet:
    count, modalities = (odd.num_classes, odd.modalities) if odd else (CLASSES, ("rgb", "depth"))
    return SegmentationSet(root, split, modalities=modalities, num_classes=count)


def found_by_overview(root: Path, odd: OddSet | None = None, **settings) -> list[str]:
    """The warnings of what trainings and evaluations show before they start."""
    if odd:
        settings |= {"modalities": odd.modalities, "num_classes": odd.num_classes}
    data = DataSettings(root=root, **{"num_classes": CLASSES, **settings})
    return overview(data, [open_split(data, split) for split in ("train", "val")]).warnings


def command(root: Path, odd: OddSet | None = None, *more: str) -> list[str]:
    count, modalities = (odd.num_classes, odd.modalities) if odd else (CLASSES, ("rgb", "depth"))
    settings = [f"data.root={root}", f"data.num_classes={count}", f"data.modalities={','.join(modalities)}"]
    settings += ["data.crop=32", "data.shorter_side=24", "data.batch_size=2", "run.workers=0"]
    return ["data", "synthetic_demo", *settings, "--output", str(root / "sheet.png"), *more]


@pytest.mark.parametrize("name", IN_ONE_SET)
def test_an_oddity_shows_in_the_set_that_has_it(tmp_path: Path, name: str) -> None:
    """In Python as well: with the first sample comes a warning, or the refusal."""
    odd = make(name, tmp_path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = opened(tmp_path / name, odd)
            for index in range(len(dataset)):
                dataset[index]
        except DataError as error:
            said = [str(error)]
        else:
            said = [str(each.message) for each in caught]
    assert any(re.search(odd.words, message) for message in said), said


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_before_it(tmp_path: Path, name: str) -> None:
    odd = make(name, tmp_path / name)
    with pytest.raises(DataError, match=odd.words):
        found_by_overview(tmp_path / name, odd)


@pytest.mark.parametrize("name", WARNED)
def test_what_looks_wrong_is_told_before_any_work(tmp_path: Path, name: str) -> None:
    """And nothing beside it: whoever reads ten warnings reads none."""
    odd = make(name, tmp_path / name)
    found = found_by_overview(tmp_path / name, odd)
    told = [message for message in found if re.search(odd.words, message)]
    assert told
    if odd.in_one_set:
        assert {message.partition(":")[0] for message in told} == {"train", "val"}
    beside = {
        "thermal_without_a_kind": r"give its range",
        "bits_rotated_as_in_sun_rgbd": r"check depth_scale",
    }
    beside["labels_from_zero_with_255_where_the_layout_counts_from_one"] = r"no pixel"
    others = [message for message in found if message not in told]
    assert all(re.search(beside.get(name, "$ "), message) for message in others), others


@pytest.mark.parametrize("name", WARNED)
def test_the_data_command_tells_it_and_writes_the_sheet(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = make(name, tmp_path / name)
    assert main(command(tmp_path / name, odd)) == 0
    printed = capsys.readouterr()
    assert re.search(rf"warning: .*{odd.words}", printed.err)
    assert "of the rest" in printed.out
    sheet = cv2.imread(str(tmp_path / name / "sheet.png"))
    assert sheet is not None
    assert sheet.std() > 0


@pytest.mark.parametrize("name", REFUSED)
def test_the_data_command_refuses_it_in_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = make(name, tmp_path / name)
    assert main(command(tmp_path / name, odd)) != 0
    told = capsys.readouterr().err
    assert re.search(odd.words, told)
    assert "Traceback" not in told
    assert not (tmp_path / name / "sheet.png").exists()


def test_nothing_is_said_of_a_sound_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split in ("train", "val"):
            dataset = opened(tmp_path, split=split)
            for index, name in enumerate(odd_sets.SCENES[split]):
                sample = dataset[index]
                depth = odd_sets.millimetres_of(name) / 1000.0
                np.testing.assert_allclose(sample.images[1][:, :, 0], depth, rtol=1e-6)
                np.testing.assert_array_equal(sample.target, odd_sets.classes_of(name))
        assert found_by_overview(tmp_path) == []
        assert main(command(tmp_path)) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.out + printed.err
    assert "1.09 to 3.38 m" in printed.out
    assert cv2.imread(str(tmp_path / "sheet.png")) is not None


@pytest.mark.parametrize("name", ["labels_from_one", "labels_from_zero_where_the_layout_counts_from_one"])
def test_the_remedy_that_is_told_is_one(tmp_path: Path, name: str) -> None:
    odd = make(name, tmp_path)
    offset = int(re.findall(r"label_offset=(\d)", odd.words)[-1])
    found = found_by_overview(tmp_path, odd, label_offset=offset, given=("label_offset",))
    assert all("goes before" in message for message in found)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("no_depth_scale", {"depth_scale": 1000.0}),
        ("millimetres_read_at_100000_a_metre", {"depth_scale": 1000.0}),
        ("sixteen_bits_of_depth_without_a_scale", {"depth_scale": 1000.0}),
        ("bits_rotated_as_in_sun_rgbd", {"bit_shift": 3}),
    ],
)
def test_the_remedy_of_depth_gives_the_right_distances(tmp_path: Path, name: str, settings: dict) -> None:
    """Given on the command line it goes before the layout.json, and nothing of the data is odd any more."""
    odd = make(name, tmp_path)
    found = found_by_overview(tmp_path, odd, given=tuple(settings), **settings)
    assert all("goes before" in message for message in found)
    data = DataSettings(root=tmp_path, num_classes=CLASSES, given=tuple(settings), **settings)
    depth = open_split(data, "train").sample(1).images[1][:, :, 0]
    np.testing.assert_allclose(depth, odd_sets.millimetres_of("t1") / 1000.0, rtol=1e-6)


@pytest.mark.parametrize("colored", ["train", "val"])
def test_splits_whose_files_tell_another_kind_are_refused(tmp_path: Path, colored: str) -> None:
    """Where nobody says what a modality is, training on color and validating on gray would go unnoticed."""
    odd = make("thermal_without_a_kind", tmp_path)
    for name in odd_sets.SCENES[colored]:
        odd_sets.write(tmp_path / f"thermal/{name}.png", odd_sets.rgb_of(name))
    with pytest.raises((DataError, UsageError), match=r"thermal.*(kind|layout\.json)"):
        found_by_overview(tmp_path, odd)


@pytest.mark.parametrize("name", ["validation_in_the_training_list", "validation_copied_from_training"])
def test_evaluation_alone_notices_training_scenes(tmp_path: Path, name: str) -> None:
    odd = make(name, tmp_path)
    data = DataSettings(root=tmp_path, num_classes=CLASSES)
    assert any(re.search(odd.words, each) for each in overview(data, [open_split(data, "val")]).warnings)


def test_evaluation_alone_needs_no_training_scenes(tmp_path: Path) -> None:
    sound(tmp_path)
    (tmp_path / "train.txt").unlink()
    data = DataSettings(root=tmp_path, num_classes=CLASSES)
    assert overview(data, [open_split(data, "val")]).warnings == []


def test_a_sheet_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound(tmp_path)
    words = command(tmp_path)
    words[words.index("--output") + 1] = str(tmp_path / "nowhere" / "deep" / "sheet.xyz")
    if main(words) == 0:
        assert (tmp_path / "nowhere/deep/sheet.xyz").is_file()
    else:
        assert "--output" in capsys.readouterr().err


def test_the_generator_writes_the_same_files_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for folder in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["odd_sets.py", str(tmp_path / folder)])
        runpy.run_path(odd_sets.__file__, run_name="__main__")
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / folder): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
    assert {path.parts[0] for path in contents[0]} == {*ODD_SETS, "sound"}
    assert len(ODD_SETS) >= 10


@pytest.mark.parametrize(("folder", "scale"), [("nyudv2_sample", 5000.0), ("nyudv2_384", 6528.0)])
def test_nothing_is_said_of_real_rooms_but_classes_that_are_missing(
    shared: Path, folder: str, scale: float
) -> None:
    root = shared / "data" / folder
    if not root.is_dir():
        pytest.skip(f"needs the real images {folder} beside the checkout")
    data = DataSettings(root=root, depth_scale=scale, given=("depth_scale",))
    sets = [open_split(data, split) for split in ("train", "val")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dataset in sets:
            dataset[0]
    found = overview(data, sets).warnings
    if folder == "nyudv2_sample":
        assert all(
            re.search(r"(train|val): no pixel in the \d+ label maps looked at is of", each) for each in found
        )
    else:
        assert [each for each in found if "goes before" not in each] == []
