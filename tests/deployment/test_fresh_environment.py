"""Exported files where this toolkit cannot be imported, run by the programs of docs/deployment.md."""

from __future__ import annotations

import os
from pathlib import Path

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


def noise(batch: int, height: int, width: int) -> Tensor:
    """Stacked inputs ``[2*N, 3, H, W]``."""
    return torch.randn(2 * batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_answers(runtime: str, exported: Exported, tmp_path: Path) -> None:
    images = [noise(*size) for size in (SIZES[:2] if runtime == "aot" else SIZES)]
    inputs = [[x.numpy() for x in image.chunk(2)] for image in images]
    if not is_installed(runtime):
        pytest.skip(f"needs {runtime}")
    file = exported.file(RUNTIMES[runtime][1])
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
    assert metadata["interface"]["size"] == (list(SIZE) if runtime == "aot" else None)
    assert metadata["classes"] == list(trained.class_names)
    assert [spec["mean"] for spec in metadata["inputs"]] == [list(spec.mean) for spec in trained.inputs]


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
