"""The import command: a network that its authors released becomes a file of this project.

What CEN's released code feeds its networks, which is what the layout ``nyu_cen`` gives: colors red first,
``(v / 255 - mean) / std`` by ImageNet's mean and standard deviation; depth as stored / 5000, that is in
meters, not normalized, tiled to three channels. (For SUN RGB-D that code stretches the depth of every image
to 0 ... 255 instead, which no layout here does.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.data import LAYOUTS
from models.data.classes import class_names
from models.networks.encoders.resnet import RESNETS, Bottleneck
from models.networks.encoders.weights import read_state_dict
from models.networks.fusion import AsymFusion
from models.networks.released import load_released
from models.segmentation import networks
from models.segmentation.build import build_network, build_reader
from models.segmentation.load import describe
from models.training import checkpoint, config, registry
from models.training.errors import UsageError, existing
from models.training.importing import check_settings


def import_released(released: Path, name: str, overrides: Sequence[str], output: Path) -> None:
    """Write a released network as ``checkpoint.save_network`` does.

    Args:
        released: the authors' file, as ``load_released`` takes it.
        name: the recipe of the network: with the exchange, or AsymFusion.
        overrides: ``field=value`` assignments that make the recipe fit it.
        output: the file to write.

    Raises:
        UsageError: no such file or recipe; the network is not the recipe's, and the message says which
            fields to set.
        DataError: ``data.root`` is given and tells no layout.
    """
    output = checkpoint.network_file(output)
    recipe = config.override(registry.find(name), overrides)
    try:
        state = read_state_dict(existing(released, "RELEASED"))
        # Others tell by themselves what does not fit.
        if not networks.is_system(recipe.model.network) and recipe.model.network != "segformer":
            expected: dict[str, Any] = {"model.network": "refinenet"}
            # AsymFusion's network has the same tensors; the recipe alone tells the two apart.
            if not isinstance(recipe.fusion, AsymFusion):
                expected |= {"fusion": "exchange", "fusion.region": "all", "fusion.criterion": "abs"}
            check_settings(released, recipe, expected | released_settings(state), "data.modalities")
        net = load_released(build_network(recipe), state)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"RELEASED: {error}") from None
    data = recipe.data
    told = data.root is not None or data.layout is not None
    reader = build_reader(data, None if told else LAYOUTS["nyu_cen"])
    classes = class_names(data.root, data.num_classes, () if data.merge else reader.layout.classes)
    contents = {**checkpoint.header(name, recipe), **describe(reader, classes)}
    checkpoint.save_network(output, {**contents, "task": {"net": net.state_dict()}})
    parameters = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    print(
        f"{output}: {recipe.model.network} on {recipe.model.encoder}, {' + '.join(data.modalities)}, "
        f"{data.num_classes} classes, {parameters:.2f} M parameters"
    )


def released_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings that a released RefineNet was made with, by their paths, as far as its tensors tell them.

    ``data.modalities`` is their number only. Fields that depend on missing tensors are left out.
    """
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.module.weight" in state
    encoders = [name for name, (block, counts) in RESNETS.items() if counts == blocks]
    encoders = [name for name in encoders if (RESNETS[name][0] is Bottleneck) == bottleneck]
    modalities = sum(re.fullmatch(r"bn1\.bn_\d+\.weight", key) is not None for key in state)
    found: dict[str, Any] = {}
    if encoders and modalities:
        found = {"model.encoder": encoders[0], "data.modalities": modalities}
    for field, key in (
        ("data.num_classes", "clf_conv.module.weight"),
        ("model.width", "p_ims1d2_outl2_dimred.module.weight"),
    ):
        if key in state:
            found[field] = len(state[key])
    return found
