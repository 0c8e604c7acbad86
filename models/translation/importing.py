"""The import command: a U-Net that the paper's authors released becomes a file of this project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.data.translation import TaskonomyReader
from models.networks.encoders.weights import read_state_dict
from models.networks.released import load_released
from models.training import checkpoint, config, registry
from models.training.errors import UsageError, existing
from models.training.importing import check_settings
from models.translation.build import build_generator
from models.translation.load import describe


def import_released(released: Path, name: str, overrides: Sequence[str], output: Path) -> None:
    """Write a released generator as ``checkpoint.save_network`` does.

    Args:
        released: the authors' file, as ``load_released`` takes it.
        name: the recipe of the network.
        overrides: ``field=value`` assignments that make the recipe fit it.
        output: the file to write.

    Raises:
        UsageError: no such file or recipe; the network is not the recipe's, and the message says which
            fields to set.
    """
    output = checkpoint.network_file(output)
    recipe = config.override(registry.find(name), overrides)
    try:
        state = read_state_dict(existing(released, "RELEASED"))
        expected = {
            "fusion": "exchange",
            "fusion.region": "all",
            "fusion.criterion": "abs",
            "model.decoder_norms": "private",
        }
        check_settings(released, recipe, expected | released_settings(state), "data.domains")
        net = load_released(build_generator(recipe), state)
        described = describe(TaskonomyReader((*recipe.data.domains, recipe.data.target)))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"RELEASED: {error}") from None
    contents = {**checkpoint.header(name, recipe), **described}
    checkpoint.save_network(output, {**contents, "task": {"net": net.state_dict()}})
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    domains = " + ".join(recipe.data.domains)
    print(f"{output}: U-Net, {domains} to {recipe.data.target}, {parameters:.2f} M parameters")


def released_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings that a released U-Net was made with, by their paths, as far as its tensors tell them.

    ``data.domains`` is their number only.
    """
    first = "conv1.conv.module.weight"
    levels = sum(re.fullmatch(r"conv\d+\.conv\.module\.weight", key) is not None for key in state)
    domains = sum(re.fullmatch(r"conv2\.insnorm_conv\.insnorm_\d+\.weight", key) is not None for key in state)
    if first not in state or not domains:
        return {}
    return {"model.base_width": len(state[first]), "model.size": 1 << levels, "data.domains": domains}
