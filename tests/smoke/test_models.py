"""The commands as installed, with the extra ``models``: data, a short training, evaluation, export."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

import cen_ext
import models

# Two steps of each of the three stages, on a network of 4 channels.
SHORT = [
    *("model.encoder=resnet18", "model.width=4", "model.frozen_statistics=false"),
    *("data.batch_size=2", "data.crop=32", "data.shorter_side=32"),
    *("run.device=cpu", "run.workers=0", "run.steps=2", "eval.limit=2", "eval.pictures=0"),
]


def cen(*words: object) -> None:
    """Run the command that the package installs."""
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="cen")
    assert command.load()(list(map(str, words))) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cen("--version")
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"cen_ext {cen_ext.__version__}"
    assert f"torch: {torch.__version__}" in others


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    cen("recipes")
    assert "\nsynthetic_demo " in f"\n{capsys.readouterr().out}"


def test_from_scenes_to_an_exported_network(tmp_path: Path) -> None:
    rooms, run = tmp_path / "rooms", tmp_path / "run"
    cen("prepare", "synthetic", rooms, "--train", 4, "--val", 2)
    cen("train", "synthetic_demo", f"data.root={rooms}", f"run.output={run}", *SHORT)
    cen("evaluate", run)
    cen("export", run, "--output", tmp_path / "net.safetensors")
    scene = {kind: str(next((rooms / kind).glob("*.png"))) for kind in ("rgb", "depth")}
    trained, exported = (
        models.load(path, ["run.device=cpu"]) for path in (run, tmp_path / "net.safetensors")
    )
    labels = trained.predict(**scene)["ensemble"]
    assert labels.ndim == 2
    assert (exported.predict(**scene)["ensemble"] == labels).all()


def test_the_pages_are_there() -> None:
    """Those of ``cen report`` and ``cen serve``, which are no Python."""
    root = Path(models.__file__).parent
    assert {path.name for path in root.rglob("*.html")} == {"page.html"}
    for folder in ("report", "serve"):
        assert (root / folder / "page.html").is_file()
        assert (root / folder / "style.css").is_file()
