"""Encoders shared by the networks, their ImageNet weights, and the variants that the paper compares."""

from models.networks.encoders.norms import ExchangePoint, Norms
from models.networks.encoders.private import PrivateConv2d, make_convolutions_private
from models.networks.encoders.resnet import RESNETS, ExchangeResNet
from models.networks.encoders.variants import Variant
from models.networks.encoders.weights import LoadReport, load_imagenet

__all__ = [
    "RESNETS",
    "ExchangePoint",
    "ExchangeResNet",
    "LoadReport",
    "Norms",
    "PrivateConv2d",
    "Variant",
    "load_imagenet",
    "make_convolutions_private",
]
