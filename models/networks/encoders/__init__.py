"""Encoders shared by the networks, and their ImageNet weights. ``base`` has the contract."""

from models.networks.encoders.base import (
    Backbone,
    Encoder,
    Normalization,
    encoders,
    input_normalization,
    make_encoder,
    register_encoder,
)
from models.networks.encoders.mit import MITS, MixTransformer
from models.networks.encoders.nbt1d import NBt1DResNet
from models.networks.encoders.resnet import RESNETS, ExchangeResNet
from models.networks.encoders.timm import TimmEncoder
from models.networks.encoders.weights import LoadReport, load_imagenet
from models.networks.encoders.xception import AlignedXception

__all__ = [
    "MITS",
    "RESNETS",
    "AlignedXception",
    "Backbone",
    "Encoder",
    "ExchangeResNet",
    "LoadReport",
    "MixTransformer",
    "NBt1DResNet",
    "Normalization",
    "TimmEncoder",
    "encoders",
    "input_normalization",
    "load_imagenet",
    "make_encoder",
    "register_encoder",
]
