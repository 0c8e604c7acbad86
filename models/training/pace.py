"""The time that a run's steps take, for a word on when it will be done."""

from __future__ import annotations

import time

import torch

COUNTED = 10  # steps, of which the first, with its compilations and the start of loaders, is left out


class Pace:
    """A clock of the first steps: ``start`` before steps, and ``count`` after each.

    What happens between the last ``count`` and the next ``start``, such as an evaluation, is left out.

    Args:
        device: is waited for after the first step and the last one counted, and at no other time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = 0
        self.seconds = 0.0
        self.since = 0.0

    def start(self) -> None:
        """Go on with the clock."""
        self.since = time.perf_counter()

    def count(self) -> float | None:
        """Count a step; after the tenth, tell the seconds that one takes, and None otherwise."""
        self.steps += 1
        if self.steps > COUNTED:
            return None
        if self.device.type == "cuda" and self.steps in (1, COUNTED):
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.steps > 1:
            self.seconds += now - self.since
        self.since = now
        return self.seconds / (COUNTED - 1) if self.steps == COUNTED else None


def duration(seconds: float) -> str:
    """A time in words, a second at the least, in its two largest units: ``2 h 5 min``."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = max(1, round(seconds))
    largest = next(i for i, (_, length) in enumerate(units) if whole >= length)
    parts = []
    for unit, length in units[largest : largest + 2]:
        count, whole = divmod(whole, length)
        parts += [f"{count} {unit}"] * (count > 0)
    return " ".join(parts)


def length(steps: int, steps_per_epoch: int, images_per_step: int) -> str:
    """The length of a training in words."""
    return f"{steps} steps of {images_per_step} images, {steps / steps_per_epoch:.4g} epochs"
