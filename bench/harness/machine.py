"""Machine and versions behind the figures; ``python -m bench.harness.machine FILE`` writes them as JSON."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

import cen_ext
from bench.harness.files import write

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def machine() -> dict[str, object]:
    """CPU, caches, system, versions and the compiled part, by name."""
    cpuinfo = Path("/proc/cpuinfo")
    build = build_info()
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{f"L{level} MiB": size / 2**20 for level, size in cache_sizes().items() if level > 1},
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cen_ext": cen_ext.__version__,
        "backends": cen_ext.available_backends(),
        "compiler": build.get("compiler"),
        "instruction set": build.get("instruction_set"),
    }


def gpu() -> dict[str, object]:
    """The current GPU, its driver and what programs for it are made with, by name; None where unknown."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    release = re.search(r"release [\d.]+, V([\d.]+)", _output("nvcc", "--version") or "")
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu L2 MiB": properties.L2_cache_size / 2**20,
        "gpu memory GiB": round(properties.total_memory / 2**30, 1),
        "driver": driver.partition("\n")[0] or None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "nvcc": release and release[1],
        "built for": build_info().get("cuda_architectures"),
    }


def _output(*command: str) -> str | None:
    """Output of a program; None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def build_info() -> dict[str, object]:
    """Compiler and instruction sets of the compiled part; empty without one."""
    try:
        info: dict[str, object] = importlib.import_module("cen_ext._C").build_info()
    except ImportError:
        return {}
    return info


def cache_sizes(folder: Path = _CACHES) -> dict[int, int]:
    """Bytes of the first CPU's data and unified caches by level; empty where Linux does not tell."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        size, level, kind = ((index / name).read_text().strip() for name in ("size", "level", "type"))
        if kind != "Instruction":
            sizes[int(level)] = int(size[:-1]) * _UNITS[size[-1]]
    return sizes


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where nothing tells."""
    return max(cache_sizes().values(), default=32 * 2**20)


if __name__ == "__main__":
    versions = {**machine(), **(gpu() if torch.cuda.is_available() else {})}
    write(Path(sys.argv[1]), json.dumps(versions, indent=2) + "\n")
