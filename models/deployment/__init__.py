"""Trained networks outside of this toolkit: without what they never use, in formats that others run."""

from models.deployment.pruning import Pruned, prune

__all__ = ["Pruned", "prune"]
