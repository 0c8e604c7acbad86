"""Of what command line, ``layout.json``, recipe and known layout say of the same files, which one holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models.recipes  # noqa: F401 - fills the registry
from models.__main__ import main
from models.data import (
    LAYOUTS,
    DataError,
    InputSpec,
    SegmentationSet,
    differing_inputs,
    find_layout,
    input_from_plain,
    input_specs,
    layout_from_plain,
    to_plain,
)
from models.data.inputs import once_color, upgrade
from models.segmentation.build import build_reader, open_split, precedence
from models.segmentation.settings import OF_LAYOUT, DataSettings, SegmentationRecipe
from models.training import checkpoint, config, registry
from models.training.errors import UsageError
from tests.helpers.trees import units, write

SIZE = (12, 16)
PLACES = ("command line", "layout.json", "recipe", "known")  # the first one that says something holds
# By field, what each of them says.
SAID: dict[str, dict[str, Any]] = {
    "depth_scale": {"command line": 2000.0, "layout.json": 1000, "recipe": 6528.0, "known": 5000.0},
    "bit_shift": {"command line": 3, "layout.json": 1, "recipe": 2, "known": 0},
    "label_offset": {"command line": 3, "layout.json": 1, "recipe": 2, "known": 0},
    "camera": {
        "command line": (21.0, 22.0, 7.5, 5.5),
        "layout.json": [11, 12, 7.5, 5.5],
        "recipe": (31.0, 32.0, 7.5, 5.5),
        "known": tuple(LAYOUTS["nyu_cen"].camera[:4]),
    },
}


def stored(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 60000, SIZE).astype(np.uint16)


def folder(root: Path, **fields: Any) -> Path:
    """Two scenes as in the paper's archive, and a ``layout.json`` of it with these fields, if any."""
    for split, numbers in (("train", (1, 2)), ("val", (3,))):
        lines = []
        for number in numbers:
            names = [f"{kind}/{number}.png" for kind in ("rgb", "masks", "depth")]
            labels = 3 + (np.arange(SIZE[0] * SIZE[1]) % 8).astype(np.uint8).reshape(SIZE)
            for name, image in zip(
                names, (np.zeros((*SIZE, 3), np.uint8), labels, stored(number)), strict=True
            ):
                write(root / name, image)
            lines.append("\t".join(names))
        (root / f"{split}.txt").write_text("\n".join(lines))
    if fields:
        (root / "layout.json").write_text(json.dumps({"base": "nyu_cen", **fields}))
    return root


def said_by(name: str, places: set[str], root: Path) -> DataSettings:
    """Settings of a recipe that says something or not, changed on the command line or not."""
    recipe = SegmentationRecipe(data=DataSettings())
    if "recipe" in places:
        recipe = replace(recipe, data=replace(recipe.data, **{name: SAID[name]["recipe"]}))
    assignments = [f"data.root={root}"]
    if "command line" in places:
        assignments.append(f"data.{name}={config.show(SAID[name]['command line'])}")
    return config.override(recipe, assignments).data


def in_words(name: str, place: str) -> str:
    value = SAID[name][place]
    if name == "camera" and place == "layout.json":
        value = tuple(map(float, value))
    return config.show(value)


@pytest.mark.parametrize("in_recipe", [False, True])
@pytest.mark.parametrize("in_json", [False, True])
@pytest.mark.parametrize("in_command", [False, True])
@pytest.mark.parametrize("name", OF_LAYOUT)
def test_who_is_nearer_to_the_files_goes_before(
    tmp_path: Path, name: str, in_command: bool, in_json: bool, in_recipe: bool
) -> None:
    """Typed settings hold; then those beside the files; a recipe's words are of other files."""
    flags = {"command line": in_command, "layout.json": in_json, "recipe": in_recipe, "known": True}
    places = {place for place, there in flags.items() if there}
    root = folder(tmp_path, **({name: SAID[name]["layout.json"]} if in_json else {}))
    settings = said_by(name, places, root)
    winner = next(place for place in PLACES if place in places)
    dataset = open_split(settings, "train")
    found = getattr(dataset.layout, name)
    found = tuple(found[:4]) if name == "camera" else found
    expected = SAID[name][winner]
    assert found == (tuple(expected) if name == "camera" else expected)
    if name == "depth_scale":
        depth = dataset.sample(0).images[1][:, :, 0]
        np.testing.assert_allclose(depth, stored(1) / float(expected), rtol=1e-6)
    reader = build_reader(settings)
    assert getattr(reader.layout, name) == getattr(dataset.layout, name)

    _, notes = precedence(settings, find_layout(root))
    loser = {
        "command line": "layout.json" if in_json else None,
        "layout.json": "recipe" if in_recipe else None,
        "recipe": "known",
        "known": None,
    }[winner]
    if loser is None:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"data.{name}: {in_words(name, winner)} of ")
        assert f"goes before {'the recipe' if loser == 'recipe' else in_words(name, loser)}" in note
        assert in_words(name, loser) in note
        for place in (winner, loser):
            assert {"known": "the layout nyu_cen"}.get(place, place) in note


@pytest.mark.parametrize("name", OF_LAYOUT)
def test_nothing_is_said_where_all_say_the_same(tmp_path: Path, name: str) -> None:
    value = SAID[name]["recipe"]
    root = folder(tmp_path, **{name: list(value) if name == "camera" else value})
    settings = said_by(name, {"recipe"}, root)
    values, notes = precedence(settings, find_layout(root))
    assert (values, notes) == ({}, [])


@pytest.mark.parametrize("name", ["bit_shift", "label_offset"])
def test_a_zero_that_was_typed_is_a_value(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path, **{name: 1})
    data = config.override(SegmentationRecipe(), [f"data.root={root}", f"data.{name}=0"]).data
    assert getattr(open_split(data, "train").layout, name) == 0


@pytest.mark.parametrize("name", OF_LAYOUT)
def test_none_leaves_it_to_the_files(tmp_path: Path, name: str) -> None:
    """Typed ``none`` takes the recipe's value back."""
    root = folder(tmp_path)
    recipe = SegmentationRecipe(data=replace(DataSettings(), **{name: SAID[name]["recipe"]}))
    nothing = "" if name == "camera" else "none"
    data = config.override(recipe, [f"data.root={root}", f"data.{name}={nothing}"]).data
    assert getattr(open_split(data, "train").layout, name) == getattr(LAYOUTS["nyu_cen"], name)
    assert precedence(data, find_layout(root))[1] == []


def test_a_layout_that_is_named_is_not_layout_json(tmp_path: Path) -> None:
    root = folder(tmp_path, depth_scale=1000)
    recipe = SegmentationRecipe(data=DataSettings(depth_scale=6528.0))
    data = config.override(recipe, [f"data.root={root}", "data.layout=nyu_cen"]).data
    assert open_split(data, "train").layout.depth_scale == 6528.0


@pytest.mark.parametrize(
    ("fields", "typed", "scale"),
    [
        ({"depth_scale": 1000}, [], 1000.0),
        ({"depth_scale": 1000}, ["data.depth_scale=6528"], 6528.0),
        ({"label_offset": 3}, [], 6528.0),
        ({}, [], 6528.0),
        ({}, ["data.depth_scale=none"], 5000.0),
    ],
)
def test_the_recipe_of_the_small_copy_reads_other_folders_as_they_say(
    tmp_path: Path, fields: dict[str, Any], typed: list[str], scale: float
) -> None:
    """Its 6528 units per metre are of its own files; millimetres beside a layout.json are millimetres."""
    root = folder(tmp_path, **fields)
    recipe = config.override(registry.find("nyudv2_384_cen_refinenet18"), [f"data.root={root}", *typed])
    depth = open_split(recipe.data, "train").sample(1).images[1][:, :, 0]
    np.testing.assert_allclose(depth, stored(2) / scale, rtol=1e-6)


def test_the_data_command_says_which_of_two_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path, depth_scale=10000)
    for number in (1, 2, 3):
        write(root / f"depth/{number}.png", units(np.full(SIZE, 2.0), 10000) + stored(number) % 999)
    settings = [f"data.root={root}", "data.crop=32", "data.shorter_side=12", "data.batch_size=1"]
    command = ["data", "nyudv2_384_cen_refinenet18", *settings, "run.workers=0", "--output"]
    assert main([*command, str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr()
    note = "data.depth_scale: 10000 of layout.json goes before the recipe's 6528.0"
    assert note in printed.out + printed.err
    assert "depth_scale 10000" in printed.out


# What was typed is recorded, and goes with the network


def test_what_was_typed_is_recorded() -> None:
    recipe = SegmentationRecipe()
    assert recipe.data.given == ()
    found = config.override(recipe, ["data.depth_scale=1000", "run.steps=3", "data.camera=1,2,3,4"])
    assert set(found.data.given) == {"depth_scale", "camera"}
    again = config.override(found, ["data.depth_scale=2000", "data.bit_shift=0"])
    assert sorted(again.data.given) == ["bit_shift", "camera", "depth_scale"]
    assert config.override(recipe, ["run.steps=3"]).data.given == ()


@pytest.mark.parametrize("assignment", ["data.given=depth_scale", "data.given=", "given=x"])
def test_the_record_itself_cannot_be_set(assignment: str) -> None:
    with pytest.raises(UsageError, match=r"unknown field"):
        config.override(SegmentationRecipe(), [assignment])


def test_the_record_is_no_setting() -> None:
    """Nothing that lists or compares settings shows it."""
    typed = config.override(SegmentationRecipe(), ["data.num_classes=40", "data.camera="])
    assert typed.data.given
    assert typed == SegmentationRecipe()
    assert config.changes(SegmentationRecipe(), typed) == {}
    assert config.differing(SegmentationRecipe(), typed) == []
    assert not any("given" in path for path in config.flatten(typed))
    assert not any("given" in line.partition("=")[0] for line in config.describe(typed))


@pytest.mark.parametrize("names", [(), ("depth_scale",), OF_LAYOUT])
def test_a_checkpoint_keeps_the_record(tmp_path: Path, names: tuple[str, ...]) -> None:
    assignments = [f"data.{name}={config.show(SAID[name]['command line'])}" for name in names]
    recipe = config.override(SegmentationRecipe(), [f"data.root={tmp_path}", *assignments])
    plain = json.loads(json.dumps(config.to_plain(recipe)))
    found = config.from_plain(SegmentationRecipe(), plain)
    assert found == recipe
    assert found.data.given == recipe.data.given == ("root", *names)
    contents = {"recipe": "nyudv2_cen_refinenet101", "config": plain}
    assert checkpoint.settings(contents).data.given == recipe.data.given
    here, _ = checkpoint.settings_here(contents, ["data.label_offset=2"])
    assert set(here.data.given) == {"root", *names, "label_offset"}


@pytest.mark.parametrize("in_command", [False, True])
def test_a_network_is_evaluated_with_what_its_training_was_told(tmp_path: Path, in_command: bool) -> None:
    """After the round trip the same one of two holds, whichever it was."""
    root = folder(tmp_path, depth_scale=1000)
    places = {"recipe", "layout.json", *(["command line"] if in_command else [])}
    recipe = replace(SegmentationRecipe(), data=said_by("depth_scale", places, root))
    found = config.from_plain(SegmentationRecipe(), json.loads(json.dumps(config.to_plain(recipe)))).data
    expected = 2000.0 if in_command else 1000
    assert open_split(found, "val").layout.depth_scale == expected
    recorded = layout_from_plain(json.loads(json.dumps(to_plain(open_split(found, "val").layout))))
    assert build_reader(found, recorded).layout.depth_scale == expected


def test_the_layout_of_a_checkpoint_keeps_what_its_file_stated(tmp_path: Path) -> None:
    layout = find_layout(folder(tmp_path, depth_scale=1000, bit_shift=1))
    found = layout_from_plain(json.loads(json.dumps(to_plain(layout))))
    assert found == layout
    assert found.stated == layout.stated == ("depth_scale", "bit_shift")


# Checkpoints of older versions


NEW_IN_LAYOUTS = ("modalities", "crop_to_labels", "hha_floor", "stated")
NEW_IN_DATA = ("given", "hha_floor")
OLD_HHA = "255 of HHA's encoding"


def old_contents(layout: str, modalities: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """A checkpoint's record of its inputs before kinds, records and the right way up of HHA."""
    recipe = SegmentationRecipe(data=DataSettings(modalities=modalities, **settings))
    plain = json.loads(json.dumps(config.to_plain(recipe)))
    reader = build_reader(recipe.data, LAYOUTS[layout])
    inputs = [to_plain(spec) for spec in input_specs(reader)]
    return {
        "recipe": "nyudv2_cen_refinenet101",
        "config": {**plain, "data": {k: v for k, v in plain["data"].items() if k not in NEW_IN_DATA}},
        "layout": {k: v for k, v in to_plain(reader.layout).items() if k not in NEW_IN_LAYOUTS},
        "inputs": [{**spec, "unit": OLD_HHA} if spec["name"] == "hha" else spec for spec in inputs],
        "classes": [f"class {number}" for number in range(40)],
    }


def reader_of(contents: dict[str, Any]) -> Any:
    data = checkpoint.settings(contents).data
    return build_reader(data, layout_from_plain(contents["layout"]))


@pytest.mark.parametrize(
    ("layout", "modalities", "floor"),
    [
        ("nyu_cen", ("rgb", "hha"), 218),
        ("nyu_cen", ("hha",), 218),
        ("nyu_esanet", ("rgb", "hha", "normals"), 218),
        ("cityscapes", ("rgb", "hha"), 218),
        ("nyu_cen", ("rgb", "depth"), 38),
        ("nyu_cen", ("rgb", "normals"), 38),
        ("nyu_rgbx", ("rgb", "hha"), 38),  # of files, which are as they are
        ("nyu_rgbx", ("hha", "depth"), 38),
    ],
)
def test_networks_of_older_versions_are_fed_what_they_were_trained_on(
    layout: str, modalities: tuple[str, ...], floor: int
) -> None:
    """Their computed HHA was upside down; that of files never was."""
    old = old_contents(layout, modalities)
    kept = json.loads(json.dumps(old))
    contents = upgrade(old)
    assert old == kept
    assert contents["config"]["data"]["hha_floor"] == floor
    reader = reader_of(contents)
    assert reader.layout.hha_floor == floor
    specs = tuple(map(input_from_plain, contents["inputs"]))
    assert differing_inputs(specs, input_specs(reader)) == []
    here = input_specs(build_reader(DataSettings(modalities=modalities), LAYOUTS[layout]))
    assert (differing_inputs(specs, here) == []) == (floor == 38)
    assert upgrade(contents) is contents


def test_upside_down_hha_is_the_mirror_of_the_right_one(tmp_path: Path) -> None:
    """The third channel of a pixel in one and in the other add up to 256; the other two agree."""
    depth = np.rint(5000 * np.minimum(3, 60 / (np.mgrid[:48, :64][0] + 10))).astype(np.uint16)
    depth[:6, :8] = 0
    write(tmp_path / "depth.png", depth)
    paths = {"depth": tmp_path / "depth.png"}
    (old,) = reader_of(upgrade(old_contents("nyu_cen", ("hha",)))).read(paths)
    (new,) = build_reader(DataSettings(modalities=("hha",)), LAYOUTS["nyu_cen"]).read(paths)
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    known = new.any(axis=-1)
    assert known.any()
    np.testing.assert_array_equal(old.any(axis=-1), known)
    np.testing.assert_array_equal(old[:, :, :2], new[:, :, :2])
    third = [255 * (image.astype(np.float64) * std + mean)[known][:, 2] for image in (old, new)]
    np.testing.assert_allclose(third[0] + third[1], 256, atol=1e-3)
    assert np.ptp(third[0]) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [*[(name, "usual") for name in OF_LAYOUT], ("bit_shift", "zero"), ("label_offset", "zero")],
)
def test_settings_of_older_versions_go_before_layout_json(tmp_path: Path, name: str, value: str) -> None:
    """They did in any case then, and the network was trained so; a zero was as good as any."""
    said = 0 if value == "zero" else SAID[name]["recipe"]
    root = folder(tmp_path, **{name: SAID[name]["layout.json"]})
    contents = upgrade(old_contents("nyu_cen", ("rgb", "depth"), **{name: said}))
    data = replace(checkpoint.settings(contents).data, root=root)
    found = getattr(open_split(data, "train").layout, name)
    assert (tuple(found[:4]) if name == "camera" else found) == said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts_of_older_versions_are_todays(layout: str) -> None:
    """So that predict reads the same files with an old network as with a new one."""
    contents = upgrade(old_contents(layout, ("rgb",)))
    assert layout_from_plain(contents["layout"]) == LAYOUTS[layout]


def test_contents_of_this_version_stay_what_they_are(tmp_path: Path) -> None:
    recipe = SegmentationRecipe(data=DataSettings(modalities=("rgb", "hha")))
    reader = build_reader(recipe.data, LAYOUTS["nyu_cen"])
    contents = {
        "config": config.to_plain(recipe),
        "layout": to_plain(reader.layout),
        "inputs": [to_plain(spec) for spec in input_specs(reader)],
    }
    assert upgrade(contents) is contents
    other = {"config": {"data": {"domains": ["rgb"]}}, "weights": 1}  # of image translation
    assert upgrade(other) is other


@pytest.mark.parametrize("floor", [0, 37, 128, 219])
def test_floors_are_38_or_218(tmp_path: Path, floor: int) -> None:
    with pytest.raises(ValueError, match=rf"hha_floor must be 38 or 218, got {floor}"):
        DataSettings(hha_floor=floor)
    with pytest.raises(ValueError, match=rf"hha_floor must be 38 or 218, got {floor}"):
        SegmentationSet(folder(tmp_path), "train", hha_floor=floor)


def test_a_recipes_scale_is_no_scale_of_ones_own_folder(tmp_path: Path) -> None:
    """It is one data set's; whose files nobody has described are refused, as without a recipe's."""
    write(tmp_path / "depth/a.png", stored(1))
    write(tmp_path / "labels/a.png", np.zeros(SIZE, np.uint8))
    (tmp_path / "train.txt").write_text("a\n")
    files = {"depth": "depth/{name}.png", "labels": "labels/{name}.png"}
    (tmp_path / "layout.json").write_text(json.dumps({"files": files}))
    settings = DataSettings(root=tmp_path, depth_scale=6528.0, num_classes=2, modalities=("depth",))
    with pytest.raises(DataError, match=r"depth/a\.png: depth_scale is not known"):
        open_split(settings, "train").sample(0)
    given = config.override(SegmentationRecipe(data=settings), ["data.depth_scale=2000"]).data
    np.testing.assert_allclose(
        open_split(given, "train").sample(0).images[0][:, :, 0], stored(1) / 2000, rtol=1e-6
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_was_typed_for_the_training_says_nothing_of_other_files(tmp_path: Path, elsewhere: bool) -> None:
    root = folder(tmp_path / "here")
    recipe = config.override(registry.find("nyudv2_cen_refinenet50"), ["data.depth_scale=2000"])
    contents = {"recipe": "nyudv2_cen_refinenet50", "config": config.to_plain(recipe)}
    other = folder(tmp_path / "there", depth_scale=500)
    overrides = [f"data.root={other}"] if elsewhere else [f"run.output={root}"]
    settings, _ = checkpoint.settings_here(contents, [*overrides, "data.num_classes=40"])
    assert ("depth_scale" in settings.data.given) is not elsewhere
    values, _ = precedence(settings.data, find_layout(other))
    assert values.get("depth_scale") == (None if elsewhere else 2000.0)


def test_gray_in_three_channels_was_color_once(tmp_path: Path) -> None:
    """A network trained so is not fed intensity without a word; told that it is color, it is as before."""
    old = [InputSpec("thermal", "full brightness, or one channel from 0 to the largest", None, "rgb")]
    assert "give it the kind color" in once_color(old, ("thermal",))
    assert once_color(old, ()) == once_color([InputSpec("thermal", "full brightness")], ("thermal",)) == ""
    image = np.repeat(stored(0)[:, :, None] % 256, 3, axis=2).astype(np.uint8)
    for name, picture in (("thermal", image), ("labels", np.zeros(SIZE, np.uint8))):
        write(tmp_path / f"{name}/a.png", picture)
    (tmp_path / "train.txt").write_text("a\n")
    files = {"thermal": "thermal/{name}.png", "labels": "labels/{name}.png"}
    for kind, gray in ((None, ("thermal",)), ("color", ()), ("intensity", ())):
        told = {"files": files, "modalities": {"thermal": {"kind": kind}}}
        (tmp_path / "layout.json").write_text(json.dumps(told))
        dataset = SegmentationSet(tmp_path, "train", modalities=("thermal",), num_classes=2)
        assert dataset.gray_in_color == gray


@pytest.mark.parametrize("kind", ["intensity", "categorical"])
def test_nothing_is_computed_of_what_is_no_depth(tmp_path: Path, kind: str) -> None:
    root = folder(tmp_path, modalities={"depth": {"kind": kind}})
    with pytest.raises(DataError, match=rf"normals needs depth in meters, but depth is of the kind {kind}"):
        SegmentationSet(root, "train", modalities=("depth", "normals")).sample(0)
