#!/usr/bin/env python3
"""Install a wheel in clean environments and run the smoke tests there, outside the checkout.

    .ci/smoke.py dist/cen_ext-*.whl
    .ci/smoke.py dist/cen_ext-*.whl --python python3.10 python3.13 --torch torch==2.10.0 torch

Each Python is combined with each torch. The tests of the library run with nothing else installed, those of
the commands then with the extra ``models``. The exit status is 1 if any of them failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests" / "smoke"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the smoke tests on a wheel in clean environments.")
    parser.add_argument("package", type=Path, metavar="WHEEL", help="a wheel, or an sdist to be built")
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], help="default: the one that runs this"
    )
    parser.add_argument(
        "--torch", nargs="+", default=["torch"], help="requirements; default: the newest torch"
    )
    arguments = parser.parse_args()
    if not arguments.package.is_file():
        parser.error(f"{arguments.package}: there is no such file")
    failed = False
    for python in arguments.python:
        for requirement in arguments.torch:
            try:
                told = smoke(arguments.package.resolve(), python, requirement)
            except subprocess.CalledProcessError as error:
                failed, told = True, f"FAILED: {' '.join(map(str, error.cmd))}"
            print(f"smoke: {arguments.package.name}, {python}, {requirement}: {told}", flush=True)
    return int(failed)


def smoke(package: Path, python: str, requirement: str) -> str:
    """Run the tests with a Python and a torch; the versions that they ran with.

    Raises:
        CalledProcessError: a package cannot be installed, or a test failed.
    """
    with tempfile.TemporaryDirectory(prefix="cen_smoke_") as name:
        folder = Path(name)
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        inside = str(folder / "venv" / "bin" / "python")
        tests = shutil.copytree(TESTS, folder / "smoke", ignore=shutil.ignore_patterns("__pycache__"))

        def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
            # Isolated (-I), so that neither PYTHONPATH nor the current folder brings the checkout in.
            return subprocess.run([inside, "-I", *command], check=True, cwd=folder, text=True, **options)

        def install(*what: str) -> None:
            run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement, *what)

        def test(file: str) -> None:
            run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests / file)

        install(str(package), "pytest")
        test("test_library.py")
        install(f"{package}[models]")
        test("test_models.py")
        versions = (
            "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"
        )
        return f"passed with {run('-c', versions, stdout=subprocess.PIPE).stdout.strip()}"


if __name__ == "__main__":
    sys.exit(main())
