"""Encoders shared by the networks, and their ImageNet weights."""

from models.encoders.resnet import RESNETS, ExchangeResNet
from models.encoders.weights import LoadReport, load_imagenet

__all__ = ["RESNETS", "ExchangeResNet", "LoadReport", "load_imagenet"]
