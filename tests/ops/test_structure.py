"""The shape of the package: few entries per folder, short import chains, no import circles."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import cen_ext

ROOT = Path(cen_ext.__file__).parent
FOLDERS = [ROOT, *(path for path in ROOT.rglob("*") if path.is_dir() and path.name != "__pycache__")]
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
MOST_ENTRIES = 12
LONGEST_CHAIN = 7


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of cen_ext that a module imports, wherever in it: within functions, or for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return frozenset(found & MODULES.keys())


def longest_chain(module: str, before: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The longest chain of imports that begins with a module."""
    assert module not in before, f"imports in a circle: {' -> '.join([*before, module])}"
    chains = [longest_chain(other, (*before, module)) for other in imports_of(module)]
    return (module, *max(chains, key=len, default=()))


def test_the_modules_are_found():
    assert {"cen_ext", "cen_ext.ops.dispatch", "cen_ext.ops.norm_exchange.triton.launch"} <= MODULES.keys()
    assert "cen_ext.functional" in imports_of("cen_ext.modules.running")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT.parent)))
def test_a_folder_has_few_entries(folder):
    generated = ("__pycache__", ".so", ".pyd")
    entries = [path.name for path in folder.iterdir() if not path.name.endswith(generated)]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("module", MODULES)
def test_chains_of_imports_are_short_and_end(module):
    chain = longest_chain(module)
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)
