"""Exported files where this toolkit cannot be imported, run by the programs of docs/deployment.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cen_ext.ops import dispatch
from tests.cli.test_docs import blocks

PAGE = "deployment.md"
# The section of the page, the export's format and options, and the page's name of the file.
RUNTIMES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "onnxruntime": ("ONNX Runtime", ("onnx",), "net.onnx"),
    "openvino": ("OpenVINO", ("onnx",), "net.onnx"),
    "torch": ("torch.export", ("torch",), "net.pt2"),
    "aot": ("AOTInductor", ("aot",), "aot.pt2"),
    "compiled": ("Compiled operators", ("aot", "--operators", "compiled"), "compiled.pt2"),
}
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
    runtime: str, file: Path, folder: Path, inputs: Sequence[Sequence[NDArray[np.float32]]]
) -> tuple[list[NDArray[np.float32] | None], dict[str, Any], dict[str, str]]:
    """Run an exported network of rgb and depth by the page's program for a runtime.

    Args:
        runtime: of ``RUNTIMES``.
        file: the export.
        folder: an empty one, where the program runs.
        inputs: ``[N, 3, H, W]`` each.

    Returns:
        The logits of each pair, None where the program fails; the file's metadata as the program finds it;
        and the messages of failures, by the pair's number.
    """
    section, _, name = RUNTIMES[runtime]
    os.link(file, folder / name)
    arrays = {f"rgb{i}": rgb for i, (rgb, _) in enumerate(inputs)}
    arrays |= {f"depth{i}": depth for i, (_, depth) in enumerate(inputs)}
    np.savez(folder / "inputs.npz", allow_pickle=False, **arrays)
    load, run = blocks(PAGE, "python", section)
    isolated(folder, f"{load}\nRUN = {run!r}\n{ANSWERS}")
    metadata, errors = json.loads((folder / "found.json").read_text())
    found = np.load(folder / "answers.npz")
    return [found.get(str(i)) for i in range(len(inputs))], metadata, errors


def is_installed(runtime: str) -> bool:
    if runtime == "compiled":
        return dispatch.IS_COMPILED
    return runtime in ("torch", "aot") or importlib.util.find_spec(runtime) is not None
