"""Exported files where this toolkit cannot be imported, run by the programs of docs/deployment.md."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import models
from tests.cli.test_docs import blocks
from tests.helpers.exported import Exported
from tests.helpers.isolated import PAGE, RUNTIMES, answers, is_installed, isolated

SIZE = (40, 48)
SIZES = [(1, *SIZE), (3, *SIZE), (1, 53, 61), (3, 33, 47)]  # N, H, W
INPUTS = {name: np.zeros((1, 3, *SIZE), np.float32) for name in ("rgb", "depth")}
RIGHT = {
    "interface": {
        "modalities": ["rgb", "depth"],
        "form": "separate",
        "multiple": 1,
        "size": None,
        "least": 33,
    }
}


def noise(batch: int, height: int, width: int) -> Tensor:
    """Stacked inputs ``[2*N, 3, H, W]``."""
    return torch.randn(2 * batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_answers(runtime: str, exported: Exported, tmp_path: Path) -> None:
    images = [noise(*size) for size in SIZES]
    inputs = [[x.numpy() for x in image.chunk(2)] for image in images]
    if not is_installed(runtime):
        pytest.skip(f"needs {runtime}")
    file = exported.file(*RUNTIMES[runtime][1])
    found, metadata, errors = answers(runtime, file, tmp_path, inputs)
    assert errors == {}
    trained = models.load(exported.network, ["run.device=cpu"])
    for image, logits in zip(images, found, strict=True):
        assert logits is not None
        with torch.no_grad():
            expected = trained.net(image).ensemble
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)
    assert metadata["interface"]["modalities"] == ["rgb", "depth"]
    assert metadata["interface"]["size"] is None
    assert metadata["operators"] == (["cen_ext::max_pool_same"] if runtime == "compiled" else [])
    assert metadata["classes"] == list(trained.class_names)
    assert [spec["mean"] for spec in metadata["inputs"]] == [list(spec.mean) for spec in trained.inputs]


@pytest.mark.parametrize(
    ("runtime", "messages"),
    [
        ("onnxruntime", ["invalid dimensions for input: rgb", "Invalid rank for input: depth"]),
        (
            "torch",
            [r"rgb\.size\(\)\[1\] == 3", r"depth\.size\(\)", r"depth\.size\(\)\[3\] == rgb\.size\(\)\[3\]"],
        ),
    ],
)
def test_runtimes_name_the_input(
    runtime: str, messages: list[str], exported: Exported, tmp_path: Path
) -> None:
    if not is_installed(runtime):
        pytest.skip(f"needs {runtime}")
    right = INPUTS["rgb"]
    wrong = [(right[:, :1], right), (right, right[0]), (right, right[..., :40])]
    file = exported.file(*RUNTIMES[runtime][1])
    found, _, errors = answers(runtime, file, tmp_path, wrong[: len(messages)])
    assert found == [None] * len(messages)
    for i, message in enumerate(messages):
        assert re.search(message, errors[str(i)]), errors[str(i)]


def test_a_picture_prepared_as_the_page_says(exported: Exported, tmp_path: Path) -> None:
    paths = {kind: str(exported.rooms / kind / "000013.png") for kind in ("rgb", "depth")}
    os.link(exported.file("torch"), tmp_path / "net.pt2")
    np.savez(tmp_path / "inputs.npz")
    (functions,) = blocks(PAGE, "python", "Inputs and outputs")
    load, run = blocks(PAGE, "python", "torch.export")
    height, width = cv2.imread(paths["rgb"]).shape[:2]
    before = f"rgb, depth = read(metadata, **{paths})"
    after = f"np.save('labels', label(logits, {height}, {width}))"
    isolated(tmp_path, "\n".join([functions, load, before, run, after]))
    expected = models.load(exported.network, ["run.device=cpu"]).predict(**paths)["ensemble"]
    assert len(np.unique(expected)) > 1
    assert (np.load(tmp_path / "labels.npy") == expected).mean() > 0.999


def test_the_onnx_file_has_standard_operators_alone(exported: Exported) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported.file("onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0


@pytest.mark.parametrize(
    ("interface", "wrong", "message"),
    [
        ({}, {"color": INPUTS["rgb"]}, "expected the inputs rgb, depth, got rgb, depth, color"),
        ({}, {"depth": np.zeros((1, 3, *SIZE))}, r"depth: expected float32 .*, got float64 \[1, 3, 40, 48\]"),
        (
            {},
            {"depth": INPUTS["depth"][:, :1]},
            r"depth: expected .* \[N, 3, H, W\], got float32 \[1, 1, 40, 48\]",
        ),
        ({}, {"rgb": INPUTS["rgb"][0]}, r"rgb: expected .* got float32 \[3, 40, 48\]"),
        ({}, {"rgb": INPUTS["rgb"][..., :32]}, r"rgb: expected H and W of at least 33, got \[40, 32\]"),
        ({}, {"depth": INPUTS["depth"][..., :40]}, r"depth: expected the shape of rgb, got \[1, 3, 40, 40\]"),
        ({"size": [40, 40]}, {}, r"rgb: expected H and W \[40, 40\], got \[40, 48\]"),
        ({"multiple": 16}, {}, r"rgb: expected H and W divisible by 16, got \[40, 48\]"),
    ],
)
def test_the_check_of_the_page_names_the_input(
    interface: dict[str, Any], wrong: dict[str, np.ndarray], message: str
) -> None:
    values: dict[str, Any] = {}
    (program,) = blocks(PAGE, "python", "Wrong inputs")
    exec(program, values)
    values["check"](RIGHT, INPUTS)
    with pytest.raises(ValueError, match=f"^{message}$"):
        values["check"]({"interface": RIGHT["interface"] | interface}, INPUTS | wrong)


def test_the_check_of_stacked_inputs() -> None:
    values: dict[str, Any] = {}
    (program,) = blocks(PAGE, "python", "Wrong inputs")
    exec(program, values)
    stacked = {"interface": RIGHT["interface"] | {"form": "stacked"}}
    values["check"](stacked, {"images": np.zeros((4, 3, *SIZE), np.float32)})
    with pytest.raises(ValueError, match=r"^images: expected 2 times N images, got 3$"):
        values["check"](stacked, {"images": np.zeros((3, 3, *SIZE), np.float32)})
