"""Builds the compiled part, ``cen_ext._C``; everything else about the package is in pyproject.toml.

    python setup.py build_ext --inplace     in the checkout
    pip install .                           or -e .

The CUDA kernels are built where torch is a CUDA build, there is an nvcc, and one of these holds: a GPU is visible;
TORCH_CUDA_ARCH_LIST is set; FORCE_CUDA=1 (which makes their absence an error). FORCE_CUDA=0 leaves them out.
TORCH_CUDA_ARCH_LIST names compute capabilities, "8.0;9.0+PTX" by default.
CEN_EXT_NO_BUILD=1 leaves all of the compiled part out (no compiler needed): the package then runs in plain PyTorch.
MAX_JOBS limits the compilers that run at a time.
"""

import os
import re
import subprocess
from pathlib import Path

from setuptools import setup

# GCC 12 on its own intrinsics, and on vectors handed over between functions of one file.
NO_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable interface as of 2.10
ARCHITECTURES = "8.0;9.0+PTX"


def why_no_cuda() -> str | None:
    """Reason why the CUDA kernels cannot be built here; None if they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "there is no nvcc; set CUDA_HOME"
    return None


def builds_cuda() -> bool:
    """Whether the CUDA kernels are to be built.

    Raises:
        RuntimeError: FORCE_CUDA=1 where they cannot be built.
    """
    import torch

    forced = os.environ.get("FORCE_CUDA", "")
    if forced == "0":
        return False
    reason = why_no_cuda()
    if reason is not None and forced:
        raise RuntimeError(f"FORCE_CUDA={forced}, but {reason}")
    wanted = forced or os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()
    return reason is None and bool(wanted)


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
    from torch.utils.cpp_extension import CUDA_HOME

    told = subprocess.run(
        [Path(CUDA_HOME, "bin", "nvcc"), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    return re.findall(r'"(-L[^"]+)"', told.stdout + told.stderr)


def gpu_arguments() -> dict[str, object]:
    """What nvcc, and the compiler and linker beside it, are told."""
    code = []
    for name, newer in architectures():
        code += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if newer:
            code += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
    return {
        "sources": sorted(map(str, Path("csrc/cuda").glob("*.cu"))),
        "nvcc": ["-O3", "--expt-relaxed-constexpr", *code],
        "cxx": [f"-DCEN_CUDA={','.join(name for name, _ in architectures())}"],
        # CUDA's runtime is linked in, so that no other copy of it has to be found.
        "link": [*library_folders(), "-lcudart_static", "-ltorch_cuda", "-ldl", "-lrt", "-lpthread"],
    }


def extension_arguments() -> dict[str, object]:
    """What ``setup`` is told of the compiled part; empty where it is left out."""
    if os.environ.get("CEN_EXT_NO_BUILD", "0") != "0":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    gpu = gpu_arguments() if builds_cuda() else {"sources": [], "nvcc": [], "cxx": [], "link": []}
    extension = CppExtension(
        "cen_ext._C",
        sources=[*sorted(map(str, Path("csrc").rglob("*.cpp"))), *gpu["sources"]],
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", *NO_WARNINGS, STABLE_ABI, *gpu["cxx"]],
            "nvcc": gpu["nvcc"],
        },
        extra_link_args=gpu["link"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
