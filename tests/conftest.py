"""Fixtures that several test files share."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Read once, when torch's thread pool is loaded. Threads that spin for work make every small parallel region
# wait for a core that another process holds; and of tests side by side each has a thread of its own.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import tests.helpers.vision  # noqa: F401 - before torchmetrics

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden numbers beside the checkout; only there are such tests run."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder of real data and golden numbers beside the checkout")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def _frees_memory() -> Iterator[None]:
    """glibc keeps what a module freed: over a gigabyte in a worker that has run many."""
    yield
    gc.collect()
    # What is left stays, such as modules and the tests of all files: else each file looks through it anew.
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    """A function is compiled eight times at most: a test must not fail for what ran before it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Without a GPU, torch would note for each kind of them from where it is to be seeded, and keep that."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that tests start: bits of a sum depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
