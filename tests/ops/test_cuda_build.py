"""The CUDA kernels in the extension: registers, spills, the width of their accesses. No GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import cen_ext

TYPES = ("f", "d", "NS_4HalfE", "NS_8BFloat16E")  # of x, as their names are mangled
HALF = TYPES[2:]
ARCHITECTURES = ("80", "90")
HOT = (
    *("statistics_kernel", "two_pass_forward", "resident_forward", "two_pass_backward", "resident_backward"),
    *("layer_forward", "layer_backward"),
)
FINISHING = ("finish_statistics", "join_statistics", "finish_sums", "join_sums")
# Blocks of how many threads are to fit on a multiprocessor of 65,536 registers, how many of them.
RESIDENT, TWO_PASS, TWO_PASS_WIDE, FINISH = (512, 1), (256, 3), (256, 2), (512, 1)
# That of layer norm, and the same with float64.
LAYER = {"layer_forward": ((256, 3), (256, 2)), "layer_backward": ((256, 2), (256, 1))}


class Kernel(NamedTuple):
    type: str
    architecture: str
    name: str
    channels_last: bool
    registers: int
    stack: int  # bytes, where spilled registers would lie
    local: int


def tool(name: str) -> str:
    """A tool of the CUDA toolkit, or the copy that Triton ships; the test is skipped without either."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(shipped) if shipped.exists() else None
    if found is None:
        pytest.skip(f"there is no {name}")
    return found


@pytest.fixture(scope="module")
def extension() -> Path:
    """The compiled extension, with CUDA kernels in it."""
    if cen_ext.available_backends()["cpu"] != "ok":
        pytest.skip(cen_ext.available_backends()["cpu"])
    from cen_ext import _C

    if not _C.build_info()["cuda_architectures"]:
        pytest.skip("built without CUDA (FORCE_CUDA=1 builds it without a GPU)")
    return Path(_C.__file__)


@pytest.fixture(scope="module")
def kernels(extension: Path) -> list[Kernel]:
    """The resources of every kernel in the extension."""
    text = subprocess.run(
        [tool("cuobjdump"), "-res-usage", extension], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for part in re.split(r"Fatbin \w+ code:", text)[1:]:
        architecture = re.findall(r"arch = sm_(\d+)", part)[0]
        for name, kind, layout, registers, stack, local in re.findall(
            rf"Function _ZN3cen4cuda\d+([a-z_]+)I({'|'.join(TYPES)})(?:Lb([01])E)?EEv\w*:\s*"
            r"REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)",
            part,
        ):
            found.append(
                Kernel(kind, architecture, name, layout == "1", int(registers), int(stack), int(local))
            )
    return found


def test_every_kernel_is_there(kernels: list[Kernel]):
    in_layouts = (*HOT, "finish_statistics", "join_statistics")
    layouts = [(name, last) for name in in_layouts for last in (False, True)]
    others = [("finish_sums", False), ("join_sums", False), ("pixel_shift_kernel", False)]
    for kind in TYPES:
        for architecture in ARCHITECTURES:
            made = [k for k in kernels if (k.type, k.architecture) == (kind, architecture)]
            assert sorted((k.name, k.channels_last) for k in made) == sorted([*layouts, *others])
    assert len(kernels) == len(TYPES) * len(ARCHITECTURES) * (len(layouts) + len(others))


def test_no_registers_are_spilled(kernels: list[Kernel]):
    """Nor is any other memory of a thread's own taken: nothing lies on a stack."""
    assert [kernel for kernel in kernels if kernel.stack > 0 or kernel.local > 0] == []


def test_registers_leave_room_for_the_blocks_that_plans_count_on(kernels: list[Kernel]):
    for kernel in kernels:
        if kernel.name in FINISHING:
            threads, blocks = FINISH
        elif kernel.name.startswith("resident"):
            threads, blocks = RESIDENT
        elif kernel.name in LAYER:
            threads, blocks = LAYER[kernel.name][kernel.type == "d"]
        else:
            wide = kernel.name == "two_pass_backward" or (kernel.channels_last and kernel.type in HALF)
            threads, blocks = TWO_PASS_WIDE if wide else TWO_PASS
        assert kernel.registers * threads * blocks <= 65536, kernel


def test_memory_is_accessed_16_bytes_at_a_time(extension: Path, tmp_path: Path):
    """In machine code: loads or copies into shared memory, and stores, of 128 bits in every hot kernel."""
    subprocess.run([tool("cuobjdump"), "-xelf", "sm_90", extension], cwd=tmp_path, check=True)
    bodies: dict[str, str] = {}
    for cubin in tmp_path.glob("*.cubin"):
        text = subprocess.run(
            [tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        bodies |= dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", text, re.DOTALL))
    hot = {name: body for name, body in bodies.items() if any(kernel in name for kernel in HOT)}
    assert len(hot) == len(TYPES) * len(HOT) * 2
    for name, body in hot.items():
        assert re.search(r"LDG\S*\.128|LDGSTS\S*\.128", body), name
        # Tables of weights, too, where channels lie side by side.
        assert "layer_" not in name or "Lb0E" in name or re.search(r"LDG\S*\.128", body), name
        assert "statistics_kernel" in name or re.search(r"STG\S*\.128", body), name


def test_the_build_holds_the_cuda_kernels(extension: Path):
    """Where nvcc is there, ``make`` builds them even without a GPU."""
    from cen_ext import _C

    assert min(_C.build_info()["cuda_architectures"]) >= 80
    assert "without CUDA" not in cen_ext.available_backends()["cuda"]
