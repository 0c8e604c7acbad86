"""The built extension, and the package without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cen_ext
from tests.helpers.paths import ROOT


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_build_info():
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip(cen_ext.available_backends()["cpu"])
    from cen_ext import _C

    info = _C.build_info()
    assert info.keys() == {"compiler", "torch", "cuda_architectures", "instruction_sets", "instruction_set"}
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert [int(part) for part in info["torch"].split(".")[:2]] >= [2, 10]
    assert isinstance(info["cuda_architectures"], list)
    assert info["instruction_sets"][0] == "default"
    assert info["instruction_set"] in info["instruction_sets"]
    assert torch.ops.cen_ext.norm_exchange.default._schema.name == "cen_ext::norm_exchange"


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What setup.py prepares in a folder where there is nothing to build."""
    command = [sys.executable, ROOT / "setup.py", "--version"]
    environment = {**os.environ, "FORCE_CUDA": "0", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_build_for_this_processor_alone(tmp_path: Path):
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip(cen_ext.available_backends()["cpu"])
    if os.environ.get("CEN_EXT_CPU_CAPABILITY"):
        pytest.skip("CEN_EXT_CPU_CAPABILITY chooses another instruction set than the best one")
    from cen_ext import _C

    info = _C.build_info()
    header = tmp_path / "build" / "include" / "cen_build.h"
    for asked, expected in (("native", [info["instruction_set"]]), ("", info["instruction_sets"])):
        result = setup(tmp_path, CEN_EXT_INSTRUCTION_SETS=asked)
        assert result.returncode == 0, result.stderr
        assert re.findall(r"CEN_BUILT_(\w+)", header.read_text()) == [name.upper() for name in expected]
    result = setup(tmp_path, CEN_EXT_INSTRUCTION_SETS="avx2")
    assert "CEN_EXT_INSTRUCTION_SETS: expected 'native' or nothing, got 'avx2'" in result.stderr


@pytest.fixture
def extension() -> Path:
    """The file of the compiled part, and nm and readelf to look into it."""
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip(cen_ext.available_backends()["cpu"])
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("needs nm and readelf")
    from cen_ext import _C

    return Path(_C.__file__)


def test_it_names_only_stable_interfaces(extension: Path):
    """Of torch the C functions, of Python the limited API, which programs without Python need not have."""
    command = ["nm", "-D", "--undefined-only", extension]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # The system's symbols have versions, but for three that every library may name.
    symbols = {name: kind for kind, name in map(str.split, lines) if "@" not in name}
    of_torch = {name for name in symbols if re.match("(aoti_)?torch_", name)}
    of_python = {name for name in symbols if name.startswith("Py")}
    assert len(of_torch) > 20
    assert "PyModuleDef_Init" in of_python
    assert {symbols[name] for name in of_python} == {"w"}
    assert symbols.keys() - of_torch - of_python <= {
        *("__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable")
    }


def test_it_links_neither_python_nor_cuda(extension: Path):
    """So that it loads beside any Python, and beside torch for CPUs as well as for GPUs."""
    text = subprocess.run(["readelf", "-d", extension], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(\w+)", text))
    system = {"libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc", "ld"}
    assert {"libtorch", "libtorch_cpu", "libc10"} | system >= needed


def test_unknown_instruction_set_is_refused():
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip(cen_ext.available_backends()["cpu"])
    result = python(
        "import cen_ext; print(cen_ext.available_backends()['cpu'])", CEN_EXT_CPU_CAPABILITY="mmx"
    )
    refused = "cannot be loaded (CEN_EXT_CPU_CAPABILITY is 'mmx'; of this build, this processor runs"
    assert refused in result.stdout
    assert "missing" not in result.stdout + result.stderr


def test_runs_without_the_compiled_part_and_says_so_once():
    result = python(
        """
import sys
sys.modules["cen_ext._C"] = None  # what a missing module does to an import
from tests.helpers.paths import ROOT
import torch, cen_ext, cen_ext.functional, cen_ext.modules
print(cen_ext.available_backends())
x, weight, bias = torch.randn(4, 3), torch.ones(2, 3), torch.zeros(2, 3)
print(cen_ext.norm_exchange(x, weight, bias, training=True).shape)
try:
    cen_ext.norm_exchange(x, weight, bias, training=True, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    )
    assert result.returncode == 0, result.stderr
    assert "'reference': 'ok'" in result.stdout
    assert "torch.Size([4, 3])" in result.stdout
    assert "backend 'cpu' cannot run this call: the compiled part is missing" in result.stdout
    assert result.stderr.count("python setup.py build_ext --inplace") == 1
