"""One thread that runs the network, and those that wait for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

Work = Callable[[], Any]


class Worker:
    """Runs one function after the other, in the order of their submission.

    What a function raises is its future's: the thread lives on.

    Attributes:
        pace: the seconds that the last function took, 0 before there was one.
    """

    def __init__(self) -> None:
        self.pace = 0.0
        self._jobs: deque[tuple[Future[Any], Work]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many functions have not begun."""
        return len(self._jobs)

    def submit(self, work: Work) -> Future[Any]:
        """Line up a function."""
        future: Future[Any] = Future()
        with self._changed:
            self._jobs.append((future, work))
            self._changed.notify()
        return future

    def drop(self, future: Future[Any]) -> None:
        """Take a function out of the line, with what it holds; one that has begun is run to its end."""
        with self._changed:
            if future.cancel():
                self._jobs = deque(job for job in self._jobs if job[0] is not future)

    def close(self) -> None:
        """Run what is in the line, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                future, work = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            started = time.perf_counter()
            try:
                found = work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(found)
            self.pace = time.perf_counter() - started
            del future, work  # the uploads that they hold
            found = None  # and the answer's images
