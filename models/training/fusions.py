"""Fusions in settings: their check, and those of settings that were written before fusions had options.

Until November 2026 a recipe had ``model.threshold``, ``model.region`` and ``model.criterion``, and a
segmentation recipe a group ``variant`` of seven switches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from models.networks.fusion import Fusion
from models.training.errors import UsageError

_RULE = ("threshold", "region", "criterion")
_CHOICES = {"portion": "first", "smallest": "smallest", "random": "random"}


class WithFusion:
    """Mixin of recipes with a field ``fusion``: reads what earlier versions wrote and were told."""

    fusion: Fusion

    def check_subset(self) -> None:
        """Refuse to run with some of the modalities.

        Raises:
            ValueError: the network needs all of them.
        """
        self.fusion.check_subset()

    # Paths as they were called; each still works.
    renamed: ClassVar[Mapping[str, str]] = {f"model.{name}": f"fusion.{name}" for name in _RULE}

    @classmethod
    def from_old(cls, plain: Mapping[str, Any]) -> Mapping[str, Any]:
        """Translate plain settings of versions without fusions.

        Raises:
            UsageError: as ``upgrade``.
        """
        return upgrade(plain)


def check_fusion(fusion: Fusion, num_modalities: int, stages: int, read: Sequence[int]) -> None:
    """Refuse a fusion that contradicts itself, the number of modalities, or the network's stages.

    Args:
        stages: of the encoder.
        read: those whose features the decoder reads.

    Raises:
        UsageError: it does; the message names the option by its path.
    """
    try:
        fusion.check(num_modalities)
        fusion.check_stages(stages)
        fusion.check_read(read)
    except ValueError as error:
        path = "" if str(error).startswith("fusion=") else "fusion."
        raise UsageError(f"{path}{error}") from None


def refused(error: Exception) -> UsageError:
    """The error of a network's builder as one of the settings, which names the field by its path."""
    path = "" if str(error).startswith(("fusion", "data.")) else "model."
    return UsageError(f"{path}{error}")


def upgrade(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Translate plain settings; those that name their fusion are returned as they are.

    Raises:
        UsageError: they combine switches that no fusion combines.
    """
    if "fusion" in plain or "model" not in plain:
        return plain
    model = dict(plain["model"])
    rule = {name: model.pop(name) for name in _RULE if name in model}
    rest = {name: value for name, value in plain.items() if name != "variant"}
    return {**rest, "model": model, "fusion": _fusion(rule, plain.get("variant", {}))}


def _fusion(rule: dict[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    exchange = variant.get("exchange", "threshold")
    penalty = variant.get("penalty", "auto")
    common = {
        "at": variant.get("exchange_at", "every"),
        "convolutions": variant.get("convolutions", "shared"),
        # ``auto`` was each modality's own share where a threshold decides, and nothing elsewhere.
        "penalty": ("own" if exchange in ("threshold", "discard") else "none")
        if penalty == "auto"
        else penalty,
    }
    # An exchange penalizes nothing at threshold 0; one that did has the name of no fusion.
    if exchange == "threshold" and rule.get("threshold") == 0 and penalty in ("own", "all"):
        exchange = "none"
    if variant.get("fusion", "ensemble") == "concat":
        if exchange == "none" and penalty in ("auto", "none"):
            return {"name": "late_concat", **rule, **common, "threshold": 0.0, "penalty": "none"}
        if exchange == "threshold":
            return {"name": "late_concat", **rule, **common}
        raise UsageError(
            f"the settings variant.fusion=concat and variant.exchange={exchange} were made by an earlier "
            "version; no fusion combines them any more"
        )
    if exchange in _CHOICES:
        portion = {name: variant[name] for name in ("portion",) if name in variant}
        region = {name: rule[name] for name in ("region",) if name in rule}
        return {"name": "fixed_portion", "choice": _CHOICES[exchange], **portion, **region, **common}
    if exchange == "none":
        return {"name": "none", "norms": variant.get("norms", "private"), **common}
    if exchange == "threshold":
        return {"name": "exchange", **rule, **common}
    return {"name": exchange, **(rule if exchange == "discard" else {}), **common}
