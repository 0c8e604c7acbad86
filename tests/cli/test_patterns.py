"""predict of quoted patterns: what belongs together, how it is named, and what is refused."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.patterns import is_pattern, match_patterns
from models.training.errors import UsageError
from tests.helpers import translation_runs
from tests.helpers.clips import SIZE, depth_frames, rgb_frames, save_narrow

OPTIONS = {"rgb": "--rgb", "depth": "--depth"}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def matched(root: Path, *patterns: str, partial: bool = False) -> dict[str, list[str]]:
    kinds = dict(zip(OPTIONS, (root / pattern for pattern in patterns), strict=False))
    scenes = match_patterns(kinds, OPTIONS, partial, "; REMEDY")
    return {
        name: [path.relative_to(root).as_posix() for path in files.values()] for name, files in scenes.items()
    }


def test_files_pair_by_what_wildcards_match(tmp_path: Path) -> None:
    touch(tmp_path, "b/rgb_2.png", "b/depth_2.npy", "a/rgb_10.png", "a/rgb_10.txt", "rgb_1.png")
    assert matched(tmp_path, "*/rgb_*.png", "*/depth_*.npy", partial=True) == {
        "a_10": ["a/rgb_10.png"],
        "b_2": ["b/rgb_2.png", "b/depth_2.npy"],
    }
    touch(tmp_path, "a/depth_10.npy")
    assert matched(tmp_path, "[ab]/rgb_?*.png", "[ab]/depth_?*.npy") == {
        "a_1_0": ["a/rgb_10.png", "a/depth_10.npy"],
        "b_2": ["b/rgb_2.png", "b/depth_2.npy"],
    }
    assert list(matched(tmp_path, "[!a]/rgb_*.png")) == ["b_2"]
    assert matched(tmp_path, "**/rgb_*.png") == {
        "1": ["rgb_1.png"],
        "a_10": ["a/rgb_10.png"],
        "b_2": ["b/rgb_2.png"],
    }


@pytest.mark.parametrize("pattern", ["[^a]*.png", "[!a]*.png", "[!^]*.png", "[ab]*.png"])
def test_sets_of_letters_are_globs(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "a1.png", "b1.png", "^1.png")
    found = matched(tmp_path, pattern)
    assert sorted(file for files in found.values() for file in files) == sorted(
        path.name for path in tmp_path.glob(pattern)
    )


def test_only_images_are_matched(tmp_path: Path) -> None:
    touch(tmp_path, "rgb_1.png", "rgb_1.txt", "rgb_2.jpg/inside.png", ".rgb_3.png")
    assert matched(tmp_path, "rgb_*") == {"1.png": ["rgb_1.png"]}


def test_names_are_unique(tmp_path: Path) -> None:
    touch(tmp_path, "a_b/c.png", "a/b_c.png")
    assert matched(tmp_path, "*/*.png") == {"a-b_c": ["a/b_c.png"], "a_b-c": ["a_b/c.png"]}
    assert matched(tmp_path, "a/b_c*.png") == {"scene": ["a/b_c.png"]}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("*/rgb_*.png", "*/depth.png"), "^--depth: .* has 1 wildcards, but .* 2"),
        (("*/rgb_*.png", "b/depth_2.png"), "^--depth: .*b/depth_2.png has no wildcard"),
        (("*/rgb_*.png", "*/death_*.png"), r"^--depth: .*death_\*\.png matches no image \("),
        (("*/rgb_*.png", "*/depth_*.png"), r"b/rgb_3\.png has no counterpart in .*depth_\*\.png.*; REMEDY$"),
    ],
)
def test_refused_patterns(tmp_path: Path, patterns: tuple[str, str], message: str) -> None:
    touch(tmp_path, "b/rgb_2.png", "b/depth_2.png", "b/rgb_3.png")
    with pytest.raises(UsageError, match=message):
        matched(tmp_path, *patterns)


def test_a_file_of_that_name_is_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "scene[1].png")
    assert not is_pattern(tmp_path / "scene[1].png")
    assert is_pattern(tmp_path / "scene[12].png")
    assert not is_pattern(tmp_path / "scene.png")


def test_predict_of_patterns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = save_narrow(tmp_path / "net.pt")
    for index, room in enumerate(("kitchen", "hall")):
        (tmp_path / room).mkdir()
        cv2.imwrite(str(tmp_path / room / "rgb_7.png"), rgb_frames()[index][:, :, ::-1])
        cv2.imwrite(str(tmp_path / room / "depth_7.png"), depth_frames()[index])
    together = ["--rgb", str(tmp_path / "*/rgb_*.png"), "--depth", str(tmp_path / "*/depth_*.png")]
    assert main(["predict", str(net), *together, "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out/labels").iterdir()) == [
        "hall_7.png",
        "kitchen_7.png",
    ]
    alone = [f"--{kind}={tmp_path}/hall/{kind}_7.png" for kind in ("rgb", "depth")]
    assert main(["predict", str(net), *alone, "--output", str(tmp_path / "alone")]) == 0
    found = cv2.imread(str(tmp_path / "out/labels/hall_7.png"), cv2.IMREAD_UNCHANGED)
    expected = cv2.imread(str(tmp_path / "alone/labels/rgb_7.png"), cv2.IMREAD_UNCHANGED)
    assert found.shape == SIZE
    np.testing.assert_array_equal(found, expected)
    (tmp_path / "hall/depth_7.png").unlink()
    refused = ["predict", str(net), *together, "--output", str(tmp_path / "none")]
    assert main(refused) == 2
    assert "hall/rgb_7.png has no counterpart in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main([*refused, "data.missing=skip"]) == 0
    assert [path.name for path in (tmp_path / "none/labels").iterdir()] == ["kitchen_7.png"]


def test_translation_of_patterns(tmp_path: Path) -> None:
    views = translation_runs.prepare_views(tmp_path / "views")
    run = tmp_path / "run"
    assert main(translation_runs.command(views, run, "run.steps=1", "data.domains=normal,edge_texture")) == 0
    inputs = [f"--input={name}={views}/{name}/point_[34]_*_{name}.png" for name in ("normal", "edge_texture")]
    assert main(["predict", str(run), *inputs, "--output", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out/ensemble").iterdir())
    assert names == ["3_view_0_domain.png", "4_view_0_domain.png"]
