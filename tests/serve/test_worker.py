"""The line before the network."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from models.serve.worker import Worker


def test_work_is_done_in_order_and_failures_are_its_own() -> None:
    worker, done = Worker(), []
    futures = [worker.submit(lambda number=number: done.append(number) or number) for number in range(5)]
    broken = worker.submit(lambda: 1 / 0)
    last = worker.submit(lambda: "alive")
    assert [future.result(60) for future in futures] == done == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        broken.result(60)
    assert last.result(60) == "alive"
    worker.close()


def test_what_was_cancelled_is_passed_over() -> None:
    worker, gate, started = Worker(), threading.Event(), threading.Event()
    worker.submit(lambda: (started.set(), gate.wait(60)))
    assert started.wait(60)
    cancelled, after = worker.submit(lambda: "never"), worker.submit(lambda: "alive")
    assert cancelled.cancel()
    gate.set()
    assert after.result(60) == "alive"
    worker.close()


def test_what_is_dropped_never_begins_and_what_is_left_is_done_before_the_end() -> None:
    worker, gate, done = Worker(), threading.Event(), []
    started = threading.Event()
    first = worker.submit(lambda: (started.set(), gate.wait(60)))
    assert started.wait(60)
    dropped, kept = worker.submit(lambda: done.append("dropped")), worker.submit(lambda: done.append("kept"))
    assert worker.waiting == 2
    worker.drop(dropped)
    worker.drop(first)  # it has begun
    assert worker.waiting == 1
    gate.set()
    worker.close()
    assert done == ["kept"]
    assert first.done()
    assert not first.cancelled()
    assert kept.done()
    with pytest.raises(CancelledError):
        dropped.result()
