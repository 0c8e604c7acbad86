"""Whole networks: the published systems of the comparison tables, and those of translation."""

from models.networks.systems.acnet import ACNet
from models.networks.systems.adapnet import AdapNetPlusPlus
from models.networks.systems.base import SYSTEMS, Logits, System, make_system, register_system
from models.networks.systems.fcn32s import FCN32s
from models.networks.systems.fusenet import FuseNet
from models.networks.systems.gnn3d import GNN3D
from models.networks.systems.rdfnet import RDFNet
from models.networks.systems.ssma import SSMA

__all__ = [
    "GNN3D",
    "SSMA",
    "SYSTEMS",
    "ACNet",
    "AdapNetPlusPlus",
    "FCN32s",
    "FuseNet",
    "Logits",
    "RDFNet",
    "System",
    "make_system",
    "register_system",
]
