"""A network's answers: what the settings of a request change, and that nothing of them stays."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import models
from cen_ext.modules import ExchangeNorm
from models.__main__ import main
from models.data import DataError
from models.data.images import Frame, frame_of, read_label_values, read_stored
from models.data.stored import declared_size
from tests.helpers import translation_runs
from tests.serve.conftest import spread_scales

pytest.importorskip("starlette", reason="the extra serve is not installed")

from models.serve.refusals import Refused
from models.serve.reliance import relied_on
from models.serve.scenes import Question, Scenes
from models.training.errors import UsageError

Files = dict[str, Path]


def asked(files: Files, **settings: Any) -> Question:
    return Question({kind: (path.name, path.read_bytes()) for kind, path in files.items()}, **settings)


def decoded(uri: str) -> np.ndarray:
    """The values of an image: of one with a palette its indices."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def maps(answer: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: decoded(uri) for name, uri in answer["images"]["labels"].items()}


def by_hand(
    run: Path, files: Files, theta: float | None = None, present: Any = None
) -> dict[str, np.ndarray]:
    """The labels of a network of its own, whose thresholds are set."""
    trained = models.load(run, ["run.device=cpu"])
    spread_scales(trained)
    for layer in trained.net.modules():
        if theta is not None and isinstance(layer, ExchangeNorm) and layer.exchanges:
            layer.threshold = theta
    labels = trained.label(trained.read(**files), present)
    return {name: each.numpy() for name, each in labels.items()}


def assert_same_maps(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, labels in expected.items():
        np.testing.assert_array_equal(found[name], labels)


def test_uploads_are_labeled_as_files_are(scenes: Scenes, run: Path, files: Files) -> None:
    answer = scenes.answer(asked(files))
    expected = by_hand(run, files)
    assert_same_maps(maps(answer), expected)
    assert len(np.unique(expected["ensemble"])) > 1
    assert answer["size"] == {"width": 48, "height": 40}
    for label, each in enumerate(answer["classes"]):
        assert each["name"] == scenes.trained.class_names[label]
        for name, labels in expected.items():
            assert each["shares"][name] == pytest.approx((labels == label).mean())
    shown = Image.open(
        io.BytesIO(base64.b64decode(answer["images"]["labels"]["ensemble"].partition(",")[2]))
    ).convert("RGB")
    colors = [bytes.fromhex(each["color"][1:]) for each in answer["classes"]]
    np.testing.assert_array_equal(
        np.asarray(shown), np.array([list(color) for color in colors])[expected["ensemble"]]
    )


def test_without_images_the_rest_is_the_same(scenes: Scenes, files: Files) -> None:
    whole, short = scenes.answer(asked(files)), scenes.answer(asked(files, images=False))
    for answer in (whole, short):
        answer.pop("seconds")
    assert whole.pop("images")
    assert short == whole


@pytest.mark.parametrize("theta", [0.0, 0.05, 0.2])
def test_theta_is_that_of_one_request(scenes: Scenes, run: Path, files: Files, theta: float) -> None:
    before = scenes.answer(asked(files))
    moved = scenes.answer(asked(files, theta=theta))
    assert_same_maps(maps(moved), by_hand(run, files, theta))
    assert moved["theta"] == theta
    assert any((maps(moved)[name] != maps(before)[name]).any() for name in maps(before))
    for layer in moved["exchanged"]:
        module = scenes.trained.net.get_submodule(layer["name"])
        scales, half = module.weight.detach().abs(), module.weight.shape[1] // 2
        below = (scales < theta).float()  # region=own: the first half is the first modality's to give up
        expected = [below[0, :half].sum() / (2 * half), below[1, half:].sum() / (2 * half)]
        assert list(layer["shares"].values()) == pytest.approx([float(each) for each in expected])
    after = scenes.answer(asked(files))
    assert after["images"] == before["images"]
    assert after["exchanged"] == before["exchanged"]
    assert {layer.threshold for layer in scenes.layers.layers.values()} == {0.02}


def test_thresholds_that_differ_are_scaled_alike(scenes: Scenes, files: Files) -> None:
    layers = list(scenes.layers.layers.values())
    for number, layer in enumerate(layers):
        layer.threshold = 0.01 * (1 + number % 3)
    before = [layer.threshold for layer in layers]
    scenes.layers = type(scenes.layers)(scenes.trained.net)
    trained = scenes.layers.trained
    assert trained == pytest.approx(np.mean(before))
    with scenes.layers.at(2 * trained):
        assert [layer.threshold for layer in layers] == pytest.approx([2 * each for each in before])
    assert [layer.threshold for layer in layers] == before


def test_the_network_is_restored_after_a_failure(
    scenes: Scenes, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    before = scenes.answer(asked(files))["images"]
    with monkeypatch.context() as patch:
        patch.setattr(scenes.trained.net.decoder, "forward", fail)
        with pytest.raises(RuntimeError):
            scenes.answer(asked(files, theta=0.05, unplugged=("depth",)))
    assert scenes.answer(asked(files))["images"] == before


@pytest.mark.parametrize(("unplugged", "left"), [("depth", 0), ("rgb", 1)])
def test_unplugged_and_not_given_are_the_same(
    scenes: Scenes, run: Path, files: Files, unplugged: str, left: int
) -> None:
    name = ("rgb", "depth")[left]
    out = scenes.answer(asked(files, unplugged=(unplugged,)))
    missing = scenes.answer(asked({name: files[name]}))
    for answer in (out, missing):
        assert_same_maps(maps(answer), by_hand(run, files, present=[left]))
        assert answer["present"] == [name]
        assert answer["alpha"] == {name: 1.0}
        assert list(answer["images"]["inputs"]) == [name]
        assert answer["relied_on"] == {"why_not": "one modality is left", "shares": None}
        assert all(layer["shares"] == {name: 0.0} for layer in answer["exchanged"])
    assert scenes.answer(asked(files))["present"] == ["rgb", "depth"]


def test_the_branch_relied_on_is_by_definition() -> None:
    logits = torch.randn(3, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 0.2, 0.3])
    labels = (weights[:, None, None, None] * logits).sum(0).argmax(0)
    found = relied_on(logits, weights, labels)
    for row in range(8):
        for column in range(12):
            pixel = logits[:, :, row, column]
            terms = [float(weights[b] * (pixel[b, labels[row, column]] - pixel[b].mean())) for b in range(3)]
            assert found[row, column] == np.argmax(terms)
    assert found.unique().tolist() == [0, 1, 2]


def test_what_each_pixel_relied_on_and_how_sure_it_is(scenes: Scenes, files: Files) -> None:
    answer = scenes.answer(asked(files))
    images, _ = scenes.trained.read_some(files)
    scores = dict(
        zip(("rgb", "depth", "ensemble"), (each[0] for each in scenes.trained.scores(images)), strict=True)
    )
    weights = torch.tensor([0.5, 0.0]).softmax(0)
    branches = torch.stack([scores["rgb"], scores["depth"]])
    torch.testing.assert_close((weights[:, None, None, None] * branches).sum(0), scores["ensemble"])
    expected = relied_on(branches, weights, scores["ensemble"].argmax(0)).numpy()
    np.testing.assert_array_equal(decoded(answer["images"]["relied_on"]), expected)
    assert answer["relied_on"]["shares"]["depth"] == pytest.approx(expected.mean())
    assert answer["alpha"] == pytest.approx({"rgb": float(weights[0]), "depth": float(weights[1])})
    sure = scores["ensemble"].softmax(0).amax(0).numpy()
    np.testing.assert_allclose(decoded(answer["images"]["confidence"]) / 255, sure, atol=0.51 / 255)


def test_a_head_tells_no_parts_and_needs_all(head_run: Path, files: Files) -> None:
    scenes = Scenes.open(head_run, ["run.device=cpu"], 10**6)
    described = scenes.describe()
    assert described["alpha"] is None
    assert "a learned head" in described["relied_on"]["why_not"]
    answer = scenes.answer(asked(files))
    assert answer["relied_on"] == {"why_not": described["relied_on"]["why_not"], "shares": None}
    assert answer["images"]["relied_on"] is None
    for question in (asked(files, unplugged=("rgb",)), asked({"rgb": files["rgb"]})):
        with pytest.raises(Refused) as error:
            scenes.answer(question)
        assert error.value.status == 422
    assert "fusion=late_concat joins all modalities" in described["why_all"]


def test_a_network_without_thresholds_has_no_theta(rooms: Path, tmp_path: Path, files: Files) -> None:
    from tests.helpers.training_runs import command

    assert main(command(rooms, tmp_path / "run", "run.steps=1", "fusion=none")) == 0
    scenes = Scenes.open(tmp_path / "run", ["run.device=cpu"], 10**6)
    assert scenes.describe()["theta"] == {
        "trained": None,
        "largest": None,
        "why_fixed": "no layer of this network exchanges channels by a threshold",
    }
    assert scenes.answer(asked(files))["exchanged"] == []
    with pytest.raises(Refused, match="theta cannot be given: no layer"):
        scenes.answer(asked(files, theta=0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"theta": -1.0}, "theta must be finite and not negative, got -1.0"),
        ({"theta": float("nan")}, "theta must be finite"),
        ({"unplugged": ("rgb", "depth")}, "no modality is left"),
        ({"unplugged": ("dept",)}, "expected some of rgb, depth, got 'dept'; did you mean 'depth'"),
        ({"example": 0}, "expected files or an example, got both"),
    ],
)
def test_settings_that_are_refused(
    scenes: Scenes, files: Files, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message.replace("(", r"\(")) as error:
        scenes.answer(asked(files, **settings))
    assert error.value.status == 422


def test_examples_are_the_first_scenes_of_validation(scenes: Scenes, rooms: Path, run: Path) -> None:
    names = [each["name"] for each in scenes.thumbnails()]
    assert names == ["000013", "000014", "000015"]
    assert all(list(each["images"]) == ["rgb", "depth"] for each in scenes.thumbnails())
    answer = scenes.answer(Question(example=1))
    paths = {kind: rooms / kind / "000014.png" for kind in ("rgb", "depth")}
    assert_same_maps(maps(answer), by_hand(run, paths))
    with pytest.raises(Refused, match="example must be below 3, got 3"):
        scenes.answer(Question(example=3))


def test_an_exported_network_has_no_examples(run: Path, files: Files, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    assert main(["export", str(run), "--output", str(file)]) == 0
    scenes = Scenes.open(file, ["run.device=cpu"], 10**6)
    assert scenes.examples == []
    assert scenes.answer(asked(files))["outputs"] == ["rgb", "depth", "ensemble"]


def test_translation_is_refused(tmp_path: Path) -> None:
    views = translation_runs.prepare_views(tmp_path / "views")
    assert main(translation_runs.command(views, tmp_path / "run", "run.steps=1")) == 0
    with pytest.raises(UsageError, match="translates images; serve shows segmentations"):
        Scenes.open(tmp_path / "run", [], 10**6)


# ---- bytes as files


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("kind", ["16 bits", "palette", "4 bits", "array"])
def test_bytes_are_decoded_as_files_are(tmp_path: Path, kind: str, values: bool) -> None:
    numbers = np.arange(48, dtype=np.uint16).reshape(6, 8)
    path = tmp_path / ("image.npy" if kind == "array" else "image.png")
    if kind == "16 bits":
        assert cv2.imwrite(str(path), 1000 * numbers)
    elif kind == "array":
        np.save(path, numbers)
    else:
        image = Image.fromarray((numbers % 16).astype(np.uint8))
        if kind == "palette":
            image.putpalette(list(range(255, 207, -1)))
        image.save(path, bits=4)
    frame = frame_of("upload", path.read_bytes(), values=values)
    expected = read_label_values(path).values if values and kind != "16 bits" else read_stored(path)
    assert isinstance(frame, Frame)
    assert frame.pixels.dtype == expected.dtype
    np.testing.assert_array_equal(frame.pixels, expected)
    assert declared_size("upload", path.read_bytes()) == (6, 8)


def test_broken_heads_name_the_upload() -> None:
    for data in (b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xffx"):
        with pytest.raises(DataError, match=r"^upload: "):
            declared_size("upload", data)
