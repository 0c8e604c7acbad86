"""``cen analyse RUN --features`` on tiny runs, whose scales are then spread about the threshold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import examples.own_encoder  # noqa: F401 - registers plain_net
import models
from models.__main__ import main
from models.analysis.features import feature_figure
from models.segmentation.build import open_validation
from models.training import checkpoint
from tests.helpers import training_runs, translation_runs

HERE = ["run.device=cpu", "run.workers=0"]
LAYERS = [f"encoder.layers.{i}.norm" for i in range(4)]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


def trained(rooms: Path, run: Path, *overrides: str) -> Path:
    """A run of a step; scales are from 0 to 0.1, but in the second layer, where none is below 0.02."""
    assert main(training_runs.command(rooms, run, "run.steps=1", *overrides)) == 0
    path, contents = checkpoint.load(run, checkpoint.BEST)
    state, generator = checkpoint.weights(contents), torch.Generator().manual_seed(0)
    for name in LAYERS:
        state[f"{name}.weight"].uniform_(0.03 if name == LAYERS[1] else 0, 0.1, generator=generator)
    checkpoint.save(path, contents)
    return run


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(rooms, tmp_path_factory.mktemp("runs") / "run")


def analyse(*words: object) -> int:
    return main(["analyse", *map(str, words), "--features", *HERE])


def test_files_and_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyse(run, "--images", 2) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads((run / "features.json").read_text())
    net = models.load(run, HERE).net
    for entry, name in zip(found["layers"], LAYERS, strict=True):
        rgb, depth = net.get_submodule(name).weight.detach().abs() >= 0.02
        sizes = {"S01": ~rgb & depth, "S10": rgb & ~depth, "S11": rgb & depth, "S00": ~rgb & ~depth}
        assert entry["layer"] == name
        assert entry["sizes"] == {key: int(mask.sum()) for key, mask in sizes.items()}
        half = len(rgb) // 2
        assert entry["replaced"] == {"rgb": int((~rgb[:half]).sum()), "depth": int((~depth[half:]).sum())}
        row = next(line for line in printed.out.splitlines() if line[2:].startswith(name)).split()
        assert row[-6:-2] == [str(size) for size in entry["sizes"].values()]
        assert (row[0] == "*") == (name == LAYERS[0])
    assert (found["layer"], found["stage"], found["threshold"]) == (LAYERS[0], 1, 0.02)
    assert (found["images"], len(found["scenes"]), found["notes"]) == (3, 2, [])
    assert len(found["correlations"]) == 2 * 3 * 4 * 2
    for each in found["correlations"]:
        if each["quantity"] != "rectified":  # which may be 0 all over the few cells of a map
            assert -1 <= each["value"] <= 1
            assert len(each["random"]) == 20
    height, width = cv2.imread(str(run / "features.png")).shape[:2]
    assert min(height, width) > 300


def test_a_layer_a_scene_and_a_folder_are_chosen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = json.loads((run / "features.json").read_text())["scenes"][1]
    words = [run, "--layer", LAYERS[1], "--scene", name, "--output", tmp_path / "out", "eval.limit=1"]
    assert main(["analyze", *map(str, words), "--features", *HERE]) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "features.json").read_text())
    assert (found["layer"], found["scenes"], found["images"]) == (LAYERS[1], [name], 1)
    assert found["changed"] == ["eval.limit: none -> 1"]
    assert f"warning: {LAYERS[1]} has no channels of S01 or of S10: give fusion.threshold=" in printed.err
    empty = [each for each in found["correlations"] if each["channels"] != "S11"]
    assert {(each["size"], each["value"]) for each in empty} == {(0, None)}


def test_the_modality_without_channels_takes_the_others_maps(run: Path) -> None:
    """In Python; with region=all it gives up all that it does not use."""
    trained = models.load(run, [*HERE, "fusion.region=all"])
    trained.net.train()
    figure, features = feature_figure(trained, open_validation(trained.recipe), images=1)
    assert trained.net.training
    assert isinstance(figure, Figure)
    (scene,) = features.scenes
    z, exchanged = (
        dict(zip(features.layer.drawn, each[:, 0].unbind(1), strict=True)) for each in scene.maps[1:]
    )
    for name, (borrower, lender) in {"S01": (0, 1), "S10": (1, 0)}.items():
        assert features.layer.sizes(1)[name] > 0
        torch.testing.assert_close(exchanged[1, name][borrower], z[1, name][lender])
        torch.testing.assert_close(exchanged[1, name][lender], z[1, name][lender])
    torch.testing.assert_close(exchanged[1, "S11"], z[1, "S11"])
    again = feature_figure(trained, open_validation(trained.recipe), images=1)[1]
    assert again.plain() == features.plain()


def test_three_modalities_without_depth(rooms: Path, tmp_path: Path) -> None:
    """A figure for each pair; depth is read beside the inputs."""
    run = trained(rooms, tmp_path / "run", "data.modalities=rgb,hha,normals")
    assert analyse(run, "--images", 1, "--layer", LAYERS[3]) == 0
    found = json.loads((run / "features.json").read_text())
    pairs = [["rgb", "hha"], ["rgb", "normals"]]
    assert [entry["pair"] for entry in found["layers"]] == pairs * 4
    assert {(*each["pair"],) for each in found["correlations"]} == set(map(tuple, pairs))
    assert {each["target"] for each in found["correlations"]} == {"texture", "boundaries"}


def test_scenes_that_lack_a_modality_are_left_out(
    rooms: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "rooms"
    shutil.copytree(rooms, copy)
    names = [Path(line.split()[2]) for line in (copy / "val.txt").read_text().splitlines()]
    (copy / names[0]).unlink()
    words = [run, "--output", tmp_path, f"data.root={copy}", "data.missing=fill"]
    assert analyse(*words) == 0
    assert "warning: 1 validation images lack a modality and are left out" in capsys.readouterr().err
    found = json.loads((tmp_path / "features.json").read_text())
    assert found["scenes"] == [name.stem for name in names[1:]]
    assert found["images"] == 2
    assert analyse(*words, "--scene", names[0].stem) == 2
    assert f"--scene: {names[0].stem} is none of the 2 validation images" in capsys.readouterr().err
    for name in names[1:]:
        (copy / name).unlink()
    assert analyse(*words) == 2
    assert "of 3 validation images none has all modalities" in capsys.readouterr().err


def test_what_has_no_figure_is_refused(
    rooms: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*words: Any) -> str:
        capsys.readouterr()
        assert analyse(*words) == 2
        return capsys.readouterr().err

    # All scales are above, and the message says what they would be below.
    assert "those that neither uses are 0: give fusion.threshold=" in refusal(run, "fusion.threshold=1e-9")
    alone = trained(rooms, tmp_path / "alone", "data.modalities=rgb")
    assert "--features compares modalities, and " in refusal(alone)
    without = trained(rooms, tmp_path / "without", "fusion=none")
    assert "of fusion=none, has no batch norm that exchanges channels" in (told := refusal(without))
    remedy = ["fusion=exchange", "fusion.threshold=0.02"]
    assert f"{' '.join(remedy)} draws it" in told
    assert analyse(without, *remedy) == 0
    views = translation_runs.prepare_views(tmp_path / "views")
    assert main(translation_runs.command(views, tmp_path / "translation", "run.steps=1")) == 0
    assert "translates images, by instance norms" in refusal(tmp_path / "translation")
    assert "leave out eval.without, which is depth" in refusal(run, "eval.without=depth")
    with pytest.raises(SystemExit, match="2"):
        analyse(run, "--images", 0)
    assert "argument --images: expected a number from 1 on, got 0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert "--output: cannot write " in refusal(run, "--output", tmp_path / "file")
    assert main(["analyse", str(run)]) == 2
    assert "analyse: say what to analyze: --theorem, --corollary, --features" in capsys.readouterr().err
    assert main(["analyse", str(run), "--theorem", "--images", "2"]) == 2
    assert "--images is of --features, which is not asked for" in capsys.readouterr().err
    assert "--threshold is of --theorem or --corollary" in refusal(run, "--threshold", "0.1")
    assert "--steps is of --corollary" in refusal(run, "--steps", 3)
    message = "--features writes files of the same names for every run"
    assert message in refusal(run, run, "--output", tmp_path)


def test_a_flat_map_is_drawn_flat(run: Path) -> None:
    """Rows have one scale: where γ is 0, z is β, whatever the other maps of the row are."""
    trained = models.load(run, HERE)
    norm = trained.net.get_submodule(LAYERS[0])
    with torch.no_grad():
        norm.weight[0].masked_fill_(norm.weight[0] < 0.02, 0)
    figure, _ = feature_figure(trained, open_validation(trained.recipe), images=1)
    images = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert len(images) == 2 * (1 + 8)
    rgb = images[:9]
    assert np.ptp(rgb[4]) < 1e-9 < np.ptp(rgb[5])
    scales = [axes.images[0].norm for axes in figure.axes if axes.images]
    assert scales[4] is scales[5] is scales[8] is not scales[1]
    values = np.concatenate([rgb[i].ravel() for i in range(4, 9)])
    assert (scales[4].vmin, scales[4].vmax) == pytest.approx(tuple(np.percentile(values, (1, 99))))
