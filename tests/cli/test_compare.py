"""``cen compare`` on tiny runs of both systems, and on copies of their tables with other contents."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import examples.own_encoder  # noqa: F401 - registers plain_net, whose runs take milliseconds
from models.__main__ import main
from models.comparison import costs, report
from models.comparison.compare import compare
from tests.helpers import training_runs, translation_runs
from tests.helpers.copied_runs import copy, shifted

FEW = ["run.steps=4", "run.log_steps=2", "run.evaluate_steps=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: ``exchange``, ``separate`` and ``translation``."""
    root = tmp_path_factory.mktemp("compared")
    rooms = training_runs.prepare_rooms(root / "rooms")
    plain = [*FEW, "model.encoder=plain_net"]
    separate = [*plain, "fusion=concat", "fusion.stages=3", "fusion.setting=separate"]
    assert main(training_runs.command(rooms, root / "exchange", *plain)) == 0
    assert main(training_runs.command(rooms, root / "separate", *separate)) == 0
    views = translation_runs.prepare_views(root / "views")
    assert main(translation_runs.command(views, root / "translation", *FEW)) == 0
    return root


def last(run: Path, table: str) -> dict[str, float]:
    with (run / table).open(newline="") as file:
        return {name: float(cell) for name, cell in list(csv.DictReader(file))[-1].items()}


def compared(*runs: Path) -> dict[str, Any]:
    return report.plain(compare(runs))


@pytest.fixture(scope="module")
def seeds(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of one training; the first is that of ``runs``."""
    folder = tmp_path_factory.mktemp("seeds")
    others = [
        copy(runs / "exchange", folder / f"seed{seed}", {"run.seed": seed, "run.workers": seed}, shifted(by))
        for seed, by in ((1, 0.1), (2, 0.3))
    ]
    return [runs / "exchange", *others]


def test_seeds_are_one_group_with_their_spread(
    runs: Path, seeds: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [seeds[0], runs / "separate", *seeds[1:]]
    found = compared(*folders)
    assert main(["compare", *map(str, folders)]) == 0
    printed = capsys.readouterr()
    three, one = found["groups"]
    assert [run["seed"] for run in three["runs"]] == [0, 1, 2]
    assert [run["path"] for run in one["runs"]] == [str(runs / "separate")]
    for name, value in last(runs / "exchange", "metrics.csv").items():
        if name in ("step", "epoch"):
            continue
        values = value + np.array([0, 0.1, 0.3])
        assert three["metrics"][name]["mean"] == pytest.approx(values.mean())
        assert three["metrics"][name]["spread"] == pytest.approx(values.std(ddof=1))
    assert one["metrics"] == {
        name: {"mean": value, "spread": None}
        for name, value in last(runs / "separate", "metrics.csv").items()
        if name not in ("step", "epoch")
    }
    assert found["differences"]["fusion"] == {three["name"]: "exchange", one["name"]: "concat"}
    assert "run.workers" not in found["differences"]
    iou = three["metrics"]["depth/mean_iou"]
    row = next(line for line in printed.out.splitlines() if line.split()[:1] == ["depth"])
    assert f"  {100 * iou['mean']:.2f} ± {100 * iou['spread']:.2f}" in row
    assert sum(line.split()[:1] == ["ensemble"] for line in printed.out.splitlines()) == 2
    assert "constant" not in printed.out
    assert printed.err == ""


def test_costs(runs: Path) -> None:
    exchange, separate = compared(runs / "exchange", runs / "separate")["groups"]
    assert exchange["network"]["shape"] == (2, 3, 32, 32)
    # Separate encoders: the second one's convolutions up to stage 3, and the 1x1 convolution there. After it
    # one stream is left, which needs one norm less in stage 4.
    convolutions = sum(9 * a * b for a, b in itertools.pairwise((3, 16, 16, 32, 48)))
    difference = separate["network"]["parameters"] - exchange["network"]["parameters"]
    assert difference == convolutions + 2 * 48**2 - 2 * 64
    for group, name in ((exchange, "exchange"), (separate, "separate")):
        with (runs / name / "speed.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        speeds = [float(row["images_per_second"]) for row in rows]
        assert group["training"]["images_per_second"]["mean"] == pytest.approx(np.median(speeds))
        peaks = [float(row["peak_memory_mib"]) for row in rows]
        assert group["training"]["peak_memory_mib"]["mean"] == max(peaks)
        assert group["network"]["images_per_second"] is None


def test_runs_from_before_speed_was_logged(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = copy(runs / "exchange", tmp_path / "old")
    (old / "speed.csv").unlink()
    (old / "environment.json").unlink()
    (group,) = compared(old)["groups"]
    assert group["training"] == {"images_per_second": None, "peak_memory_mib": None}
    assert main(["compare", str(old)]) == 0
    assert re.search(r"^old .* G +2 x 32 x 32 +- +- +CPU$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("name", ["exchange", "translation"])
def test_answers_are_timed_on_request(
    runs: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs, "_SECONDS", 0.01)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["compare", "--measure", str(runs / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.endswith("inference images/s  measured on"))
    speed, machine = re.split(" {2,}", lines[head + 1])[-2:]
    assert float(speed) > 0
    assert machine.startswith("CPU, ")


def test_files(runs: Path, seeds: list[Path], tmp_path: Path) -> None:
    folders = [*seeds, runs / "separate"]
    assert main(["compare", *map(str, folders), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "compare.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"compare.{suffix}" for suffix in ("csv", "json", "md", "png")
    ]
    with (tmp_path / "compare.csv").open(newline="") as file:
        rows = {(row["group"], f"{row['output']}/{row['score']}"): row for row in csv.DictReader(file)}
    for group in found["groups"]:
        for name, value in group["metrics"].items():
            row = rows.pop((group["name"], name))
            assert int(row["runs"]) == len(group["runs"])
            assert float(row["mean"]) == value["mean"]
            assert (float(row["spread"]) if row["spread"] else None) == value["spread"]
    assert not rows
    page = (tmp_path / "compare.md").read_text()
    assert "![Metrics of every output](compare.png)" in page
    assert "| concat |" in page
    picture = cv2.imread(str(tmp_path / "compare.png"))[:, :, ::-1]
    ensemble = (picture == (200, 64, 31)).all(2)  # the bars of four panels, side by side
    runs_of_columns = np.flatnonzero(np.diff(ensemble.any(0).astype(int)) == 1)
    assert len(runs_of_columns) >= 4


def test_translation(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def with_fid(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{**row, "ensemble/fid": "70.5"} for row in rows]

    other = copy(runs / "translation", tmp_path / "fid", {"run.seed": 3}, with_fid)
    (group,) = compared(runs / "translation", other)["groups"]
    assert main(["compare", str(runs / "translation"), str(other)]) == 0
    printed = capsys.readouterr()
    l1 = last(runs / "translation", "metrics.csv")["ensemble/l1"]
    assert group["metrics"]["ensemble/l1"] == {"mean": pytest.approx(l1), "spread": 0}
    assert f"  {l1:.4f} ± 0.0000" in printed.out
    assert f"fid is missing in {runs / 'translation'}, " in printed.err
    assert "ensemble/fid" not in group["metrics"]


def test_an_unfinished_run_is_marked(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = copy(runs / "exchange", tmp_path / "early", {}, lambda rows: rows[:1])
    assert main(["compare", str(runs / "separate"), str(early)]) == 0
    printed = capsys.readouterr()
    assert f"warning: {early} is unfinished: step 2 of 4" in printed.err
    assert any(re.split(" {2,}", line)[0].endswith("/early *") for line in printed.out.splitlines())
    none = copy(runs / "exchange", tmp_path / "none", {}, lambda rows: [])
    assert main(["compare", str(runs / "separate"), str(none)]) == 2
    expected = f"{none} is unfinished: it has no evaluation yet, its log ends at step 4"
    assert expected in capsys.readouterr().err


def test_epochs_tell_the_end(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 images in batches of 4 are 3 steps an epoch; the run's stages have 7 steps."""
    longer = copy(runs / "exchange", tmp_path / "longer", {"run.steps": None})
    assert main(["compare", str(longer)]) == 0
    assert "is unfinished: step 4 of 7" in capsys.readouterr().err
    header = json.loads((longer / "config.json").read_text())
    header["config"]["optim"]["stages"] = [{"epochs": 5, "steps": None}]
    (longer / "config.json").write_text(json.dumps(header))
    assert main(["compare", str(longer)]) == 0
    assert "is unfinished: step 4 of 15" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.root": "/data/other"}, "data.root differ: "),
        ({"eval.flip": True}, "eval.flip differ: false in "),
        ({"data.merge": "nyu13"}, "data.merge differ: none in "),
    ],
)
def test_other_data_are_warned_of(runs: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    other = copy(runs / "exchange", tmp_path / "other", settings)
    found = compared(runs / "exchange", other)
    (warning,) = found["warnings"]
    assert warning.startswith(f"the metrics may not compare, {message}")
    assert str(other) in warning
    assert len(found["groups"]) == 2


def test_a_repeated_seed_is_warned_of(runs: Path, tmp_path: Path) -> None:
    again = copy(runs / "exchange", tmp_path / "again")
    (warning,) = compared(runs / "exchange", again)["warnings"]
    assert warning == f"{runs / 'exchange'}, {again} have the same settings and the same seed, 0"


def test_other_classes_are_warned_of(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy(runs / "exchange", tmp_path / "other", {"run.seed": 1})
    header = json.loads((other / "config.json").read_text())
    header["classes"][0] = "void"
    (other / "config.json").write_text(json.dumps(header))
    assert main(["compare", str(runs / "exchange"), str(other)]) == 0
    assert "the names of classes differ: " in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exchange = str(runs / "exchange")
    (tmp_path / "file").touch()
    broken = copy(runs / "exchange", tmp_path / "broken")
    (broken / "config.json").write_text("{")
    unknown = copy(runs / "exchange", tmp_path / "unknown", {"model.encoder": "resnet19"})
    for command, message in {
        (exchange, str(runs / "translation")): "runs must be of one kind: ",
        (exchange, exchange): f"{exchange} is given twice",
        (str(runs / "exchang"),): "did you mean 'exchange'",
        (str(runs / "rooms"),): "rooms is no run's folder: it holds no config.json",
        (str(broken),): f"{broken} is broken (",
        (str(unknown),): f"{unknown}: model.encoder must be one of ",
        (exchange, "--out", str(tmp_path / "file")): "--output: cannot write ",
    }.items():
        assert main(["compare", *command]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
