"""A recipe's parts: network, weights, data."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from cen_ext import ExchangeBatchNorm2d
from models.data import DataError, Loader, NyuCen, TrainTransform, train_loader
from models.encoders import load_imagenet
from models.encoders.weights import some
from models.segmentation.refinenet import RefineNet, refinenet
from models.segmentation.settings import DataSettings, SegmentationRecipe
from models.training.errors import UsageError, existing


def output_names(recipe: SegmentationRecipe) -> tuple[str, ...]:
    """The network's outputs: a branch a modality, and the ensemble."""
    return (*recipe.data.modalities, "ensemble")


def build_network(recipe: SegmentationRecipe) -> RefineNet:
    """The recipe's network with random weights.

    Raises:
        UsageError: a setting that the network refuses.
    """
    model = recipe.model
    try:
        net = refinenet(
            model.encoder,
            recipe.data.num_classes,
            len(recipe.data.modalities),
            threshold=model.threshold,
            region=model.region,
            criterion=model.criterion,
            dropout=model.dropout,
            width=model.width,
            frozen_statistics=model.frozen_statistics,
            decoder_init=model.decoder_init,
        )
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
    if model.initial_scale is not None:
        for layer in net.modules():
            # Single-modality networks as well, so that they are comparable.
            if isinstance(layer, ExchangeBatchNorm2d) and layer.threshold > 0:
                nn.init.constant_(layer.weight, model.initial_scale)
    return net


def load_weights(net: RefineNet, recipe: SegmentationRecipe) -> list[str]:
    """Load ``model.weights`` into the encoder; what did not match, in words.

    Raises:
        UsageError: there is no such file, it does not fit, or none is given though statistics are frozen.
    """
    path = recipe.model.weights
    if path is None:
        if recipe.model.frozen_statistics:
            raise UsageError(
                "model.weights must be set to a file of the encoder's ImageNet weights: with "
                "model.frozen_statistics=true the norms would keep meaningless statistics. "
                "To train from random weights set model.frozen_statistics=false"
            )
        return []
    try:
        report = load_imagenet(net.encoder, existing(path, "model.weights"))
    except ValueError as error:
        raise UsageError(f"model.weights: {error}") from None
    notes = []
    if report.missing:
        what = f"{len(report.missing)} of the encoder's entries, which start as they were made"
        notes.append(f"{path} lacks {what}: {some(report.missing)}")
    if report.unexpected:
        notes.append(f"{path} holds entries that the encoder has not: {some(report.unexpected)}")
    return notes


def open_split(settings: DataSettings, split: str) -> NyuCen:
    """The images of ``train`` or ``val``.

    Raises:
        UsageError: ``data.root`` is not set or does not exist, or a setting is refused.
        DataError: the data set is not whole.
    """
    root = data_root(settings)
    try:
        return NyuCen(
            root,
            split,
            modalities=settings.modalities,
            num_classes=settings.num_classes,
            depth_scale=settings.depth_scale,
            label_offset=settings.label_offset,
            ignore_index=settings.ignore_index,
        )
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(f"data: {error}") from None


def data_root(settings: DataSettings) -> Path:
    """The folder of the data.

    Raises:
        UsageError: it is not set, or does not exist.
    """
    if settings.root is None:
        raise UsageError("data.root must be set to the folder of the data set: data.root=FOLDER")
    return existing(settings.root, "data.root")


def build_train_loader(recipe: SegmentationRecipe) -> Loader:
    """Shuffled, augmented training batches.

    Raises:
        UsageError, DataError: as ``open_split``; fewer images than a batch.
    """
    settings = recipe.data
    transform = TrainTransform(settings.crop, settings.shorter_side, settings.scale, settings.ignore_index)
    dataset = open_split(settings, "train")
    try:
        return train_loader(
            dataset,
            transform,
            batch_size=settings.batch_size,
            seed=recipe.run.seed,
            workers=recipe.run.workers,
        )
    except ValueError as error:
        raise UsageError(f"data.{error}") from None
