"""A recipe's parts: networks, data."""

from __future__ import annotations

from collections.abc import Sequence

from cen_ext import ExchangeInstanceNorm2d
from models.data import DataError, Jitter, Loader, Square, TranslationSet, Whole, collate_translation
from models.data.loading import SampleSet, eval_loader, train_loader
from models.networks.systems.patchgan import LEAST, PatchGAN, patchgan
from models.networks.systems.unet import UNet, unet
from models.training import distributed
from models.training.absence import remaining
from models.training.errors import UsageError, data_root
from models.training.fusions import check_fusion, refused
from models.translation.settings import DataSettings, TranslationRecipe

_CHANNELS = 3  # per input; a single one is tiled


def output_names(recipe: TranslationRecipe, present: Sequence[int] | None = None) -> tuple[str, ...]:
    """The generator's outputs: one branch per domain, and the ensemble.

    Args:
        present: the domains that it runs with; None: all.
    """
    names = recipe.data.domains
    return (*(names if present is None else [names[m] for m in present]), "ensemble")


def evaluated(recipe: TranslationRecipe) -> tuple[int, ...] | None:
    """The domains to evaluate with: None for all, or those that ``eval.without`` leaves."""
    return remaining(recipe.data.domains, recipe.eval.without)


def build_generator(recipe: TranslationRecipe, channels: int = 3) -> UNet:
    """The recipe's generator with random weights.

    Args:
        recipe: the settings.
        channels: of the target's domain.

    Raises:
        UsageError: a setting that the network refuses; a crop that it cannot halve often enough.
    """
    model, crop = recipe.model, recipe.data.crop
    levels = model.size.bit_length() - 1
    check_fusion(recipe.fusion, len(recipe.data.domains), levels, range(1, levels + 1))
    try:
        net = unet(
            _CHANNELS,
            channels,
            len(recipe.data.domains),
            size=model.size,
            base_width=model.base_width,
            fusion=recipe.fusion,
            dropout=model.dropout,
            decoder_norms=model.decoder_norms,
        )
    except ValueError as error:
        raise refused(error) from None
    if crop % model.size or crop < LEAST:
        raise UsageError(
            f"data.crop must be a multiple of model.size={model.size}, and at least {LEAST} for the "
            f"discriminator, got {crop}"
        )
    if model.initial_scale is not None:
        for module in net.encoder.modules():
            # Also where nothing is exchanged, so that the networks are comparable.
            if isinstance(module, ExchangeInstanceNorm2d):
                module.weight.data.mul_(model.initial_scale)
    return net


def build_discriminator(recipe: TranslationRecipe, channels: int = 3) -> PatchGAN:
    """The recipe's discriminator with random weights, for targets of so many channels.

    Raises:
        UsageError: a setting that the network refuses.
    """
    if recipe.model.discriminator_width < 1:
        raise UsageError(
            f"model.discriminator_width must be at least 1, got {recipe.model.discriminator_width}"
        )
    return patchgan(_CHANNELS + channels, recipe.model.discriminator_width)


def open_split(settings: DataSettings, split: str) -> TranslationSet:
    """The views of ``train`` or ``val``.

    Raises:
        UsageError: ``data.root`` is not set or does not exist, or a setting is refused.
        DataError: the data set is not whole.
    """
    root = data_root(settings.root)
    try:
        return TranslationSet(
            root, split, domains=settings.domains, target=settings.target, lists=settings.lists
        )
    except DataError:
        raise
    except ValueError as error:
        raise UsageError(f"data: {error}") from None


def build_train_loader(recipe: TranslationRecipe) -> Loader:
    """Shuffled, augmented training batches.

    Raises:
        UsageError, DataError: as ``open_split``; fewer views than a batch, which the processes must divide.
    """
    settings = recipe.data
    dataset = open_split(settings, "train")
    try:
        return train_loader(
            dataset,
            Jitter(settings.resize, settings.crop, settings.mirror),
            batch_size=settings.batch_size,
            seed=recipe.run.seed,
            workers=recipe.run.workers,
            collate=collate_translation,
            part=(distributed.rank(), distributed.world_size()),
        )
    except ValueError as error:
        raise UsageError(f"data.{error}") from None


def eval_transform(recipe: TranslationRecipe) -> Square | Whole:
    """The part of a view that ``eval.size`` has evaluated and translated."""
    return Square(recipe.data.crop) if recipe.eval.size == "square" else Whole()


def build_eval_loader(dataset: SampleSet, recipe: TranslationRecipe) -> Loader:
    """A data set's views as they are evaluated, in order."""
    return eval_loader(
        dataset,
        recipe.eval.batch_size,
        recipe.run.workers,
        transform=eval_transform(recipe),
        collate=collate_translation,
    )
