"""The states of the random number generators: torch's, numpy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - seeded because libraries may draw from it
    torch.manual_seed(seed)


def process_seed(seed: int, rank: int, step: int = 0) -> int:
    """The seed of one of the processes of a run; that of rank 0 at step 0 is the run's own."""
    if rank == step == 0:
        return seed
    return int(np.random.SeedSequence((seed, rank, step)).generate_state(1)[0])


def rng_state() -> dict[str, Any]:
    """The state of every generator, in tensors and plain containers, so that ``weights_only`` loads it.

    Of the GPUs' generators that of the current device.
    """
    state = np.random.get_state()  # noqa: NPY002
    assert isinstance(state, tuple)  # a dict is returned on request only
    name, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to what ``rng_state`` returned."""
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():  # a run may be resumed on another machine
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the generators' states after the block, whatever it draws."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
