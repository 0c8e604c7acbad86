"""examples/exchange.ipynb is executed as it stands; what is committed of it was executed, and is small."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.paths import ROOT

NOTEBOOK = ROOT / "examples" / "exchange.ipynb"


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """The kinds of each code cell's outputs."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [{output.output_type for output in cell.outputs} for cell in cells]


def test_it_runs_and_its_assertions_hold(
    committed: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells assert what they show: an assertion that fails is an error of the client."""
    notebook = nbformat.from_dict(committed)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    # The same figures and texts as in what is committed, which a reader sees.
    assert outputs(notebook) == outputs(committed)
    assert sum("assert" in cell.source for cell in notebook.cells if cell.cell_type == "code") >= 7


def test_what_is_committed_was_executed_and_is_small(committed: nbformat.NotebookNode) -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    figures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(figures) == 3


def test_links_lead_somewhere(committed: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert "../docs/theory.md" in links
    for link in links:
        assert (NOTEBOOK.parent / link).is_file(), link
