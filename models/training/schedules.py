"""Learning rates as functions of the step, so that a resumed run has nothing to restore.

Not ``torch.optim.lr_scheduler``, compared on 2026-11-29 with torch 2.13.0: its schedulers keep state that
earlier checkpoints lack and compute each rate from the last one, so that over 1000 steps 956 rates of
``PolynomialLR`` and 985 of ``CosineAnnealingLR`` differ from these by rounding (at most 8e-14 of the rate),
and a run begun with these would not resume bit for bit. ``LambdaLR`` would need the function below all the
same.
"""

from __future__ import annotations

import math

from models.training.errors import UsageError
from models.training.settings import UpdateSettings


def check_schedule(settings: UpdateSettings) -> None:
    """Refuse settings of the step schedule beside another one.

    Not where they are set, as settings are set one after the other.

    Raises:
        UsageError: there is one.
    """
    for name in ("decay", "decay_steps"):
        value = getattr(settings, name)
        if settings.schedule != "step" and value != getattr(UpdateSettings, name):
            raise UsageError(
                f"optim.{name}={value} has no meaning with optim.schedule={settings.schedule}: it goes with "
                "optim.schedule=step"
            )


def rate_factor(settings: UpdateSettings, step: int, steps: int) -> float:
    """The factor of a stage's learning rates.

    ``constant``: 1; ``polynomial``: ``(1 - t) ** power`` (Chen et al., "DeepLab", 2017: power 0.9);
    ``cosine``: ``(1 + cos(pi t)) / 2`` (Loshchilov and Hutter, "SGDR", 2017); ``step``: ``decay`` to the
    power of the number of whole ``decay_steps`` since the warm-up. Here t runs from 0, after the
    warm-up, to 1 at the stage's end. In the warm-up's w steps: 1/w, 2/w, ..., 1 (Goyal et al. 2017).

    Args:
        settings: schedule, power, decay and warm-up.
        step: of the stage, from 0 on.
        steps: of the stage in all.
    """
    warmup = min(settings.warmup_steps, steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "step":
        return settings.decay ** ((step - warmup) // settings.decay_steps)
    t = (step - warmup) / (steps - warmup)
    if settings.schedule == "polynomial":
        return float((1 - t) ** settings.power)
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    return 1.0
