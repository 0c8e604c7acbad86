"""Every snippet and command of README, docs and the examples' pages, those of pages to come as well.

Programs are run, page by page, beside a run and an exported network of two steps. Of commands those are run
that need no more than these (``RUN``); what others need is in ``NEEDS``. These are parsed by the real parser,
and their recipes and settings are made. A page of ``ELSEWHERE`` has a test of its own that runs its commands
or programs with what they need, so that here they are parsed alone.

A block without a language holds commands; output is to be marked as text.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

import cen_ext
import models
from models import cli
from models.training import config, registry
from models.training.errors import UsageError
from models.training.importable import import_modules
from tests.helpers.paths import ROOT
from tests.helpers.snippets import (
    SHELLS,
    Block,
    blocks,
    command_lines,
    own_package,
    pages,
    spans,
    words_of,
)
from tests.helpers.training_runs import command, prepare_rooms

# Commands that run here: without data, or on the run and its network.
RUN = {"recipes", "evaluate", "predict", "export", "compare", "report"}
NEEDS = {
    "train": "a data set and hours; tests/training and tests/cli train every kind of recipe",
    "data": "a data set; tests/data",
    "prepare": "an archive, or minutes; tests/data",
    "import": "a released checkpoint; tests/cli/test_import_export.py",
    "analyse": "a training long enough to be analyzed; tests/analysis",
    "analyze": "the same",
    "serve": "someone to stop it; tests/serve",
}
ELSEWHERE = {
    "docs/adding_a_fusion.md": "tests/cli/test_docs.py",
    "docs/adding_a_layout.md": "tests/cli/test_docs.py",
    "docs/adding_a_recipe.md": "tests/cli/test_docs.py",
    "docs/adding_a_system.md": "tests/cli/test_systems.py",
    "docs/adding_an_encoder.md": "tests/cli/test_docs.py",
    "docs/data.md": "tests/cli/test_missing.py",
    "docs/deployment.md": "tests/helpers/isolated.py",
    "docs/features.md": "tests/cli/test_docs.py",
    "docs/losses.md": "tests/cli/test_docs.py",
    "docs/predicting.md": "tests/cli/test_docs.py",
    "docs/robustness.md": "tests/cli/test_docs.py",
    "docs/runs.md": "tests/cli/test_docs.py",
    "docs/serve.md": "tests/serve/test_docs.py",
    "docs/thresholds.md": "tests/cli/test_docs.py",
    "examples/cpp/README.md": "tests/deployment/test_cpp.py",
}
# Programs of others, and the tests that run those lines.
OTHERS = {
    "curl": "tests/serve/test_docs.py",
    "": "tests/deployment/test_cpp.py",  # sets a variable
    "cd": "tests/deployment/test_cpp.py",
    "cmake": "tests/deployment/test_cpp.py",
    "unzip": "tests/deployment/test_cpp.py",
    "build/label": "tests/deployment/test_cpp.py",
    ".ci/smoke.py": ".github/workflows/wheels.yml; it makes environments of gigabytes",
    "docker": "no test: it takes an engine, as docs/installing.md says",
}
# Runs of translation; all others are of segmentation.
TRANSLATION = ("docs/translation.md",)
# What pages use without making it.
GIVEN: dict[str, Callable[[], Any]] = {
    "rgb_images": lambda: torch.randn(1, 3, 64, 64),
    "depth_images": lambda: torch.randn(1, 3, 64, 64),
}
# The old spelling, and what the pages describe member by member.
NOT_DESCRIBED = {"cen_ext": {"__version__", "synchronise_statistics"}, "models": {"fusion"}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its network as a file, and the images that pages predict of."""
    folder = tmp_path_factory.mktemp("workplace")
    rooms = prepare_rooms(folder / "rooms")
    assert cli.main(command(rooms, folder / "runs" / "demo", "run.steps=2", "eval.sheet=1")) == 0
    assert (
        cli.main(["export", str(folder / "runs" / "demo"), "--output", str(folder / "net.safetensors")]) == 0
    )
    for name in ("photo", "scene"):
        cv2.imwrite(str(folder / f"{name}.png"), cv2.imread(str(rooms / "rgb" / "000001.png")))
    depth = cv2.imread(str(rooms / "depth" / "000001.png"), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(folder / "depth.png"), depth)
    own_package(folder)
    return folder


@pytest.fixture
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder, from where modules are imported."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    # What the package registers is forgotten after each test.
    monkeypatch.setattr(registry, "RECIPES", dict(registry.RECIPES))
    monkeypatch.delitem(sys.modules, "my_package.recipes", raising=False)
    return workplace


@pytest.fixture
def one_process() -> Iterator[None]:
    """The process group that programs of several processes have."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def of(page: str, *languages: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in languages]


def check_make(words: Sequence[str]) -> None:
    """Refuse targets that there are not."""
    result = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_pip(words: Sequence[str]) -> None:
    """Refuse extras that there are not."""
    _, _, table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
    extras = set(re.findall(r"^(\w+) = \[", table.partition("\n[")[0], re.M))
    assert words[0] in ("install", "download")
    for word in words[1:]:
        package, _, chosen = word.rstrip("]").partition("[")
        if package in (".", "cen_ext"):
            assert {*filter(None, chosen.split(","))} <= extras


class Parsed(Exception):
    """A module has parsed its arguments."""


def check_module(module: str, arguments: Sequence[str]) -> None:
    """Parse the arguments of a module by its own parser, and go no further."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse_args(parser, *given)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")


def check_settings(arguments: argparse.Namespace, page: str) -> None:
    """Make the recipe and the settings of a command."""
    import_modules(arguments.imports)
    given = [*getattr(arguments, "overrides", []), *map(str, getattr(arguments, "runs", []))]
    overrides = [text for text in given if re.match(r"[a-z]\w*(\.\w+)*=", text)]
    name = getattr(arguments, "recipe", None)
    kinds = [name] if name else ["synthetic_demo", "synthetic_translation_demo"]
    if page in TRANSLATION:
        kinds = kinds[-1:]
    *others, last = kinds
    for kind in others:
        with contextlib.suppress(UsageError):
            config.override(registry.find(kind), overrides)
            return
    config.override(registry.find(last), overrides)


def check_cen(words: list[str], page: str, folder: Path) -> None:
    """Parse a command and make its settings; run it if it is one of ``RUN`` and no other test does."""
    arguments = cli.parse(words)
    if getattr(arguments, "table", None) is None:
        check_settings(arguments, page)
    here = page not in ELSEWHERE and page not in TRANSLATION
    if arguments.command not in RUN or not (here or arguments.command == "recipes"):
        assert arguments.command in {*RUN, *NEEDS}
        return
    if arguments.command != "recipes":
        words = [_present(word, words[:place], folder) for place, word in enumerate(words)]
    assert cli.main(words) == 0


def _present(word: str, before: Sequence[str], folder: Path) -> str:
    """A word of a command, which names what there is here: the rooms, and for each run a copy of the one."""
    if word.startswith("data.root="):
        return f"data.root={folder / 'rooms'}"
    if not re.fullmatch(r"RUN|runs/\w+", word):
        return word
    run = word + "_2" * before.count(word)
    if not (folder / run).exists():
        shutil.copytree(folder / "runs" / "demo", folder / run)
    return run


@pytest.mark.parametrize("page", pages())
def test_commands(page: str, inside: Path) -> None:
    for block in of(page, *SHELLS):
        for line in command_lines(block):
            print(f"{page}, block of line {block.line}: {line}")  # what pytest shows of a failure
            program, *rest = words_of(line) or [""]
            if program == "torchrun":
                program, rest = "python", rest[rest.index("-m") :]
            if program == "python" and rest[:2] == ["-m", "models"]:
                program, rest = "cen", rest[2:]
            if program == "cen":
                check_cen(rest, page, inside)
            elif program == "python" and rest[:2] == ["-m", "pytest"]:
                assert all((ROOT / path).exists() for path in rest[2:])
            elif program == "python" and rest[0] == "-m":
                check_module(rest[1], rest[2:])
            elif program == "python":
                assert (ROOT / rest[0]).is_file()
            elif program == "make":
                check_make(rest)
            elif program == "pip":
                check_pip(rest)
            else:
                assert program in OTHERS, "neither a known program nor marked as ```text"


@pytest.mark.parametrize("page", pages())
@pytest.mark.usefixtures("inside", "one_process")
def test_programs(page: str) -> None:
    values: dict[str, Any] = {name: make() for name, make in GIVEN.items()}
    for block in of(page, "python"):
        print(f"{page}, block of line {block.line}")
        program = compile(block.text, f"{page}, below line {block.line}", "exec")
        if page not in ELSEWHERE:
            exec(program, values)


@pytest.mark.parametrize("page", pages())
def test_other_blocks(page: str) -> None:
    for block in blocks(page):
        assert block.language in (*SHELLS, "python", "json", "text"), block.line
        if block.language == "json":
            assert json.loads(block.text)


@pytest.mark.parametrize("page", pages())
def test_commands_in_running_text(page: str) -> None:
    """Their names; arguments may be left out there."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for span in spans(page):
        program, name, *rest = span.split()
        if program == "cen":
            assert name in {*RUN, *NEEDS, "--import", "--version"}, span
        elif program == "make":
            assert name in targets, span
        else:
            assert importlib.util.find_spec(rest[0]), span


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_pages_with_a_test_of_their_own(page: str, test: str) -> None:
    assert page in pages()
    assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("library", [cen_ext, models])
def test_public_names_are_described(library: Any) -> None:
    text = "".join((ROOT / page).read_text() for page in pages() if page.startswith("docs/api/"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.M)}
    assert {*library.__all__} - described == NOT_DESCRIBED[library.__name__]
