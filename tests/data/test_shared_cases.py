"""The small inputs of shared/cases, each with its command: the right value comes out, or words that help."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from models.__main__ import main

ONNX = "40"  # of another issue


def of_case(shared: Path, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the case as the working directory; its command."""
    source = shared / "cases" / number
    if not source.is_dir():
        pytest.skip(f"needs the case {number} beside the checkout")
    shutil.copytree(source, tmp_path / number)
    monkeypatch.chdir(tmp_path / number)
    return (source / "cmd").read_text()


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output of a case's command, run in this process; commands that it starts as well."""
    python, *words = shlex.split(command)
    assert python == "python"
    printed = io.StringIO()

    elsewhere = subprocess.run

    def start(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if arguments[:3] != [sys.executable, "-m", "models"]:  # as runs ask git for the version
            return elsewhere(arguments, **options)
        return subprocess.CompletedProcess(arguments, main(arguments[3:]))

    monkeypatch.setattr(subprocess, "run", start)
    with contextlib.redirect_stdout(printed):
        if words[:2] == ["-m", "models"]:
            assert main(words[2:]) == 0
        else:
            assert words[0] == "-c"
            exec(words[1], {"__name__": "__main__"})
    return printed.getvalue()


def test_every_case_is_run_here(shared: Path) -> None:
    """A case that is added to the folder needs its right value below."""
    there = {path.name for path in (shared / "cases").iterdir() if (path / "cmd").is_file()}
    assert there - {ONNX} <= {"03", "07", "12", "13", "23", "24", "51"}


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        ("07", r"\[ *0 +1 +255\]"),
        ("12", r"3\.0"),
        ("13", r"3\.0"),
        ("23", r"2"),
        ("24", r"2"),
    ],
)
def test_the_right_value_is_printed(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, expected: str
) -> None:
    """-1 in arrays is void; signed TIFF and arrays hold depth; marks and ``._`` files do not count."""
    command = of_case(shared, number, tmp_path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert re.fullmatch(expected, run(command, monkeypatch).strip())


def test_masks_of_0_and_255_are_warned_of_before_the_training(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class 1 has no pixel, and 255 is void: said of both splits before the first step."""
    command = of_case(shared, "03", tmp_path, monkeypatch)
    printed = run(command, monkeypatch)
    told = printed + capsys.readouterr().err
    for split, maps in (("train", 2), ("val", 1)):
        words = rf"warning: {split}: no pixel in the {maps} label maps looked at is of class 1; 255 is void"
        assert re.search(words, told)
    log = Path("run/log.txt").read_text()
    assert log.index("no pixel in the 2 label maps") < log.index("step 1")
    assert "255 as stored" in printed


def test_a_network_of_a_gpus_training_loads_where_there_is_none(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device of the training is no property of the network."""
    command = of_case(shared, "51", tmp_path, monkeypatch)
    assert run(command, monkeypatch).strip().splitlines()[-1] == "gpu.pt"
