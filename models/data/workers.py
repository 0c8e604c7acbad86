"""The start of every helper process of this package."""

import signal

import cv2


def start_worker(_: int = 0) -> None:
    """Leave the threads and Ctrl-C, which a terminal sends to all processes, to the parent."""
    cv2.setNumThreads(0)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
