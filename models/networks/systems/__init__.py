"""Whole networks: the published systems of the comparison tables, and those of translation."""

from models.networks.systems.base import SYSTEMS, Logits, System, make_system, register_system

__all__ = ["SYSTEMS", "Logits", "System", "make_system", "register_system"]
