"""A recipe's parts: network, weights, data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from models.data import (
    LAYOUTS,
    DataError,
    Layout,
    Loader,
    Reader,
    SegmentationSet,
    TrainTransform,
    configured,
    find_layout,
    train_loader,
)
from models.data.images import UNKNOWN_SCALE
from models.networks.encoders import input_normalization
from models.networks.fusion import exchange_points
from models.networks.fusion.base import STAGES
from models.networks.segmentor import SegmentationNetwork
from models.segmentation import networks
from models.segmentation.settings import OF_LAYOUT, DataSettings, ModelSettings, SegmentationRecipe
from models.training import config, distributed
from models.training.absence import check_subset, check_without, remaining
from models.training.errors import UsageError, data_root
from models.training.fusions import check_fusion, refused

# Settings of ``model`` that say how a network starts, whichever it is.
_OF_EVERY = ("network", "weights", "weights_input", "start", "experts")


def branch_names(recipe: SegmentationRecipe) -> tuple[str, ...]:
    """The network's branches: one for each modality, or ``fused`` where the fusion leaves one stream."""
    modalities = recipe.data.modalities
    count = networks.num_branches(recipe.model.network, recipe.fusion, len(modalities))
    return modalities if count == len(modalities) else ("fused",)


def output_names(recipe: SegmentationRecipe, present: Sequence[int] | None = None) -> tuple[str, ...]:
    """The network's outputs: its branches, and the ensemble.

    Args:
        present: the modalities that it runs with; None: all.
    """
    names = branch_names(recipe)
    return (*(names if present is None else [names[m] for m in present]), "ensemble")


def evaluated(recipe: SegmentationRecipe) -> tuple[int, ...] | None:
    """The modalities to evaluate with: None for all, or those that ``eval.without`` leaves."""
    return remaining(recipe.data.modalities, recipe.eval.without)


def check_network(recipe: SegmentationRecipe) -> None:
    """Refuse a network that there is not.

    Raises:
        UsageError: the nearest name is suggested.
    """
    try:
        networks.check_name(recipe.model.network)
    except ValueError as error:
        raise refused(error) from None


def build_network(recipe: SegmentationRecipe) -> SegmentationNetwork:
    """The recipe's network with random weights.

    Raises:
        UsageError: a setting that the network refuses, or settings that contradict each other; a library that
            the encoder needs is missing.
    """
    model, auxiliary = recipe.model, recipe.loss.auxiliary
    modalities = recipe.data.modalities
    check_network(recipe)
    if not networks.is_system(model.network):
        read = networks.DECODERS[model.network].reads(bool(auxiliary))
        check_fusion(recipe.fusion, len(modalities), STAGES, read)
    try:
        settings = _taken(model)
        net = networks.build(
            model.network, recipe.data.num_classes, modalities, recipe.fusion, settings, bool(auxiliary)
        )
    except (ValueError, ImportError) as error:
        raise refused(error) from None
    if isinstance(auxiliary, tuple) and len(auxiliary) != net.num_sides:
        raise UsageError(
            f"loss.auxiliary must be one number for each of the {net.num_sides} auxiliary heads of "
            f"model.network={model.network}, or one for all, got {len(auxiliary)}"
        )
    if recipe.loss.auxiliary_size != "labels" and not net.num_sides:
        raise UsageError(
            f"loss.auxiliary_size must be labels with model.network={model.network}, which has no auxiliary "
            f"heads, got {recipe.loss.auxiliary_size}"
        )
    if model.initial_scale is not None:
        # Also where nothing is exchanged, so that the networks are comparable.
        for point in exchange_points(net):
            nn.init.constant_(point.weight, model.initial_scale)
    return net


def with_normalization(recipe: SegmentationRecipe) -> SegmentationRecipe:
    """The recipe with the normalization that its encoder's weights expect, where ``data`` gives none.

    Raises:
        UsageError: the encoder is unknown to its library, or the library is missing.
    """
    try:
        expected = input_normalization(recipe.model.encoder)
    except (ValueError, ImportError) as error:
        raise UsageError(f"model.{error}") from None
    if expected is None:
        return recipe
    mean, std = recipe.data.mean or expected.mean, recipe.data.std or expected.std
    return replace(recipe, data=replace(recipe.data, mean=mean, std=std))


def _taken(model: ModelSettings) -> dict[str, Any]:
    """The settings that the network takes, by name.

    Raises:
        ValueError: another one has a value that is not its default; the message begins with its name.
    """
    taken = networks.taken(model.network)
    if unknown := set(taken) - {field.name for field in fields(model)}:
        raise ValueError(
            f"network={model.network} has an option {sorted(unknown)[0]}, which is no setting of model"
        )
    for field in fields(model):
        value = getattr(model, field.name)
        # Statistics of weights are the default, and a system that cannot keep to them has to be told so.
        rest = False if field.name == "frozen_statistics" else field.default
        if field.name not in (*taken, *_OF_EVERY) and value != rest:
            raise ValueError(
                f"{field.name} must be {config.show(rest)} with model.network={model.network}, "
                f"got {config.show(value)}"
            )
    return {name: getattr(model, name) for name in taken}


def open_split(settings: DataSettings, split: str, without: tuple[str, ...] = ()) -> SegmentationSet:
    """The images of ``train`` or ``val``.

    Args:
        without: modalities that are left out, ``eval.without``.

    Raises:
        UsageError: ``data.root`` is not set or does not exist, or a setting is refused.
        DataError: the data set is not whole.
    """
    root = data_root(settings.root)
    try:
        values, _ = precedence(settings, find_layout(root, settings.layout))
        return SegmentationSet(
            root,
            split,
            modalities=settings.modalities,
            num_classes=settings.num_classes,
            layout=settings.layout,
            lists=settings.lists,
            ignore_index=settings.ignore_index,
            merge=settings.merge,
            hha_floor=settings.hha_floor,
            missing=settings.missing,
            without=without,
            **settings.normalization._asdict(),
            depth_mean=settings.depth_mean,
            depth_std=settings.depth_std,
            **values,
        )
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(f"data: {error}") from None


def open_validation(recipe: SegmentationRecipe) -> SegmentationSet:
    """The images to evaluate on, without the modalities of ``eval.without``.

    Raises:
        UsageError, DataError: as ``open_split``; a modality is absent, and the fusion needs all of them.
    """
    settings, without = recipe.data, recipe.eval.without
    check_without(recipe, settings.modalities, without)
    dataset = open_split(settings, "val", without)
    if dataset.absences.filled:
        check_subset(recipe, "data.missing=fill")
    return dataset


def precedence(settings: DataSettings, layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Find what settings change in a layout.

    The command line goes before ``layout.json``, that before the recipe, and it before a known layout.

    Returns:
        By field the values that take the place of the layout's; and in words, which of two won.
    """
    values, notes = {}, []
    for name in OF_LAYOUT:
        value, theirs = getattr(settings, name), getattr(layout, name)
        if name == "camera" and theirs is not None:
            theirs = tuple(theirs[:4])
        if value is None or value == ():
            continue
        given, stated = name in settings.given, name in layout.stated
        if theirs == UNKNOWN_SCALE and not given:
            continue  # a recipe knows one data set's scale, and nobody has said that this is it
        if given or not stated:
            values[name] = value
        if value == theirs:
            continue
        ours, others = config.show(value), config.show(theirs)
        if stated and not given:
            notes.append(f"data.{name}: {others} of layout.json goes before the recipe's {ours}")
        elif stated or not given:
            mine, whose = (
                ("the command line", "layout.json") if given else ("the recipe", f"the layout {layout.name}")
            )
            notes.append(f"data.{name}: {ours} of {mine} goes before {others} of {whose}")
    return values, notes


def build_reader(settings: DataSettings, layout: Layout | None = None) -> Reader:
    """Make the reader of a scene's files, which returns the network's inputs.

    Args:
        settings: what they say of the files, as ``precedence`` has it.
        layout: None: the one that ``data.layout`` names or ``data.root`` tells.

    Raises:
        UsageError: neither is set; a setting is refused.
        DataError: as ``find_layout``.
    """
    try:
        if layout is None and settings.layout in LAYOUTS:
            layout = LAYOUTS[settings.layout]
        layout = layout or find_layout(data_root(settings.root), settings.layout)
        values, _ = precedence(settings, layout)
        known = configured(layout, **values, hha_floor=settings.hha_floor)
        return Reader(
            known,
            settings.modalities,
            *settings.normalization,
            depth_mean=settings.depth_mean,
            depth_std=settings.depth_std,
        )
    except (DataError, UsageError):
        raise
    except ValueError as error:
        raise UsageError(f"data: {error}") from None


def build_train_loader(recipe: SegmentationRecipe) -> Loader:
    """Shuffled, augmented training batches.

    Raises:
        UsageError, DataError: as ``open_split``; fewer images than a batch.
    """
    settings = recipe.data
    transform = TrainTransform(
        settings.crop, settings.shorter_side, settings.scale, settings.ignore_index, settings.scale_of
    )
    dataset = open_split(settings, "train")
    dataset.surveyed = True  # the task has surveyed it before training starts
    try:
        return train_loader(
            dataset,
            transform,
            batch_size=settings.batch_size,
            seed=recipe.run.seed,
            workers=recipe.run.workers,
            part=(distributed.rank(), distributed.world_size()),
        )
    except ValueError as error:
        raise UsageError(f"data.{error}") from None
