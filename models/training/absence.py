"""Modalities left out of training steps and of evaluations: which, and where that cannot be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.training.errors import UsageError
from models.training.fusions import WithFusion
from models.training.settings import RunSettings, require


def require_drop(share: float, modalities: Sequence[str]) -> None:
    """Check a settings dataclass's ``drop_modality``.

    Raises:
        ValueError: it is no probability, or there is a single modality.
    """
    require(0 <= share <= 1, f"drop_modality must be from 0 to 1, got {share}")
    require(share == 0 or len(modalities) > 1, f"drop_modality must be 0 with a single modality, got {share}")


def dropped_modality(share: float, count: int, seed: int, step: int) -> tuple[int, ...]:
    """The modality that is absent from a training step; none in most.

    It follows from the run's seed and the step alone: a resumed run, and every process, drops the same.

    Args:
        share: of the steps that drop one, ``data.drop_modality``.
        count: of the modalities.
        seed, step: the run's.
    """
    # Four numbers, as no other stream of the seed has: numpy pads shorter ones with zeros.
    rng = np.random.default_rng((seed, step, 0, 1))
    return (int(rng.integers(count)),) if share > 0 and rng.random() < share else ()


def remaining(names: Sequence[str], without: Sequence[str]) -> tuple[int, ...] | None:
    """The numbers of the names that are not left out; None for all."""
    return tuple(m for m, name in enumerate(names) if name not in without) if without else None


def check_subset(recipe: WithFusion, setting: str) -> None:
    """Refuse a setting that leaves modalities out where the fusion needs all of them.

    Raises:
        UsageError: it does; the message names the setting.
    """
    try:
        recipe.check_subset()
    except ValueError as error:
        raise UsageError(f"{setting}: {error}") from None


def check_without(recipe: WithFusion, names: Sequence[str], without: Sequence[str]) -> None:
    """Refuse an ``eval.without`` that leaves no modality, or a fusion that needs all.

    Raises:
        UsageError: it does, or is none of the names.
    """
    if not without:
        return
    if not set(without) < set(names):
        raise UsageError(f"eval.without must be some of {','.join(names)}, not all, got {','.join(without)}")
    check_subset(recipe, "eval.without")


def check_changing(recipe: WithFusion, run: RunSettings, setting: str) -> None:
    """Refuse a setting by which modalities come and go from step to step, where that cannot work.

    Raises:
        UsageError: the fusion needs all, or steps are recorded.
    """
    check_subset(recipe, setting)
    if run.cuda_graphs:
        raise UsageError(f"{setting} does not go with run.cuda_graphs=true, which records one computation")
