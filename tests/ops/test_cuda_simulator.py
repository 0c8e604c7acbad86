"""The simulated device that CUDA kernels are tested on: right kernels are right, wrong ones are found out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import host_device

BLOCKS, THREADS, CLUSTER = 6, 16, 3  # as in host_cuda/toys.cpp
SEEDS = range(4)
X = np.arange(1, BLOCKS * THREADS + 1.0)


@pytest.fixture(scope="module")
def checked_toys(tmp_path_factory) -> Path:
    """Under the address and undefined-behaviour sanitizers."""
    return host_device.build(tmp_path_factory.mktemp("toys"), [("toys.cpp",)])


@pytest.fixture(scope="module")
def watched_toys(tmp_path_factory) -> Path:
    """Watched for races."""
    return host_device.build(tmp_path_factory.mktemp("toys"), [("toys.cpp",)], races=True)


def outputs(toys: Path, name: str) -> list[tuple[float, ...]]:
    """The kernel's output under each of the seeds."""
    results = [host_device.run(toys, name, seed=seed) for seed in SEEDS]
    assert not any(r.returncode for r in results), results[0].stderr
    return [tuple(map(float, r.stdout.split())) for r in results]


def each(values: np.ndarray, times: int) -> list[float]:
    return np.repeat(values, times).tolist()


SUMS = X.reshape(BLOCKS, -1).sum(1)
NOTHING = [0.0] * BLOCKS
RIGHT = {
    "block_sums": [*SUMS, *[0.0] * X.size],
    "cluster_sums": each(SUMS.reshape(-1, CLUSTER).sum(1), CLUSTER * THREADS) + NOTHING,
    "grid_sums": [X.sum()] * X.size + SUMS.tolist(),
    "copies": X.reshape(BLOCKS, -1)[:, ::-1].ravel().tolist() + NOTHING,
    "bytes": [1.0] * X.size + NOTHING,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(checked_toys, watched_toys, name):
    for toys in (checked_toys, watched_toys):
        assert outputs(toys, name) == [tuple(RIGHT[name])] * len(SEEDS)


@pytest.mark.parametrize("name", ["no_barrier", "no_grid_barrier"])
def test_without_a_barrier_results_depend_on_the_order(checked_toys, name):
    assert len({str(output) for output in outputs(checked_toys, name)}) > 1


@pytest.mark.parametrize("name", ["unset_shared", "early_copies"])
def test_what_is_not_there_yet_is_nan(checked_toys, name):
    assert all(np.isnan(output).any() for output in outputs(checked_toys, name))


WRONG = {
    "divergent": r"0,0 waits in sync_threads at \S+toys.cpp:\d+, 1,0 waits in sync_threads at",
    "left": r"0,0 waits in sync_threads at \S+toys.cpp:\d+, 1,0 has ended",
    "early_end": r"waits in cluster_sync at \S+toys.cpp:\d+, block [03] has ended",
    "no_last_wait": r"of_rank: block \d of the cluster has ended",
    "kept_pointer": r"AddressSanitizer: heap-use-after-free",
    "no_grid": r"grid_sync at \S+toys.cpp:\d+: not cooperative",
    "no_wait": r"block \d, thread 0,0 ended with copies that it never waited for",
    "misaligned": r"0x[0-9a-f]+ is not aligned to 16 bytes",
    "past_shared": r"AddressSanitizer: heap-buffer-overflow",
}
RACE = "race: this thread (reads|writes) what thread .* no barrier in between"


@pytest.mark.parametrize("name", WRONG)
def test_errors_end_the_process(checked_toys, name):
    assert_found(checked_toys, name, WRONG[name])


@pytest.mark.parametrize("name", ["no_barrier", "no_grid_barrier", "early_copies", "same_place"])
def test_races_are_seen_in_any_order(watched_toys, name):
    assert_found(watched_toys, name, RACE)


def assert_found(toys: Path, name: str, pattern: str) -> None:
    for seed in SEEDS:
        result = host_device.run(toys, name, seed=seed)
        assert result.returncode != 0
        assert re.search(pattern, result.stderr), result.stderr
