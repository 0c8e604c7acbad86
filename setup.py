"""Builds the compiled part, ``cen_ext._C``; everything else about the package is in pyproject.toml.

    python setup.py build_ext --inplace     in the checkout
    pip install .                           or -e .

CEN_EXT_NO_BUILD=1 leaves the compiled part out (no compiler needed): the package then runs in plain PyTorch.
MAX_JOBS limits the compilers that run at a time.
"""

import os
from pathlib import Path

from setuptools import setup

# GCC 12 on its own intrinsics, and on vectors handed over between functions of one file.
NO_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable interface as of 2.10


def extension_arguments() -> dict[str, object]:
    """What ``setup`` is told of the compiled part; empty where it is left out."""
    if os.environ.get("CEN_EXT_NO_BUILD", "0") != "0":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(
        "cen_ext._C",
        sources=sorted(map(str, Path("csrc").rglob("*.cpp"))),
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", *NO_WARNINGS, STABLE_ABI]
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())
