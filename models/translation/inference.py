"""A generator's outputs, computed in the way that the paper evaluates it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cen_ext import ExchangeInstanceNorm2d
from models.networks.systems.unet import UNet
from models.training.precision import at_least_float32, autocast
from models.training.rng import preserved_rng
from models.translation.settings import TranslationRecipe
from models.translation.windows import in_windows


@contextmanager
def translating(net: UNet, dropout: bool) -> Iterator[None]:
    """Let a generator normalize by each image's own statistics, and drop out if ``dropout``.

    That is training mode, in which the paper evaluates, but for running statistics: they stay as they are.
    Afterwards the network is in the mode that it was in, and random numbers are drawn as if nothing had been.
    """
    training = net.training
    norms = [module for module in net.modules() if isinstance(module, ExchangeInstanceNorm2d)]
    statistics = [(norm.running_mean, norm.running_var) for norm in norms]
    net.eval()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.train(dropout)
    for norm in norms:
        norm.running_mean = norm.running_var = None  # none to use: those of the image
    try:
        with preserved_rng():
            yield
    finally:
        for norm, (mean, variance) in zip(norms, statistics, strict=True):
            norm.running_mean, norm.running_var = mean, variance
        net.train(training)


@torch.no_grad()
def translate(net: UNet, images: Tensor, name: str, recipe: TranslationRecipe) -> list[Tensor]:
    """Images ``[N, C', H, W]`` in [-1, 1] of every branch and, last, of the ensemble; float32.

    With ``eval.size=full`` H and W may be any.

    Args:
        net: in the context ``translating``.
        images: ``[M*N, C, H, W]`` stacked domain-major, on the network's device. With N above 1, what dropout
            draws for a view depends on those before it: see ``translate_views``.
        name: of the view; dropout draws the same for the same name, whatever was translated before.
        recipe: ``run.precision`` tells what the network computes in, ``run.seed`` seeds dropout.
    """

    def run(images: Tensor) -> list[Tensor]:
        with autocast(recipe.run.precision, images.device):
            output = at_least_float32(net(images))
        return [*output.branches, output.ensemble]

    torch.manual_seed(zlib.crc32(f"{recipe.run.seed} {name}".encode()))
    if recipe.eval.size == "square":
        return run(images)
    return in_windows(run, images, recipe.model.size, recipe.eval.window or recipe.data.crop)


def translate_views(
    net: UNet, images: Tensor, names: Sequence[str], recipe: TranslationRecipe
) -> list[Tensor]:
    """Translate a batch of N views, each with its name, as ``translate`` does.

    Where dropout acts, one view after the other: each is then what it is alone, whatever else is in the
    batch. Without it the views go through the network together.
    """
    if not any(isinstance(each, nn.Dropout) and each.training and each.p > 0 for each in net.modules()):
        return translate(net, images, names[0], recipe)
    count = len(names)
    views = [translate(net, images[i::count], name, recipe) for i, name in enumerate(names)]
    return [torch.cat(images) for images in zip(*views, strict=True)]
