"""Encoders shared by the networks, and their ImageNet weights. ``base`` has the contract."""

from models.networks.encoders.base import Encoder, encoders, make_encoder, register_encoder
from models.networks.encoders.resnet import RESNETS, ExchangeResNet
from models.networks.encoders.weights import LoadReport, load_imagenet

__all__ = [
    "RESNETS",
    "Encoder",
    "ExchangeResNet",
    "LoadReport",
    "encoders",
    "load_imagenet",
    "make_encoder",
    "register_encoder",
]
