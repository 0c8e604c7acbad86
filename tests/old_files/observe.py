"""A version's results from a run or from a network's file, through public entry points alone.

``write.py`` records it with the version that wrote the files; the tests ask today's for the same.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import cen_ext
import models
from models.__main__ import main

HERE = Path(__file__).resolve().parent
STEPS = 3  # of the run in the file
END = 6  # the step that it is resumed to
_HERE = ["run.device=cpu", "run.workers=0"]


def machine() -> dict[str, str]:
    """The machine that the bits of a float32 network depend on: kernels and the processor they suit."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    lines = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    processor = {name.strip(): value.strip() for name, value in lines.items()}
    return {
        **{name: processor.get(name, "") for name in ("vendor_id", "cpu family", "model")},
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "kernels": cen_ext.available_backends()["cpu"],
        "torch": torch.__version__,
        "opencv": cv2.__version__,
    }


def used(file: Path, scenes: Path, scratch: Path) -> dict[str, Any]:
    """A run's or an exported network's metrics and outputs.

    Args:
        file: run folder, checkpoint or network's file.
        scenes: the data set of its training.
        scratch: a folder to write to.

    Returns:
        By name, numbers and arrays.
    """
    found: dict[str, Any] = {}
    command = ["evaluate", str(file), f"data.root={scenes}", "--output", str(scratch), "eval.sheet=0", *_HERE]
    assert main(command) == 0
    (report,) = scratch.glob("evaluation_*.json")
    contents = json.loads(report.read_text())
    for part in ("metrics", "alpha"):
        found |= {f"{part}/{name}": np.float64(value) for name, value in contents[part].items()}
    trained = models.load(file, _HERE)
    inputs = scene(scenes, [each.name for each in trained.inputs])
    with torch.no_grad():
        outputs = trained.net(trained.read(**inputs))
    for name in ("branches", "ensemble"):
        found[name] = getattr(outputs, name)[..., ::2, ::2].numpy()
    given = [f"--input={name}={path}" for name, path in inputs.items()]
    output = scratch / "predicted"
    assert main(["predict", str(file), "--output", str(output), "--which", "ensemble", *given, *_HERE]) == 0
    # Label maps, or pictures of the target's domain.
    (written,) = (path for name in ("labels", "ensemble") for path in (output / name).glob("*.png"))
    found["predicted"] = cv2.imread(str(written), cv2.IMREAD_UNCHANGED)
    return found


def resumed(folder: Path, scenes: Path) -> dict[str, Any]:
    """A run's losses and metrics when it is resumed in its folder, and the logits that it comes to."""
    recipe = json.loads((folder / "config.json").read_text())["recipe"]
    assert main(["train", recipe, "--resume", str(folder), f"data.root={scenes}", f"run.steps={END}"]) == 0
    found: dict[str, Any] = {}
    for table in ("losses", "metrics"):
        with (folder / f"{table}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                step = row.pop("step")
                found |= {f"{table}/{step}/{name}": np.float64(value) for name, value in row.items() if value}
    trained = models.load(folder / "last.pt", _HERE)
    with torch.no_grad():
        outputs = trained.net(trained.read(**scene(scenes, [each.name for each in trained.inputs])))
    found["resumed_ensemble"] = outputs.ensemble[..., ::2, ::2].numpy()
    return found


def scene(scenes: Path, names: list[str]) -> dict[str, Path]:
    """The files of a data set's last scene."""
    return {name: sorted((scenes / name).iterdir())[-1] for name in names}
