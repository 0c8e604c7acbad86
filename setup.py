"""Builds the compiled part, ``cen_ext._C``; everything else about the package is in pyproject.toml.

    python setup.py build_ext --inplace     in the checkout
    pip install .                           or -e .

The CUDA kernels are built where torch is a CUDA build, there is an nvcc, and a GPU is visible or
TORCH_CUDA_ARCH_LIST is set. FORCE_CUDA=1 builds them in any case, even beside a torch without CUDA: they run
under another torch then. FORCE_CUDA=0 leaves them out.
TORCH_CUDA_ARCH_LIST names compute capabilities, "8.0;9.0+PTX" by default.
CEN_EXT_NO_BUILD=1 leaves all of the compiled part out (no compiler needed): the package then runs in Triton
or plain PyTorch.
CEN_EXT_INSTRUCTION_SETS=native builds the CPU kernels for this processor alone, which takes a third of the
time; what is built then may not run on others.
MAX_JOBS limits the compilers that run at a time.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# GCC 12 on its own intrinsics, and on vectors handed over between functions of one file.
NO_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable interface as of 2.10
PYTHON = "cp310"  # the oldest Python that the compiled part runs on, as csrc/module.cpp says
ARCHITECTURES = "8.0;9.0+PTX"
# Of the CPU kernels, best last; what each needs, as Linux names it.
INSTRUCTION_SETS = {
    "default": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
}
INCLUDE = Path("build/include")


def cuda_home() -> Path | None:
    """Where nvcc is; None where there is none."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*_homes(), os.environ.get("PATH", "")]))
    return None if nvcc is None else Path(nvcc).parents[1]


def _homes() -> list[str]:
    return [str(Path(os.environ[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]


def builds_cuda() -> bool:
    """Whether the CUDA kernels are to be built.

    Raises:
        RuntimeError: FORCE_CUDA=1, but there is no nvcc.
    """
    import torch

    forced = os.environ.get("FORCE_CUDA", "")
    if forced == "0" or (not forced and torch.version.cuda is None):
        return False
    if cuda_home() is None:
        if forced:
            raise RuntimeError(f"FORCE_CUDA={forced}, but there is no nvcc: set CUDA_HOME or PATH")
        return False
    return bool(forced or os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available())


def architectures() -> list[tuple[str, bool]]:
    """Compute capabilities as nvcc writes them, each with whether newer ones are to run its code, too.

    Raises:
        RuntimeError: TORCH_CUDA_ARCH_LIST holds something else, or what the kernels do not run on.
    """
    found = []
    for entry in re.split("[; ]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", entry)
        if match is None or int(match[1]) < 8:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: expected capabilities from 8.0 on, got {entry!r}")
        found.append((match[1] + match[2], match[3] is not None))
    return found


def library_folders() -> list[str]:
    """Where nvcc itself links from, as options: it may be a link or a script somewhere else."""
    nvcc = [str(cuda_home() / "bin" / "nvcc"), "--dryrun", "-x", "cu", os.devnull]
    told = subprocess.run(nvcc, capture_output=True, text=True, check=True)
    return re.findall(r'"(-L[^"]+)"', told.stdout + told.stderr)


def gpu_arguments() -> dict[str, object]:
    """The options of nvcc, and of the compiler and linker beside it."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(cuda_home())  # which a torch without CUDA does not look for
    code = []
    for name, newer in architectures():
        code += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if newer:
            code += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
    system = ["-ldl", "-lrt", "-lpthread"]
    return {
        "sources": sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
        "nvcc": ["-O3", "--expt-relaxed-constexpr", *code],
        # CUDA's runtime is linked in, so that no other copy of it has to be found. libtorch brings LibTorch's
        # CUDA part along, where there is one, and so the streams.
        "link": [*library_folders(), "-lcudart_static", "-Wl,--no-as-needed", "-ltorch", *system],
    }


def instruction_sets() -> list[str]:
    """Those of the CPU kernels that are to be built.

    Raises:
        RuntimeError: CEN_EXT_INSTRUCTION_SETS holds something else than "native".
    """
    names = list(INSTRUCTION_SETS) if platform.machine() in ("x86_64", "AMD64") else ["default"]
    asked = os.environ.get("CEN_EXT_INSTRUCTION_SETS", "")
    if asked not in ("", "native"):
        raise RuntimeError(f"CEN_EXT_INSTRUCTION_SETS: expected 'native' or nothing, got {asked!r}")
    if asked and len(names) > 1:
        here = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        flags = set(here[1].split() if here else [])
        names = [name for name in names if INSTRUCTION_SETS[name] <= flags][-1:]
    return names


def write_build_header(sets: list[str], cuda: bool) -> None:
    """Tell sources what is built: in a file, so that a change compiles only those again that include it."""
    lines = ["// Written by setup.py: what this build holds.", "#pragma once"]
    lines += [f"#define CEN_BUILT_{name.upper()}" for name in sets]
    if cuda:
        lines.append(f"#define CEN_CUDA {', '.join(name for name, _ in architectures())}")
    header, content = INCLUDE / "cen_build.h", "\n".join(lines) + "\n"
    if not header.is_file() or header.read_text() != content:
        INCLUDE.mkdir(parents=True, exist_ok=True)
        header.write_text(content)


def extension_arguments() -> dict[str, object]:
    """The arguments of ``setup`` for the compiled part; empty where it is left out."""
    if os.environ.get("CEN_EXT_NO_BUILD", "0") != "0":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    compiler = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", *NO_WARNINGS, STABLE_ABI]
    gpu = gpu_arguments() if (cuda := builds_cuda()) else {"sources": [], "nvcc": [], "link": []}
    sets = instruction_sets()
    write_build_header(sets, cuda)
    left_out = [f"kernels_{name}{half}" for name in INSTRUCTION_SETS.keys() - sets for half in ("", "_half")]
    extension = CppExtension(
        "cen_ext._C",
        sources=[
            *sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.stem not in left_out),
            *gpu["sources"],
        ],
        include_dirs=[str(INCLUDE.resolve())],
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")),
        extra_compile_args={"cxx": compiler, "nvcc": gpu["nvcc"]},
        # Before LibTorch, which exports some of its symbols, too, but need not always do so.
        libraries=["stdc++"] if sys.platform == "linux" else [],
        extra_link_args=gpu["link"],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON}},
    }


setup(**extension_arguments())
