"""Every fusion trains, and a resumed run computes the same bits; what a fusion cannot do is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import examples.own_encoder  # noqa: F401 - registers plain_net, whose steps take milliseconds
from models.__main__ import main
from models.networks.encoders import resnet
from models.networks.fusion.base import FUSIONS
from tests.helpers import training_runs, translation_runs
from tests.helpers.training_runs import assert_same_runs, column

OURS = [name for name, kind in FUSIONS.members.items() if kind.__module__.startswith("models.")]
FEW = [
    "run.log_steps=1",
    "run.evaluate_steps=2",
    "run.checkpoint_steps=100",
    "data.batch_size=2",
    "eval.limit=1",
]
OPTIONS = {"align": ["fusion.samples=16"], "fixed_portion": ["fusion.choice=random"]}
OF_UNETS = {
    "self_attention": ["fusion.norm_at_end=none"],
    "mmf": ["fusion.setting=shared"],
    "se_add": ["fusion.setting=shared"],
}
NOT_FOR_UNETS = {
    "late_concat": "fusion must leave a U-Net a branch",
    "conditional_norm": "needs a network of batch norms",
}


def options_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(FUSIONS[name])}


SETTINGS = [
    (name, setting)
    for name in OURS
    for setting in (("shared", "separate") if "setting" in options_of(name) else ("",))
]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return translation_runs.prepare_views(tmp_path_factory.mktemp("data") / "views")


def check(whole: list[str], parts: list[str], folder: Path, *, aligns: bool) -> None:
    """Three steps at once, and two and one, must be the same run; alignment is in its loss."""
    assert main([*whole, "run.steps=3"]) == 0
    assert main([*parts, "run.steps=2"]) == 0
    assert main([*parts, "run.steps=3", "--resume"]) == 0
    assert_same_runs(folder / "whole", folder / "parts")
    if aligns:
        assert all(column(folder / "whole", "losses.csv", "loss/fusion"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_segmentation(
    rooms: Path, tmp_path: Path, name: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = "plain_net"
    if name == "asymfusion":  # it needs bottleneck blocks, the last of a stage without a stride
        encoder = "resnet50"
        monkeypatch.setattr(resnet, "WIDTHS", (10, 10, 10, 10))
        monkeypatch.setitem(resnet.RESNETS, encoder, (resnet.Bottleneck, (2, 2, 2, 2)))
    chosen = [f"fusion={name}", *OPTIONS.get(name, [])]
    if setting:
        chosen += [f"fusion.setting={setting}", "fusion.stages=1,3"]
    settings = [*FEW, f"model.encoder={encoder}", *chosen]
    whole, parts = (training_runs.command(rooms, tmp_path / run, *settings) for run in ("whole", "parts"))
    check(whole, parts, tmp_path, aligns=name == "align")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [name for name in OURS if name not in NOT_FOR_UNETS])
def test_translation(views: Path, tmp_path: Path, name: str) -> None:
    chosen = [f"fusion={name}", *OPTIONS.get(name, []), *OF_UNETS.get(name, [])]
    if "stages" in options_of(name):
        chosen.append("fusion.stages=2,5")  # of five: the last is a single pixel
    if "fused_to" in options_of(name):
        chosen.append("fusion.fused_to=all")
    whole, parts = (
        translation_runs.command(views, tmp_path / run, *FEW, *chosen) for run in ("whole", "parts")
    )
    check(whole, parts, tmp_path, aligns=name == "align")


def refusal(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that refuses a training, of which nothing is left."""
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert not folder.exists()
    return captured.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            (["data.modalities=rgb", f"fusion={name}"], f"fusion={name} needs at least two modalities, ")
            for name in ("concat", "average", "self_attention", "align", "mmf", "conditional_norm")
        ),
        (["fusion=concat", "fusion.stages=5"], "fusion.stages must be at most 4, "),
        (["fusion=align", "fusion.stages=0,1"], "fusion.stages must be ascending numbers from 1 on, "),
        (["fusion=mmf", "fusion.stages=late"], "fusion.stages=late: expected a whole number"),
        (
            ["fusion=concat", "fusion.stagse=3"],
            "unknown field 'fusion.stagse'; did you mean 'fusion.stages'?",
        ),
        (
            ["fusion=concat", "fusion.threshold=0.1"],
            "unknown field 'fusion.threshold': threshold is an option of exchange, late_concat, discard; "
            "those of fusion=concat are stages, setting, ",
        ),
        (
            ["fusion.threshold=0.1", "fusion=concat"],
            "fusion.threshold=0.1 has no effect: fusion=concat, which follows, discards it",
        ),
        (
            ["fusion.stages=3", "fusion=concat"],
            "unknown field 'fusion.stages': stages is an option of concat, ",
        ),
        (["fusion=concatt"], "did you mean 'concat'?"),
    ],
)
def test_what_a_fusion_cannot_do_is_refused_before_work_starts(
    rooms: Path, tmp_path: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = training_runs.command(rooms, tmp_path / "run", *settings)
    assert message in refusal(command, tmp_path / "run", capsys)


@pytest.mark.parametrize(("name", "message"), NOT_FOR_UNETS.items())
def test_what_a_unet_cannot_do_is_refused_before_work_starts(
    views: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = translation_runs.command(views, tmp_path / "run", f"fusion={name}")
    assert message in refusal(command, tmp_path / "run", capsys)
