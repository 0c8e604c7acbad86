"""Trained networks in a loop of arrays: what predictions hold, for how long; which arrays are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import models
from models.__main__ import main
from models.arrays import Buffers
from models.data import DataError, palette
from models.segmentation.load import TrainedNetwork
from models.training.errors import UsageError
from tests.helpers import translation_runs
from tests.helpers.clips import SIZE, depth_frames, rgb_frames, save_narrow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_narrow(tmp_path_factory.mktemp("network") / "net.pt", "data.missing=fill")


@pytest.fixture(scope="module")
def trained(file: Path) -> TrainedNetwork:
    network: TrainedNetwork = models.load(file, ["run.device=cpu"])
    return network


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    views = translation_runs.prepare_views(tmp_path_factory.mktemp("data") / "views")
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main(translation_runs.command(views, run, "run.steps=1", "data.domains=normal,edge_texture")) == 0
    return models.load(run), views


def scene(index: int = 0, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    arrays = {"rgb": rgb_frames()[index], "depth": depth_frames()[index]}
    return {
        kind: cv2.resize(each, size[::-1], interpolation=cv2.INTER_NEAREST) for kind, each in arrays.items()
    }


# ---- what a prediction holds


def test_a_prediction_is_used_like_the_dict_that_it_was(trained: TrainedNetwork) -> None:
    found = trained.predict(**scene())
    expected = {name: each.numpy() for name, each in trained.label(trained.read(**scene())).items()}
    assert isinstance(found, Mapping)
    assert (len(found), list(found), "depth" in found) == (3, ["rgb", "depth", "ensemble"], True)
    for name, labels in found.items():
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected[name])
    assert found["rgb"] is found["rgb"]
    assert found.ensemble is found["ensemble"]
    assert found.get("sonar") is None
    assert sorted(dict(**found)) == ["depth", "ensemble", "rgb"]
    assert len(np.unique(found.ensemble)) > 2  # or this would tell little
    with pytest.raises(KeyError, match="no output 'ensembel': expected rgb, depth, ensemble; did you mean"):
        found["ensembel"]


def test_labels_are_computed_only_where_they_are_asked_for(
    trained: TrainedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained.predict(**scene())
    asked = []
    labels = type(found._scores).labels
    monkeypatch.setattr(
        type(found._scores), "labels", lambda scores, index: asked.append(index) or labels(scores, index)
    )
    for _ in range(2):
        found.overlay("depth")
    assert asked == [1]


def test_confidences_are_those_of_the_labels(trained: TrainedNetwork) -> None:
    found = trained.predict(**scene())
    for which in found:
        probabilities, confidence = found.probabilities(which), found.confidence(which)
        assert (probabilities.shape, confidence.dtype) == ((11, *SIZE), np.float32)
        np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
        np.testing.assert_array_equal(probabilities.argmax(0), found[which])
        np.testing.assert_allclose(confidence, probabilities.max(0), rtol=1e-5)


def test_pictures_of_a_prediction(trained: TrainedNetwork, tmp_path: Path) -> None:
    found = trained.predict(**scene())
    colored = palette(11)[found["depth"]]
    np.testing.assert_array_equal(found.colored("depth"), colored)
    expected = scene()["rgb"] / 2 + colored / 2
    assert np.abs(found.overlay("depth") - expected).max() <= 1.5
    found.write(tmp_path / "new" / "folder", "scene", "depth")
    for kind, image in (
        ("labels", found["depth"]),
        ("coloured", colored),
        ("overlays", found.overlay("depth")),
    ):
        written = cv2.imread(str(tmp_path / f"new/folder/{kind}/scene.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(written if written.ndim == 2 else written[:, :, ::-1], image)


def test_a_prediction_knows_which_modalities_there_were(trained: TrainedNetwork) -> None:
    assert trained.predict(**scene()).modalities == ("rgb", "depth")
    alone = trained.predict(depth=scene()["depth"])
    assert (alone.modalities, list(alone)) == (("depth",), ["depth", "ensemble"])
    assert alone.overlay().shape == (*SIZE, 3)


def test_a_prediction_of_a_translation(generator: tuple[Any, Path], tmp_path: Path) -> None:
    trained, views = generator
    files = {name: views / name / f"point_3_view_0_domain_{name}.png" for name in ("normal", "edge_texture")}
    found = trained.predict(**files)
    pictures = trained.translate(trained.read(**files))
    assert list(found) == list(pictures) == ["normal", "edge_texture", "ensemble"]
    for name, picture in pictures.items():
        np.testing.assert_array_equal(found[name], trained.target.stored(picture))
    np.testing.assert_array_equal(
        found.shown("normal"), found["normal"]
    )  # RGB, which is shown as it is stored
    found.write(tmp_path, "view", "normal")
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "normal/view.png"))[:, :, ::-1], found["normal"])
    trained.warm_up((40, 48))
    again = trained.predict(**files)
    assert again.modalities == ("normal", "edge_texture")
    np.testing.assert_array_equal(again.ensemble, found.ensemble)


# ---- a loop


def test_results_of_earlier_frames_stay_valid(trained: TrainedNetwork) -> None:
    """Whether they were looked at before the next frame or not, and whatever their sizes."""
    frames = [scene(0), scene(1), scene(2, (32, 40)), scene(3), scene(4), scene(1)]
    kept = [trained.predict(**frame) for frame in frames]
    camera = {
        kind: array.copy() for kind, array in frames[0].items()
    }  # a driver's own memory, written to again
    overwritten = trained.predict(**camera)
    camera["rgb"][:], camera["depth"][:] = 0, 0
    for found, frame in [*zip(kept, frames, strict=True), (overwritten, frames[0])]:
        fresh = TrainedNetwork(
            trained.net, trained.recipe, (), trained.path, trained.inputs, trained.layout, trained.reader, ()
        ).predict(**frame)
        assert torch.equal(found.images, fresh.images)
        for which in found:
            np.testing.assert_array_equal(found[which], fresh[which])
            np.testing.assert_array_equal(found.overlay(which), fresh.overlay(which))


def test_memory_is_used_again_once_results_are_dropped(trained: TrainedNetwork) -> None:
    places = set()
    for index in range(5):
        found = trained.predict(**scene(index))
        places.add(found.images.data_ptr())
    assert len(places) == 2  # a loop's result lives until the next one has its name
    image = found.images[0]
    del found
    assert trained.predict(**scene(1)).images.data_ptr() != image.data_ptr()  # a part of it is still in use


def test_buffers() -> None:
    buffers = Buffers()
    first = buffers.take((2, 3))
    tensor = torch.from_numpy(first).permute(1, 0)[1:]
    place = first.ctypes.data
    del first
    assert buffers.take((2, 3)).ctypes.data != place
    del tensor
    assert buffers.take((2, 3)).ctypes.data == place
    kept = [buffers.take((4, 4)) for _ in range(9)]
    assert len({each.ctypes.data for each in kept}) == 9


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_trained_networks_are_copied(trained: TrainedNetwork, copied: Any) -> None:
    found, expected = (each.predict(**scene())["ensemble"] for each in (copied(trained), trained))
    np.testing.assert_array_equal(found, expected)


def test_warm_up_changes_nothing(file: Path) -> None:
    cold, warm = models.load(file), models.load(file)
    warm.warm_up(SIZE)
    warm.warm_up((32, 40), present=(0,))
    np.testing.assert_array_equal(warm.predict(**scene())["ensemble"], cold.predict(**scene())["ensemble"])


# ---- arrays that are and are not images


def test_arrays_in_any_memory(trained: TrainedNetwork) -> None:
    expected = trained.read(**scene())
    rgb, depth = scene()["rgb"], scene()["depth"]
    still = rgb.copy()
    still.flags.writeable = False
    spaced = np.zeros((2 * SIZE[0], 2 * SIZE[1], 3), np.uint8)
    spaced[::2, ::2] = rgb
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).transpose(1, 2, 0)
    turned = rgb[::-1, ::-1].copy()[::-1, ::-1]
    for each in (still, spaced[::2, ::2], planes, turned):
        assert torch.equal(trained.read(rgb=each, depth=depth), expected)
    for each in (depth.astype(">u2"), depth.astype(np.int64), depth[:, :, None]):
        assert torch.equal(trained.read(rgb=rgb, depth=each), expected)


def test_depth_that_is_no_number_is_missing(trained: TrainedNetwork) -> None:
    rgb, metres = scene()["rgb"], (scene()["depth"] / 5000).astype(np.float32)
    metres[:5] = 0
    expected = trained.read(rgb=rgb, depth=metres)
    assert not expected[1, :, :5].any()
    for missing in (np.nan, np.inf, -np.inf, -1):
        metres[:5] = missing
        assert torch.equal(trained.read(rgb=rgb, depth=metres), expected)


RGB, DEPTH = scene()["rgb"], scene()["depth"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"rgb": RGB / 255}, r"^rgb: .* found floating.*; give .* as \(255 \* array\)\.round\(\)"),
        ({"rgb": RGB.transpose(2, 0, 1)}, r"^rgb: .*; channels come last: give array\.transpose\(1, 2, 0\)$"),
        ({"rgb": np.dstack([RGB, RGB[:, :, 0]])}, r"^rgb: .* 4 channels.*; give array\[:, :, :3\] of"),
        ({"rgb": RGB[None]}, r"^rgb: expected an array \[height, width\] .*; give one scene, array\[0\]$"),
        ({"rgb": RGB[:, :, 0]}, "^rgb: expected a color image .*, found 8 bits and 1 channel$"),
        ({"rgb": RGB.astype(object)}, r"^rgb: expected an array .* of numbers, found object \[48, 64, 3\]$"),
        ({"rgb": RGB[:0]}, r"^rgb: expected an array .* of numbers, found uint8 \[0, 64, 3\]$"),
        ({"depth": DEPTH[0]}, r"^depth: expected an array .* of numbers, found uint16 \[64\]$"),
        ({"depth": RGB}, "^depth: expected depth of 16 bits and 1 channel, found 8 bits and 3 channels"),
        ({"depth": DEPTH > 0}, "^depth: expected depth of 16 bits and 1 channel, found boolean"),
        ({"depth": (DEPTH >> 8).astype(np.uint8)}, "^depth: .* found 8 bits .*too coarse for meters"),
        ({"depth": DEPTH[::2, ::2]}, "^depth is 32x24, but rgb is 64x48"),
        ({"depth": np.ma.masked_equal(DEPTH, 0)}, r"^depth: the mask .* lost; give array\.filled\(0\)"),
    ],
)  # fmt: skip
def test_refused_arrays(trained: TrainedNetwork, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises((DataError, UsageError), match=message):
        trained.predict(**{**scene(), **arrays})
