"""``cen report`` on tiny runs of both systems, on copies of them, and on what is not whole."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import examples.own_encoder  # noqa: F401 - registers plain_net, whose runs take milliseconds
import models
from models.__main__ import main
from models.data import eval_loader
from models.data.loading import subset
from models.report.examined import examine
from models.report.layers import layers_of
from models.segmentation.build import open_validation
from models.segmentation.evaluate import evaluate
from models.segmentation.metrics import BY_IMAGE, class_rows
from tests.helpers import training_runs, translation_runs
from tests.helpers.copied_runs import copy, shifted
from tests.helpers.pages import Page

FEW = ["run.steps=4", "run.log_steps=2", "run.evaluate_steps=2", "run.scales_steps=2"]
STRANGE = '<b>&"it\'s"'  # the name of a folder
CORRUPTED = {
    "checkpoint": "best.pt",
    "images": 3,
    "drop_modality": 0.0,
    "rows": [
        {"corruption": "", "metrics": {"ensemble/mean_iou": 0.3125, "rgb/mean_iou": 0.25}},
        {"corruption": "depth=noise:0.1", "metrics": {"ensemble/mean_iou": 0.21875}},
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs: ``exchange``, its copy ``seed1`` of another seed, and ``translation``."""
    root = tmp_path_factory.mktemp("reported")
    rooms = training_runs.prepare_rooms(root / "rooms")
    settings = [*FEW, "model.encoder=plain_net", "model.initial_scale=0.02", "fusion.threshold=0.021"]
    assert main(training_runs.command(rooms, root / "exchange", *settings)) == 0
    views = translation_runs.prepare_views(root / "views")
    assert main(translation_runs.command(views, root / "translation", *FEW)) == 0
    other = copy(root / "exchange", root / "seed1", {"run.seed": 1}, shifted(0.125))
    for name in ("best.pt", "scales"):
        source = root / "exchange" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, other / name)
    (root / "exchange" / "corrupted_best.json").write_text(json.dumps(CORRUPTED))
    return root


def report(output: Path, *arguments: str | Path) -> Page:
    """The page that the command writes."""
    assert main(["report", *map(str, arguments), "--output", str(output)]) == 0
    return Page(output.read_text())


@pytest.fixture(scope="module")
def strange(runs: Path) -> Path:
    """A run of other settings without a checkpoint, in a folder whose name is not plain text."""
    return copy(runs / "exchange", runs / STRANGE, {"loss.sparsity": 0.25})


@pytest.fixture(scope="module")
def page_file(runs: Path, strange: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two seeds and of the run without a checkpoint."""
    output = tmp_path_factory.mktemp("page") / "new" / "report.html"
    report(output, runs / "exchange", strange, runs / "seed1")
    return output


@pytest.fixture(scope="module")
def page(page_file: Path) -> Page:
    return Page(page_file.read_text())


def last(run: Path) -> dict[str, float]:
    with (run / "metrics.csv").open(newline="") as file:
        return {name: float(cell) for name, cell in list(csv.DictReader(file))[-1].items()}


def test_the_page_stands_alone(page: Page, page_file: Path) -> None:
    text = page_file.read_text()
    assert page.faults == []
    assert len(page.ids) == len(set(page.ids))
    assert text.startswith("<!DOCTYPE html>")
    targets = [link for link in page.links if not link.startswith("data:")]
    assert targets
    assert all(link.removeprefix("#") in page.ids for link in targets), "only to places on the page"
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(text) < 2_000_000


def test_numbers_are_those_of_the_tables(page: Page, runs: Path, strange: Path) -> None:
    values = last(runs / "exchange")
    spread = np.std([0, 0.125], ddof=1)
    for name, value in values.items():
        output, _, score = name.partition("/")
        if score and output != "constant":
            assert f"{100 * (value + 0.0625):.2f} ± {100 * spread:.2f}" in page.words, name
            assert f"{100 * value:.2f}" in page.words, f"{name} of {strange}"
    assert "1e-05 0.25" in page.words, "loss.sparsity in the table of differences"
    with (runs / "exchange" / "losses.csv").open(newline="") as file:
        total = float(list(csv.DictReader(file))[-1]["loss/loss"])
    assert any(f"to {total:.4g} at step 4" in label for label in page.described)


def test_values_are_escaped(page: Page, page_file: Path) -> None:
    assert STRANGE in page.words
    assert STRANGE not in page_file.read_text()


def test_figures_are_described(page: Page) -> None:
    assert len(page.images) >= 3 * 7
    assert all(image["alt"] for image in page.images)
    assert all(
        str(image["src"]).startswith(("data:image/png;base64,", "data:image/jpeg;")) for image in page.images
    )
    assert len(page.described) > 10
    assert all(page.described)


def test_what_is_missing_is_said(page: Page, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = runs / STRANGE
    assert f"The checkpoint of {missing} cannot be shown: " in page.words
    assert f"{missing} holds no records of γ over time." in page.words
    assert str(runs / "seed1") not in page.words.partition("Mind this")[2].partition("Words")[0]


def test_confusions_and_classes_are_those_of_the_evaluation(page: Page, runs: Path) -> None:
    trained = models.load(runs / "exchange")
    dataset = open_validation(trained.recipe)
    expected = evaluate(trained.net, dataset, trained.recipe)
    assert expected is not None
    found = examine(trained, None)
    assert found.classes == class_rows(expected, dataset.class_names)
    assert found.confusion is not None
    assert found.confusion.tolist() == expected.confusion[-1].tolist()
    metrics = expected.compute()
    for output in expected.names:
        mean = np.mean([scene.scores[output] for scene in found.scenes])
        assert mean == pytest.approx(metrics[f"{output}/{BY_IMAGE}"])
    order = [scene.scores["ensemble"] for scene in found.scenes]
    assert order == sorted(order, reverse=True)
    assert [drawn.scores["ensemble"] for drawn in (*found.best, *found.worst[::-1])] == order
    label, iou = next((label, row["ensemble"]) for label, row in found.classes.items() if row["ensemble"])
    assert f"{label} " in page.words
    assert f"{100 * iou:.2f} ± 0.00" in page.words, "two seeds with one checkpoint"


def test_errors_are_drawn_where_labels_differ(runs: Path) -> None:
    trained = models.load(runs / "exchange")
    dataset = open_validation(trained.recipe)
    (drawn,) = examine(trained, 1).best
    batch = next(iter(eval_loader(subset(dataset, [0]))))
    target = batch.target[0].numpy()
    wrong = trained.label(batch.images)["ensemble"].numpy() != target
    assert wrong.any()
    assert ((drawn.images["errors"] < 128).all(2) == (wrong & (target != 255))).all()


def test_lenders_of_three_modalities() -> None:
    fusion = models.fusion.Exchange(threshold=0.5, region="all")
    net = models.refinenet("plain_net", num_modalities=3, width=4, fusion=fusion)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(0, 1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = {layer.name: torch.rand_like(layer.scales) for layer in layers_of(net)}
    for layers, scales in ((layers_of(net), None), (layers_of(net, other), other)):
        assert len(layers) == len(other)
        for layer in layers:
            gamma = (layer.scales if scales is None else scales[layer.name]).double().numpy()
            for m in range(3):
                replaced = (np.abs(gamma[m]) < 0.5).mean()
                assert float(layer.replaced[m]) == pytest.approx(replaced)
                for lender in range(3):
                    expected = 0 if lender == m else replaced / 2
                    assert float(layer.lent[m, lender]) == pytest.approx(expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_robustness(page: Page) -> None:
    section = page.words.partition("Robustness How")[2].partition("Costs")[0]
    assert "clean 31.25" in section
    assert "depth=noise:0.1 21.88" in section
    assert "trained with all modalities" in section


def test_data_that_has_moved(runs: Path, tmp_path: Path) -> None:
    moved = copy(runs / "exchange", tmp_path / "moved")
    contents = torch.load(runs / "exchange" / "best.pt")
    contents["config"]["data"]["root"] = str(tmp_path / "nowhere")
    torch.save(contents, moved / "best.pt")
    page = report(tmp_path / "without.html", moved)
    assert f"The validation images of {moved} could not be looked at: data.root: " in page.words
    assert "data.root=FOLDER" in page.words
    assert page.images == []
    found = report(tmp_path / "with.html", moved, f"data.root={runs / 'rooms'}", "--images", "1")
    assert len(found.images) == 7
    assert f"1 of 3 validation images of {moved} were looked at" in found.words


def test_a_run_that_has_only_begun(runs: Path, tmp_path: Path) -> None:
    begun = copy(runs / "exchange", tmp_path / "begun", {}, lambda rows: [])
    page = report(tmp_path / "begun.html", begun)
    assert page.faults == []
    assert f"{begun} is unfinished (step 4 of 4) and has no evaluation yet." in page.words
    assert "No run has been evaluated yet" in page.words


def test_files_alone(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path / "alone.html", runs / "exchange", "--no-evaluation")
    assert page.images == []
    assert "No checkpoint was run: classes, confusions and pictures are left out." in page.words
    assert "rgb lends to depth" in page.words


def test_translation(runs: Path, tmp_path: Path) -> None:
    page = report(tmp_path / "translation.html", runs / "translation")
    assert page.faults == []
    values = last(runs / "translation")
    for name in ("ensemble/l1", "ensemble/psnr", "normal/ssim"):
        assert f"{values[name]:.4f}" in page.words, name
    assert len(page.images) == 3 * 6
    assert "image translation to reshading" in page.words
    assert "normal: number of channels by |γ|" in page.words


def test_what_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    exchange = str(runs / "exchange")
    for arguments, message in (
        ([exchange, str(runs / "translation")], "report: runs must be of one kind"),
        ([exchange, exchange], "is given twice"),
        ([exchange, "eval.limt=3"], "eval.limit"),
        ([exchange, "--images", "0"], "--images must be at least 1"),
        ([str(runs / "rooms")], "is no run's folder"),
    ):
        assert main(["report", *arguments, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert not output.exists()
