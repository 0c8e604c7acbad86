"""Builds and runs programs of ``tests/host_cuda`` on the simulated device."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.paths import TESTS

SOURCES = TESTS / "host_cuda"
# Compiling takes longer than running: at -O1 three times as long, half of it for more debug information than
# the lines that races are reported with.
FLAGS = ("-std=c++17", "-Og", "-g1", "-I", str(SOURCES), "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Of these running takes longer.
SIMULATOR = (("simulator.cpp", "-O2"), ("races.cpp", "-O2"))


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    name = os.environ.get("CXX", "c++")
    if shutil.which(name) is None:
        pytest.skip(f"needs a C++ compiler; there is no {name}")
    return name


def build(folder: Path, parts: Sequence[tuple[str, ...]], races: bool = False) -> Path:
    """A program of the simulator and the given parts: sources of ``host_cuda``, each with its own flags.

    It runs under the address and undefined-behaviour sanitizers; with ``races``, its parts' loads and stores
    are instead watched for races between threads (``races.h``).
    """
    cxx = compiler()

    def run(*arguments: str) -> None:
        result = subprocess.run([cxx, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    def compile_part(number: int) -> str:
        source, *flags = (*SIMULATOR, *parts)[number]
        # The compiler's part of the thread sanitizer without its library: races.cpp is in its place.
        watched = () if number < len(SIMULATOR) else ("-fsanitize=thread",)
        target = folder / f"{number}.o"
        run(
            *FLAGS,
            *flags,
            *(watched if races else SANITIZERS),
            "-c",
            str(SOURCES / source),
            "-o",
            str(target),
        )
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_part, range(len(SIMULATOR) + len(parts))))
    program = folder / "program"
    run(*objects, *(("-no-pie",) if races else SANITIZERS), "-o", str(program))
    return program


def run(program: Path, *arguments: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """The seed shuffles the order in which the simulated threads run."""
    environment = {**os.environ, "CEN_HOST_CUDA_SEED": str(seed)}
    return subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True)
