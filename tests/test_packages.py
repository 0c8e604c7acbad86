"""The sdist and the wheel: what is in them, and what is said of them. tests/smoke runs what they install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import cen_ext
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The checkout's files."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout by git")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in files if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def source(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, which builds leave files in."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(source: Path, kind: str) -> Path:
    """What the build backend makes, without the compiled part."""
    code = f"import setuptools.build_meta as backend; print(backend.build_{kind}('dist'))"
    environment = {**os.environ, "CEN_EXT_NO_BUILD": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return source / "dist" / done.stdout.splitlines()[-1]


def test_the_sdist_has_all_that_the_checkout_has(source: Path, tracked: set[str]) -> None:
    with tarfile.open(build(source, "sdist")) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in files if re.match(r"PKG-INFO|setup\.cfg|cen_ext\.egg-info/", name)}
    assert files - made == {name for name in tracked if not name.startswith(".github/")}


def test_a_wheel_without_the_compiled_part(source: Path, tracked: set[str]) -> None:
    wheel = build(source, "wheel")
    assert wheel.name == f"cen_ext-{cen_ext.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        info = f"cen_ext-{cen_ext.__version__}.dist-info"
        files = {name for name in archive.namelist() if not name.startswith(f"{info}/")}
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    packages = {name for name in tracked if name.split("/")[0] in ("cen_ext", "models")}
    assert files == {name for name in packages if not name.endswith(".md")}
    page = (ROOT / "docs" / "installing.md").read_text()
    described = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", page, re.MULTILINE)
    assert sorted(described) == sorted(metadata.get_all("Provides-Extra") or [])


def test_the_version_is_the_same_everywhere() -> None:
    released = re.findall(r"^## \[(\d.*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert released[0][0] == cen_ext.__version__
    assert f"\nversion: {released[0][0]}\ndate-released: {released[0][1]}\n" in citation
    page = (ROOT / "docs" / "installing.md").read_text()
    assert set(re.findall(r"cen_ext-([\d.]+)-", page)) == {cen_ext.__version__}
