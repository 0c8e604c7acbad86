"""A robot's perception as ROS 2 has it, without ROS: ``python examples/robot_loop.py RUN [SECONDS]``.

Two publishers send made-up rooms with time stamps, color at 30 Hz and depth at 15 Hz, each in a thread. A
synchronizer pairs the nearest stamps, as ``message_filters.ApproximateTimeSynchronizer`` does. A node with a
queue of depth 1 labels the newest pair and publishes the labels. It ends after SECONDS, or by Ctrl-C, and
prints how late labels were. RUN is a network of rgb and depth, such as one of ``synthetic_demo``.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

import models
from models.data import DataError
from models.training.errors import UsageError

RATES = {"rgb": 30.0, "depth": 15.0}  # Hz
SIZE = (96, 128)
TOLERANCE = 0.05  # seconds between the stamps of a pair


@dataclass(frozen=True)
class Message:
    """What a topic carries; the stamp is the time of capture."""

    stamp: float
    data: Any


def room(kind: str, stamp: float) -> np.ndarray:
    """What a sensor sees of a ball that moves before a wall: color uint8, red first, or depth in meters."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    ball = (rows - 48) ** 2 + (columns - 64 - 40 * np.sin(stamp)) ** 2 < 20**2
    if kind == "depth":
        return np.where(ball, 1.5, 3.0).astype(np.float32)
    return np.where(ball[:, :, None], (200, 40, 40), (120, 130, 140)).astype(np.uint8)


def publish(kind: str, send: Callable[[str, Message], None], stopped: threading.Event) -> None:
    """Send a sensor's messages at its rate; ticks that are missed are skipped, as drivers do."""
    start = time.monotonic()
    while not stopped.is_set():
        stamp = time.monotonic()
        send(kind, Message(stamp, room(kind, stamp)))
        period = 1 / RATES[kind]
        stopped.wait(period - (time.monotonic() - start) % period)


class Synchronizer:
    """Pairs messages of two topics; ``out`` is called once for each, with stamps within the tolerance."""

    def __init__(self, out: Callable[[dict[str, Message]], None]) -> None:
        self._out, self._lock = out, threading.Lock()
        self._waiting: dict[str, deque[Message]] = {kind: deque(maxlen=10) for kind in RATES}

    def add(self, kind: str, message: Message) -> None:
        """Take a message, of any thread."""
        with self._lock:
            self._waiting[kind].append(message)
            other = next(name for name in RATES if name != kind)
            partner = min(
                self._waiting[other], key=lambda each: abs(each.stamp - message.stamp), default=None
            )
            if partner is None or abs(partner.stamp - message.stamp) > TOLERANCE:
                return
            for name, used in ((kind, message), (other, partner)):  # neither these nor older ones come again
                while self._waiting[name] and self._waiting[name][0].stamp <= used.stamp:
                    self._waiting[name].popleft()
            self._out({kind: message, other: partner})  # locked: in the order of stamps


def keep_newest(pairs: queue.Queue[dict[str, Message]], pair: dict[str, Message]) -> None:
    """Put a pair into a queue of depth 1 in place of an older one; called by one thread at a time."""
    with suppress(queue.Empty):
        pairs.get_nowait()
    pairs.put_nowait(pair)


def main(run: str, seconds: float = float("inf"), labeled: Callable[[Message], None] = lambda _: None) -> int:
    """Spin until the time is over or Ctrl-C; ``labeled`` is the topic of label maps. How many there were."""
    trained = models.load(run)
    trained.warm_up(SIZE)
    pairs: queue.Queue[dict[str, Message]] = queue.Queue(1)
    synchronizer, stopped = Synchronizer(lambda pair: keep_newest(pairs, pair)), threading.Event()
    threads = [threading.Thread(target=publish, args=(kind, synchronizer.add, stopped)) for kind in RATES]
    for thread in threads:
        thread.start()
    latencies, end = [], time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                pair = pairs.get(timeout=0.1)
            except queue.Empty:
                continue
            found = trained.predict(**{kind: message.data for kind, message in pair.items()})
            stamp = min(message.stamp for message in pair.values())
            labeled(Message(stamp, found["ensemble"]))
            latencies.append(time.monotonic() - stamp)
    except KeyboardInterrupt:
        pass
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    if latencies:
        median, late = 1000 * np.percentile(latencies, [50, 95])
        print(
            f"{len(latencies)} pairs labeled; capture to labels: median {median:.0f} ms, 95 % {late:.0f} ms"
        )
    return len(latencies)


if __name__ == "__main__":
    try:
        main(sys.argv[1], *map(float, sys.argv[2:3]))
    except (UsageError, DataError) as error:
        sys.exit(f"error: {error}")
