"""Exported files in processes where this toolkit cannot be imported, run by the programs of docs/deployment.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from tests.cli.test_docs import blocks
from tests.helpers.exported import Exported

PAGE = "deployment.md"
# The section of the page, the export's format, and the page's name of the file.
RUNTIMES = {
    "onnxruntime": ("ONNX Runtime", "onnx", "net.onnx"),
    "openvino": ("OpenVINO", "onnx", "net.onnx"),
    "torch": ("torch.export", "torch", "net.pt2"),
    "aot": ("AOTInductor", "aot", "aot.pt2"),
}
SIZE = (40, 48)
SIZES = [(1, *SIZE), (3, *SIZE), (1, 53, 61), (3, 33, 47)]  # N, H, W

# Before the page's programs: without this toolkit, and with the arrays that a file brings.
ISOLATED = """
import sys
for name in ("cen_ext", "models", "examples", "tests"):
    sys.modules[name] = None
try:
    import models
except ModuleNotFoundError:
    print("there is no models")
import numpy as np
arrays = dict(np.load("inputs.npz"))
"""
# After them: each input's answer or error.
ANSWERS = """
answers, errors = {}, {}
for i in range(sum(name.startswith("rgb") for name in arrays)):
    rgb, depth = arrays[f"rgb{i}"], arrays[f"depth{i}"]
    try:
        exec(RUN)
        answers[str(i)] = logits
    except Exception as error:
        errors[i] = str(error)
np.savez("answers.npz", **answers)
with open("found.json", "w") as file:
    json.dump([metadata, errors], file)
"""


def isolated(folder: Path, program: str) -> str:
    """What a program prints, run in a folder by a Python that has nothing of this checkout on its path."""
    (folder / "program.py").write_text(ISOLATED + program)
    python = [sys.executable, "-I", "program.py"]  # neither PYTHONPATH nor the folder
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(python, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "there is no models" in result.stdout
    return result.stdout


def answers(
    runtime: str, exported: Exported, folder: Path, inputs: Sequence[Sequence[np.ndarray]]
) -> tuple[list[np.ndarray | None], dict[str, Any], dict[str, str]]:
    """The logits of rgb and depth arrays by the page's program, None where it fails; the file's metadata; and
    the messages of failures, by the input's number.
    """
    if runtime in ("onnxruntime", "openvino") and importlib.util.find_spec(runtime) is None:
        pytest.skip(f"needs {runtime}")
    section, format, name = RUNTIMES[runtime]
    os.link(exported.file(format), folder / name)
    arrays = {f"{kind}{i}": x for i, pair in enumerate(inputs) for kind, x in zip(("rgb", "depth"), pair)}  # noqa: B905
    np.savez(folder / "inputs.npz", **arrays)
    load, run = blocks(PAGE, "python", section)
    isolated(folder, f"{load}\nRUN = {run!r}\n{ANSWERS}")
    metadata, errors = json.loads((folder / "found.json").read_text())
    found = np.load(folder / "answers.npz")
    return [found[str(i)] if str(i) in found else None for i in range(len(inputs))], metadata, errors


def noise(batch: int, height: int, width: int) -> Tensor:
    """Stacked inputs ``[2*N, 3, H, W]``."""
    return torch.randn(2 * batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_answers(runtime: str, exported: Exported, tmp_path: Path) -> None:
    images = [noise(*size) for size in (SIZES[:2] if runtime == "aot" else SIZES)]
    inputs = [[x.numpy() for x in image.chunk(2)] for image in images]
    found, metadata, errors = answers(runtime, exported, tmp_path, inputs)
    assert errors == {}
    trained = models.load(exported.network, ["run.device=cpu"])
    for image, logits in zip(images, found, strict=True):
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
    calls = f"rgb, depth = read(metadata, **{paths})\n", f"np.save('labels', label(logits, {height}, {width}))"
    isolated(tmp_path, "\n".join([functions, load, calls[0], run, calls[1]]))
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
