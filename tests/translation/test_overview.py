"""The overview of views before work starts, and the data command of translation."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from models.__main__ import main
from models.data import TranslationSet, prepare_synthetic_domains
from models.translation.overview import overview

RECIPE = "nyudv2_384_depth_normal_rgb"


@pytest.fixture
def views(tmp_path: Path) -> Path:
    return prepare_synthetic_domains(tmp_path / "views", train=3, val=2, size=(40, 48), seed=1, processes=1)


def told(root: Path) -> tuple[str, list[str]]:
    names = {"domains": ("depth_zbuffer", "normal"), "target": "rgb"}
    found = overview({split: TranslationSet(root, split, **names) for split in ("train", "val")})
    return "\n".join(found.lines), found.warnings


def test_sound_views(views: Path) -> None:
    lines, warnings = told(views)
    assert warnings == []
    for words in (
        "train: ",
        "lists 3, 3 of them",
        "lists 2, 2 of them",
        "depth_zbuffer: 16 bits and 1 channel, 48x40",
    ):
        assert words in lines


def test_views_of_both_splits(views: Path) -> None:
    (views / "val.txt").write_text((views / "train.txt").read_text())
    (warning,) = told(views)[1]
    assert "3 of the 3 validation scenes are training scenes as well" in warning


def test_what_holds_nothing(views: Path) -> None:
    for path in (views / "depth_zbuffer").iterdir():
        assert cv2.imwrite(str(path), np.full((40, 48), 65535, np.uint16))
    for path in (views / "normal").iterdir():
        assert cv2.imwrite(str(path), np.full((40, 48, 3), 128, np.uint8))
    warnings = told(views)[1]
    for split in ("train", "val"):
        assert f"{split}: depth_zbuffer: every pixel looked at is missing" in warnings
        assert f"{split}: normal: every pixel looked at is 128" in warnings


def test_the_data_command(views: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    small = ["data.resize=32", "data.crop=32", "data.batch_size=1", "eval.sheet=2"]
    assert main(["data", RECIPE, f"data.root={views}", *small, "--output", str(sheet)]) == 0
    captured = capsys.readouterr()
    assert "train: " in captured.out
    assert captured.err == ""
    assert cv2.imread(str(sheet)) is not None
