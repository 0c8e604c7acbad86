"""The C++ example, built by the lines of its README and run on a picture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import models
from cen_ext.ops import dispatch
from tests.helpers.exported import Exported
from tests.helpers.paths import ROOT

EXAMPLE = ROOT / "examples" / "cpp"
MOST_LINES = 120


@pytest.fixture(scope="module")
def label(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    # Where the README's python has torch, and cmake where pip has installed it.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for tool in ("cmake", "c++", "make"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"needs {tool}")
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("cpp") / "cpp")
    lines = re.findall(r"^cmake .*", (folder / "README.md").read_text(), re.M)
    assert len(lines) == 2
    environment = {**os.environ, "PATH": path, "CXXFLAGS": "-Wall -Werror"}
    for line in lines:
        subprocess.run(line, shell=True, check=True, cwd=folder, env=environment)
    return folder / "build" / "label"


@pytest.fixture
def picture(exported: Exported, tmp_path: Path) -> Path:
    """A folder with a picture as the program reads it."""
    for kind, suffix in (("rgb", "ppm"), ("depth", "pgm")):
        image = cv2.imread(str(exported.rooms / kind / "000013.png"), cv2.IMREAD_UNCHANGED)
        assert cv2.imwrite(str(tmp_path / f"{kind}.{suffix}"), image)
    return tmp_path


def run(label: Path, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The program's answer, in a folder and an environment without Python."""
    return subprocess.run(
        [label, *arguments],
        cwd=folder,
        env={"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_it_is_short() -> None:
    assert len((EXAMPLE / "label.cpp").read_text().splitlines()) <= MOST_LINES


def test_the_page_on_deployment_has_the_same_lines() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    lines = re.findall(r"^(?:cmake|build/label) .*", (EXAMPLE / "README.md").read_text(), re.M)
    assert len(lines) == 3
    assert [line for line in lines if f"\n{line}\n" not in page] == []


def test_it_labels_as_the_network_does(label: Path, exported: Exported, picture: Path) -> None:
    network = models.load(exported.network, ["run.device=cpu"])
    images = {kind: exported.rooms / kind / "000013.png" for kind in ("rgb", "depth")}
    expected = network.predict(**images)["ensemble"]
    assert len(np.unique(expected)) > 1
    found = {}
    for scale in ((), ("5000",), ("2500",)):  # as in training, the same, and all twice as far away
        result = run(label, picture, exported.file("aot"), "rgb.ppm", "depth.pgm", "labels.pgm", *scale)
        assert result.returncode == 0, result.stderr
        found[scale] = cv2.imread(str(picture / "labels.pgm"), cv2.IMREAD_UNCHANGED)
        *lines, time = result.stdout.splitlines()
        assert re.fullmatch(r"\d+\.\d ms", time)
        shares = {name: float(share) for share, name in (line.split(" %  ") for line in lines)}
        for name, share in shares.items():
            measured = 100 * (found[scale] == network.class_names.index(name)).mean()
            assert share == pytest.approx(measured, abs=0.06)
        assert sum(shares.values()) == pytest.approx(100, abs=0.06 * len(shares))
    np.testing.assert_array_equal(found[()], found["5000",])
    # Where two logits are as large as each other, rounding decides.
    assert (found[()] == expected).mean() > 0.999
    assert (found["2500",] != expected).any()


def test_it_runs_compiled_operators(label: Path, exported: Exported, picture: Path) -> None:
    """By the README's lines."""
    if not dispatch.IS_COMPILED or shutil.which("unzip") is None:
        pytest.skip("needs the compiled part and unzip")
    os.link(exported.file("aot", "--operators", "compiled"), picture / "compiled.pt2")
    readme = (EXAMPLE / "README.md").read_text()
    (block,) = (block for block in re.findall(r"^```\n(.*?)^```$", readme, re.M | re.S) if "unzip" in block)
    assert block in (ROOT / "docs" / "deployment.md").read_text()
    # All symbols are looked up as the library is loaded, those of Python, which is not there, among them.
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LD_BIND_NOW": "1"}
    lines = block.replace("build/label", str(label))
    result = subprocess.run(
        lines, shell=True, cwd=picture, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = cv2.imread(str(picture / "labels.pgm"), cv2.IMREAD_UNCHANGED)
    result = run(label, picture, exported.file("aot"), "rgb.ppm", "depth.pgm", "labels.pgm", "5000")
    assert result.returncode == 0, result.stderr
    expected = cv2.imread(str(picture / "labels.pgm"), cv2.IMREAD_UNCHANGED)
    assert (found == expected).mean() > 0.999
    result = run(label, picture, "compiled.pt2", "rgb.ppm", "depth.pgm", "labels.pgm")
    assert "Could not find schema for cen_ext::max_pool_same" in result.stderr


def test_it_says_what_is_wrong(label: Path, exported: Exported, picture: Path) -> None:
    package, program = exported.file("aot"), exported.file("torch")
    fixed = exported.file("aot", "--size", "40x48")
    cv2.imwrite(str(picture / "wide.ppm"), np.zeros((40, 50, 3), np.uint8))
    (picture / "cut.pgm").write_bytes((picture / "depth.pgm").read_bytes()[:-1])
    (picture / "broken.pgm").write_text("P5\n48 forty\n")
    right = [package, "rgb.ppm", "depth.pgm", "labels.pgm"]
    cases = {
        r"usage: label NET\.pt2 .*": right[:3],
        r"missing\.pt2: .+": ["missing.pt2", *right[1:]],
        rf"{program}: .+": [program, *right[1:]],
        r"missing\.ppm: cannot be read": [package, "missing.ppm", *right[2:]],
        r"wide\.ppm: must be of 48x40 pixels, as the network was exported": [fixed, "wide.ppm", *right[2:]],
        r"depth\.pgm: is of another size than wide\.ppm": [package, "wide.ppm", *right[2:]],
        r"depth\.pgm: expected an image of kind P6": [package, "depth.pgm", *right[2:]],
        r"cut\.pgm: ends before its last pixel": [*right[:2], "cut.pgm", right[3]],
        r"broken\.pgm: unknown header": [*right[:2], "broken.pgm", right[3]],
        r"none/labels\.pgm: cannot be written": [*right[:3], "none/labels.pgm"],
        r"UNITS-PER-METER: expected a number above 0, got m": [*right, "m"],
    }
    for message, arguments in cases.items():
        result = run(label, picture, *arguments)
        assert result.returncode == 1, message
        assert re.fullmatch(f"error: {message}\n", result.stderr), (message, result.stderr)
    assert not (picture / "labels.pgm").exists()
