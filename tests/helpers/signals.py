"""Signals to this process, as Ctrl-C sends them."""

import os
import threading
import time
from pathlib import Path


def until(there: Path, *, stop: int) -> threading.Thread:
    """Send a signal to this process once a file is there; a minute later in any case."""

    def wait() -> None:
        for _ in range(600):
            if there.is_file():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), stop)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
