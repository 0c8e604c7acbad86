"""``cen recipes --table``: every row's command runs, and its network has the parameters of the formulas."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from models import tables
from models.__main__ import main
from models.networks.counting import count_parameters
from models.segmentation.build import build_network
from models.tables import Figure, Row, Table, listing, table3
from models.tables.rows import scores
from models.training import registry
from tests.helpers import vision
from tests.helpers.parameter_counts import (
    ALL,
    MIT_NORMS,
    NORMS,
    PVT_REFINENET,
    REFINENET,
    SEGFORMER,
    refinenet101,
    unet_blocks,
)

NAMES = {"concat": "concat", "average": "average", "align": "align", "self-att.": "self_attention"}
STAGES = {"early": (2,), "middle": (3,), "late": (4,), "all-stage": ALL}
LEVELS = {"early": (1,), "middle": (4,), "late": (8,), "all-layer": tuple(range(1, 9))}
# Of Table 3, by method and backbone, with 40 classes.
SIDES = 2 * (40 * 256 + 2 * 40)  # SSMA's side outputs: 1x1 convolutions to 40 classes, and norms
SYSTEMS = {
    ("FCN-32s, rgb", "VGG16"): 134_424_424,
    ("RefineNet, rgb", "ResNet-101"): REFINENET[101],
    ("RefineNet, rgb", "ResNet-152"): REFINENET[152],
    ("FuseNet", "VGG16"): 44_188_072,
    ("ACNet", "ResNet-50"): 116_628_168,
    ("SSMA", "ResNet-50"): 56_282_892 + SIDES,
    ("SSMA, theirs", "ResNet-101"): 94_267_148 + SIDES,
    ("CBN, theirs", "ResNet-101"): REFINENET[101] + NORMS[101] + 3_577_696,
    ("3DGNN", "ResNet-101"): 52_766_312,
    ("RDFNet", "ResNet-50"): 149_143_080,
    ("RDFNet", "ResNet-101"): 187_127_208,
    ("RDFNet", "ResNet-152"): 218_414_504,
    ("ESANet", "ResNet-34 NBt1D"): 46_962_112,
    ("ESANet, exchanging", "ResNet-34 NBt1D"): 32_118_144,
    ("no exchange", "SegFormer-B2"): SEGFORMER + MIT_NORMS,
    ("CEN, by layer norms", "SegFormer-B2"): SEGFORMER + MIT_NORMS,
    ("CEN, RefineNet", "ResNet-101, single-scale"): REFINENET[101] + NORMS[101],
    ("CEN, RefineNet", "ResNet-101"): REFINENET[101] + NORMS[101],
    ("CEN, RefineNet", "ResNet-152"): REFINENET[152] + NORMS[152],
}
UNET = 54_424_323  # two modalities, without a fusion's blocks
UNET_NORMS = 4_864  # what one more modality adds


@cache
def entries(name: str) -> list[listing.Entry]:
    return listing.entries(tables.find(name), ["run.seed=1"])


def fusion_of(row: Row) -> tuple[str, str]:
    """The registered name and the stages in words, of a method such as ``concat (early)``."""
    method, _, stages = row.method.rstrip(")").partition(" (")
    return NAMES[method], stages


def expected_parameters(name: str, row: Row) -> int | None:
    """From the words of the row alone, not from its settings; None where they do not tell."""
    if name == "3":
        return SYSTEMS.get((row.method, row.setting))
    if name == "1":
        two = REFINENET[101] + NORMS[101]
        unshared, shared = "unshared convolutions and norms", "shared convolutions and norms"
        return {unshared: 2 * REFINENET[101], shared: REFINENET[101]}.get(row.method, two)
    if name == "2" and row.method in ("rgb alone", "depth alone"):
        return REFINENET[101]
    if name == "2" and row.method == "CEN":
        return REFINENET[101] + NORMS[101]
    if name == "2":
        fusion, stages = fusion_of(row)
        setting = {"commonly used": "separate", "same as ours": "shared"}[row.setting]
        return refinenet101(fusion, setting, STAGES[stages])
    if name == "asymfusion-nyudv2":
        depth = int(row.setting.removeprefix("ResNet-"))
        if row.method == "RDFNet":
            return {101: 366_714_792, 152: 398_002_088}[depth]
        return REFINENET[depth] + (NORMS[depth] if row.method == "AsymFusion" else 0)
    if name == "asymfusion-cityscapes":
        return 41_240_099 if row.method == "AsymFusion" else 41_054_899
    if name == "tokenfusion-nyudv2":
        return SEGFORMER + MIT_NORMS
    inputs = row.setting.partition(" to ")[0].count("+") + 1
    plain = UNET + (inputs - 2) * UNET_NORMS
    if row.method in ("CEN", "one modality", "AsymFusion"):
        return plain
    if name == "asymfusion-translation":
        fusion = {**NAMES, "attention": "self_attention", "MMF": "mmf"}[row.method]
        return plain + unet_blocks(fusion, LEVELS["all-layer"], inputs)
    fusion, levels = fusion_of(row)
    return plain + unet_blocks(fusion, LEVELS[levels], inputs)


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command is one that the command line takes; the network of those settings has the parameters."""
    calls: list[tuple[str, Sequence[str]]] = []
    monkeypatch.setattr("models.training.train.train", lambda *call: calls.append(call[:2]) or 0)
    found = [entry for entry in entries(name) if entry.row.recipe]
    for entry in found:
        assert entry.command is not None
        words = shlex.split(entry.command)
        assert main(words[words.index("train") :]) == 0
        assert calls.pop() == (entry.settings[0], list(entry.settings[1:]))
        assert entry.settings[-1] == "run.seed=1"
    counted = {(entry.row.method, entry.row.setting): entry.parameters for entry in found}
    assert len(counted) == len(found)
    expected = {(row.method, row.setting): expected_parameters(name, row) for row in (e.row for e in found)}
    expected.pop(("CEN, PSPNet", "ResNet-152"), None)  # tests/networks/test_pspnet.py counts its parts
    assert {key: counted[key] for key in expected} == expected


def test_tables_have_all_rows() -> None:
    counts = {name: len(table.rows) for name, table in tables.TABLES.items()}
    assert counts == {
        **{"1": 6, "2": 2 + 12 * 2 + 1, "3": 17 + 1 + 5, "4": 2 * (1 + 4 * 4), "5": 7, "appendix": 3 * 4},
        **{"asymfusion-nyudv2": 8, "asymfusion-cityscapes": 3, "asymfusion-translation": 4 * 5},
        "tokenfusion-nyudv2": 2,
    }


def test_the_free_alternative_to_segformer() -> None:
    """It has as many layer norms as SegFormer-B2."""
    vision.timm()
    recipe = registry.find("nyudv2_cen_layer_norm_pvtv2_b2")
    with torch.device("meta"):
        net = build_network(recipe)
    assert count_parameters(net) == PVT_REFINENET + MIT_NORMS


def agrees(printed: Figure, counted: int) -> bool:
    return f"{counted / 1e6:.{printed.decimals}f}" == printed.text


def test_printed_parameters_are_the_counted_ones_but_for_eight() -> None:
    """Table 2's 36 figures: six follow from rounded ones, two from nothing."""
    notes: dict[str, str] = {}
    for entry in entries("2")[2:-1]:
        row = entry.row
        assert row.parameters is not None
        assert row.for_fusion is not None
        printed = {
            f"{row.method}, {row.setting}": (row.parameters, entry.parameters),
            f"{row.method}, fusion": (row.for_fusion, entry.for_fusion),
        }
        for name, (figure, counted) in printed.items():
            assert agrees(figure, counted) == (figure.note == ""), name
            notes[name] = figure.note
    assert len(notes) == 36
    assert {name for name, note in notes.items() if note == "b"} == {
        "self-att. (late), same as ours",  # 203.2, counted 203.14
        "self-att. (all-stage), commonly used",  # 272.3, counted 273.42
    }
    assert {name for name, note in notes.items() if note == "a"} == {
        f"{method}, {which}"
        for method in ("concat (early)", "concat (all-stage)", "self-att. (early)")
        for which in ("fusion", "same as ours")
    }


def test_the_slides_parameters_are_the_counted_ones() -> None:
    for entry in entries("asymfusion-nyudv2"):
        assert entry.row.parameters is not None
        assert agrees(entry.row.parameters, entry.parameters)


def test_text() -> None:
    lines = listing.lines(tables.TABLES["2"], entries("2"))
    row = next(i for i, line in enumerate(lines) if line.startswith("self-att. (late)       same as ours"))
    assert lines[row].split()[-7:] == ["47.6", "38.1", "48.3", "203.2b", "203,144,552", "84.9", "84,942,976"]
    options = "fusion=self_attention fusion.stages=4 fusion.setting=shared"
    assert lines[row + 1].endswith(f" train nyudv2_cen_refinenet101 {options} run.seed=1")
    assert "b: no arithmetic gives it" in lines
    assert any(line.startswith("Every command needs data.root=FOLDER") for line in lines)


def test_the_command_prints_overrides_in_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--table", "5", "data.root=/data/my views"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("CEN, Table 5: ")
    assert printed.count("'data.root=/data/my views'\n") == 7
    assert "needs data.root" not in printed


QUOTED = Table(
    "made up",
    "paper",
    ("IoU",),
    (
        Row("built", "nyudv2_cen_refinenet50", (), "ResNet-50", scores(("IoU",), "40.1"), Figure("99.2")),
        Row("told", setting="x", scores=scores(("IoU",), "39.0a"), reason="no layers are public"),
        Row(
            "elsewhere",
            setting="y",
            scores=scores(("IoU",), "38.5"),
            parameters=Figure.of("7.5", "slides"),
            origin="quoted",
            reason="no time",
        ),
    ),
    notes={"a": "a note"},
)


def test_rows_that_cannot_be_built_say_why() -> None:
    found = listing.entries(QUOTED, ["run.seed=1"])
    assert [entry.parameters for entry in found] == [REFINENET[50] + NORMS[50], None, None]
    assert [entry.command is None for entry in found] == [False, True, True]
    lines = listing.lines(QUOTED, found)
    assert [" ".join(line.split()) for line in lines[4:10]] == [
        "built ResNet-50 40.1 99.2 99,157,224",
        found[0].command,
        "told x 39.0a - -",
        "not built: no layers are public",
        "elsewhere y [quoted] 38.5 7.5 -",
        "not built: no time",
    ]
    assert "[paper]: as the paper prints it, parameters in millions" in lines
    assert "[quoted]: as another paper has it, parameters in millions" in lines


def test_json_of_rows_that_cannot_be_built() -> None:
    built, told, elsewhere = listing.plain(QUOTED, listing.entries(QUOTED))["rows"]
    assert built["reason"] is None
    assert told["parameters"] == {"counted": None}
    assert (told["settings"], told["command"], told["reason"]) == ([], None, "no layers are public")
    assert told["scores"] == {"IoU": {"value": 39.0, "origin": "paper"}}
    assert elsewhere["scores"] == {"IoU": {"value": 38.5, "origin": "quoted"}}
    assert elsewhere["parameters"]["printed"] == {"value": 7_500_000, "origin": "slides", "note": None}


@pytest.mark.parametrize("given", [{}, {"recipe": "nyudv2_cen_refinenet50", "reason": "none"}])
def test_a_row_has_a_recipe_or_a_reason(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="recipe of CFN: expected the name of one, or a reason why"):
        Row("CFN", **given)


def test_table_3_is_the_papers() -> None:
    """Its rows as printed, in their order, and those that it does not have marked as quoted."""
    table = table3.TABLES["3"]
    rows = [(row, [row.scores.get(name) for name in table.columns]) for row in table.rows]
    printed = {
        (row.method, row.setting): " ".join("-" if figure is None else figure.text for figure in figures)
        for row, figures in rows
        if row.origin is None and row.scores
    }
    assert list(printed.items()) == [
        (("FCN-32s, rgb", "VGG16"), "60.0 42.2 29.2 68.4 41.1 29.0"),
        (("RefineNet, rgb", "ResNet-101"), "73.8 58.8 46.4 80.8 57.3 46.3"),
        (("RefineNet, rgb", "ResNet-152"), "74.4 59.6 47.6 81.1 57.7 47.0"),
        (("FuseNet", "VGG16"), "68.1 50.4 37.9 76.3 48.3 37.3"),
        (("ACNet", "ResNet-50"), "- - 48.3 - - 48.1"),
        (("SSMA", "ResNet-50"), "75.2 60.5 48.7 81.0 58.1 45.7"),
        (("SSMA, theirs", "ResNet-101"), "75.8 62.3 49.6 81.6 60.4 47.9"),
        (("CBN, theirs", "ResNet-101"), "75.5 61.2 48.9 81.5 59.8 47.4"),
        (("3DGNN", "ResNet-101"), "- - - - 57.0 45.9"),
        (("SCN", "ResNet-152"), "- - 49.6 - - 50.7"),
        (("CFN", "ResNet-152"), "- - 47.7 - - 48.1"),
        (("RDFNet", "ResNet-101"), "75.6 62.2 49.1 80.9 59.6 47.2"),
        (("RDFNet", "ResNet-152"), "76.0 62.8 50.1 81.5 60.1 47.7"),
        (("CEN, RefineNet", "ResNet-101, single-scale"), "76.2 62.8 51.1 82.0 60.9 49.6"),
        (("CEN, RefineNet", "ResNet-101"), "77.2 63.7 51.7 82.8 61.9 50.2"),
        (("CEN, RefineNet", "ResNet-152"), "77.4 64.8 52.2 83.2 62.5 50.8"),
        (("CEN, PSPNet", "ResNet-152"), "77.7 65.0 52.5 83.5 63.2 51.1"),
    ]
    notes = {figure.note for row, _ in rows for figure in [row.parameters] if figure and figure.note}
    assert notes == table.notes.keys()
    assert [row.method for row in table.rows if not row.recipe] == ["SCN", "CFN", "TokenFusion"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--table", "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["rows"][0]
    assert first["scores"]["IoU ensemble"] == {"value": 47.6, "origin": "paper"}
    assert first["parameters"] == {"counted": 2 * REFINENET[101]}
    assert first["settings"] == ["nyudv2_cen_refinenet101", "fusion=none", "fusion.convolutions=private"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "apendix"], "did you mean 'appendix'"),
        (["--table", "6"], "--table must be one of 1, 2, 3, 4, 5, "),
        (["nyudv2_cen_refinenet50", "--table", "1"], "expected field=value, got 'nyudv2_cen_refinenet50'"),
        (["--table", "1", "data.rot=x"], "did you mean 'data.root'"),
        (["--json"], "--json prints a table"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err
