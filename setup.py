"""Builds the compiled part, ``cen_ext._C``; everything else about the package is in pyproject.toml.

    python setup.py build_ext --inplace     in the checkout
    pip install .                           or -e .

The CUDA kernels are built where torch is a CUDA build, there is an nvcc, and a GPU is visible or
TORCH_CUDA_ARCH_LIST is set. FORCE_CUDA=1 builds them in any case, even beside a torch without CUDA: they run
under another torch then. FORCE_CUDA=0 leaves them out.
TORCH_CUDA_ARCH_LIST names compute capabilities, "8.0;9.0+PTX" by default.
CEN_EXT_NO_BUILD=1 leaves all of the compiled part out (no compiler needed): the package then runs in Triton
or plain PyTorch.
MAX_JOBS limits the compilers that run at a time.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

# GCC 12 on its own intrinsics, and on vectors handed over between functions of one file.
NO_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable interface as of 2.10
ARCHITECTURES = "8.0;9.0+PTX"


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
        "cxx": [f"-DCEN_CUDA={','.join(name for name, _ in architectures())}"],
        # CUDA's runtime is linked in, so that no other copy of it has to be found. libtorch brings LibTorch's
        # CUDA part along, where there is one, and so the streams.
        "link": [*library_folders(), "-lcudart_static", "-Wl,--no-as-needed", "-ltorch", *system],
    }


def extension_arguments() -> dict[str, object]:
    """The arguments of ``setup`` for the compiled part; empty where it is left out."""
    if os.environ.get("CEN_EXT_NO_BUILD", "0") != "0":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    compiler = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", *NO_WARNINGS, STABLE_ABI]
    gpu = gpu_arguments() if builds_cuda() else {"sources": [], "nvcc": [], "cxx": [], "link": []}
    extension = CppExtension(
        "cen_ext._C",
        sources=[*sorted(map(str, Path("csrc").rglob("*.cpp"))), *gpu["sources"]],
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")),
        extra_compile_args={"cxx": [*compiler, *gpu["cxx"]], "nvcc": gpu["nvcc"]},
        extra_link_args=gpu["link"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
