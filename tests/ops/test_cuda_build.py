"""The compiled CUDA kernels: registers, spills, the width of their accesses. No GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import cen_ext
from tests.helpers.paths import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("kernels_*.cu"))
ARCHITECTURES = ("80", "90")
HOT = ("statistics_kernel", "two_pass_forward", "resident_forward", "two_pass_backward", "resident_backward")
HALF = ("kernels_half", "kernels_bfloat16")
FINISHING = ("finish_statistics", "finish_sums")
# Blocks of how many threads are to fit on a multiprocessor of 65,536 registers, how many of them.
RESIDENT, TWO_PASS, TWO_PASS_WIDE, FINISH = (512, 1), (256, 3), (256, 2), (512, 1)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")


class Kernel(NamedTuple):
    source: str  # kernels_<type>
    architecture: str
    name: str
    channels_last: bool
    registers: int
    spilled: int  # bytes


def compiled(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    """Compiles as setup.py does; what ptxas says of each kernel. The machine code stays in the folder."""
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    command = ["nvcc", "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}"]
    result = subprocess.run(
        [*command, "-Xptxas", "-v", "-cubin", "-o", cubin, source], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return [
        Kernel(source.stem, architecture, name, layout == "1", int(registers), int(stored) + int(loaded))
        for name, layout, stored, loaded, registers in re.findall(
            r"entry function '_ZN3cen4cuda\d+([a-z_]+)I\w*?(?:Lb([01])E)?EEv.*?"
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            result.stdout + result.stderr,
            re.DOTALL,
        )
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def kernels(folder: Path) -> list[Kernel]:
    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return [kernel for made in pool.map(lambda job: compiled(*job, folder), jobs) for kernel in made]


def test_every_kernel_is_there(kernels: list[Kernel]):
    layouts = [(name, last) for name in (*HOT, "finish_statistics") for last in (False, True)]
    assert len(SOURCES) == 4
    for source in SOURCES:
        for architecture in ARCHITECTURES:
            made = [k for k in kernels if (k.source, k.architecture) == (source.stem, architecture)]
            assert sorted((k.name, k.channels_last) for k in made) == sorted(
                [*layouts, ("finish_sums", False)]
            )


def test_no_registers_are_spilled(kernels: list[Kernel]):
    assert [kernel for kernel in kernels if kernel.spilled > 0] == []


def test_registers_leave_room_for_the_blocks_that_plans_count_on(kernels: list[Kernel]):
    for kernel in kernels:
        if kernel.name in FINISHING:
            threads, blocks = FINISH
        elif kernel.name.startswith("resident"):
            threads, blocks = RESIDENT
        else:
            wide = kernel.name == "two_pass_backward" or (kernel.channels_last and kernel.source in HALF)
            threads, blocks = TWO_PASS_WIDE if wide else TWO_PASS
        assert kernel.registers * threads * blocks <= 65536, kernel


def disassembler() -> str | None:
    """nvdisasm, of the CUDA toolkit or of Triton."""
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(shipped) if shipped.exists() else None
    return found


@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_memory_is_accessed_16_bytes_at_a_time(kernels: list[Kernel], folder: Path, source: str):
    """In machine code: loads or copies into shared memory, and stores, of 128 bits in every hot kernel."""
    tool = disassembler()
    if tool is None:
        pytest.skip("there is no nvdisasm")
    text = subprocess.run(
        [tool, "-c", folder / f"{source}_90.cubin"], capture_output=True, text=True, check=True
    ).stdout
    bodies = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", text, re.DOTALL))
    assert bodies
    for name, body in bodies.items():
        if "finish" in name:
            continue
        assert re.search(r"LDG\S*\.128|LDGSTS\S*\.128", body), name
        assert "statistics_kernel" in name or re.search(r"STG\S*\.128", body), name


def test_the_build_holds_the_cuda_kernels():
    """Where nvcc is there, ``make`` builds them even without a GPU."""
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip(cen_ext.available_backends()["cpu"])
    from cen_ext import _C

    architectures = _C.build_info()["cuda_architectures"]
    if not architectures:
        pytest.skip("built without CUDA (FORCE_CUDA=1 builds it without a GPU)")
    assert min(architectures) >= 80
    assert "without CUDA" not in cen_ext.available_backends()["cuda"]
