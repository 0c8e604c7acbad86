"""Tests in a process of their own: what is in its environment is read once, when ``cen_ext`` is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

import cen_ext
from tests.helpers.paths import ROOT


def run_alone(
    files: Sequence[str], selected: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the tests of files in ``tests/ops``, named without suffix, that an expression selects."""
    # Assertions as they stand: rewriting them, those of Hypothesis as well, takes longer than many tests.
    plain = ["--assert=plain", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", *plain, "-k", selected, *options]
    return subprocess.run(
        [*command, *(f"tests/ops/{file}.py" for file in files)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def other_instruction_sets() -> list[str]:
    """All but the one that this process runs, which its own tests are of."""
    names = ["default", "avx2", "avx512"]
    if cen_ext.available_backends()["cpu"] == "ok":
        from cen_ext import _C

        names.remove(_C.build_info()["instruction_set"])
    return names


def check_instruction_set(file: str, selected: str, instruction_set: str) -> None:
    """Run tests of a file with the kernels of an instruction set; skip where the processor lacks it."""
    result = run_alone([file], selected, CEN_EXT_CPU_CAPABILITY=instruction_set)
    if "this processor runs" in result.stdout + result.stderr:
        pytest.skip(f"this processor does not run {instruction_set}")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
