"""The names of the entries in the checkpoints that the paper's authors released for RefineNet.

The released networks keep one batch norm per modality (``bn1.bn_0.weight``, ``bn1.bn_1.weight``) where ours
has one ``[M, C]`` entry, wrap every shared convolution (``conv1.module.weight``), and name the decoder as the
table below says. Levels and units count from 1 there and from 0 here.

    ours                                        released
    encoder.<conv>.weight                       <conv>.module.weight
    encoder.<norm>.<entry>  [M, C]              <norm>.bn_<m>.<entry>  [C], one per modality
    encoder.<norm>.num_batches_tracked          <norm>.bn_<m>.num_batches_tracked, equal for all m
    alpha                                       alpha
    decoder.<conv>.{weight,bias}                <conv>.module.{weight,bias}, by the table
"""

from __future__ import annotations

import re

from cen_ext.modules import ExchangeNorm
from models.networks.decoders.refinenet import RefineNet
from models.networks.fusion.base import DECODER
from models.networks.segmentor import SegmentationNetwork

_DECODER = {
    "reduce": "p_ims1d2_outl{level}_dimred",
    "adapt.#.conv1": "adapt_stage{level}_b.0.{unit}_conv",
    "adapt.#.conv2": "adapt_stage{level}_b.0.{unit}_conv_relu_varout_dimred",
    "join": "adapt_stage{level}_b2_joint_varout_dimred",
    "pool.convs.#": "mflow_conv_g{level}_pool.0.{unit}_outvar_dimred",
    "refine.#.conv1": "mflow_conv_g{level}_b.0.{unit}_conv",
    "refine.#.conv2": "mflow_conv_g{level}_b.0.{unit}_conv_relu_varout_dimred",
    "project": "mflow_conv_g{level}_b3_joint_varout_dimred",
}


def released_names(net: SegmentationNetwork) -> dict[str, list[str]]:
    """The released network's names for every entry of net's state dict; several for a private entry.

    Raises:
        ValueError: net is of another kind than the released networks.
    """
    fusion = net.fusion
    private = any(fusion.private_convolutions(stage) for stage in range(DECODER + 1))
    norms = {len(module.weight) for module in net.modules() if isinstance(module, ExchangeNorm)}
    like_released = not private and norms == {net.num_modalities} and net.head is None
    if not isinstance(net, RefineNet) or not like_released:
        raise ValueError(
            "net must be as the released networks are, a RefineNet of shared convolutions, private norms and "
            f"an ensemble, got a {type(net).__name__} with {fusion}"
        )
    return {key: _released_keys(key, net.num_modalities) for key in net.state_dict()}


def _released_keys(key: str, num_modalities: int) -> list[str]:
    """The released network's names for an entry of our state dict: one per modality for norms, else one."""
    module, _, leaf = key.rpartition(".")
    part, _, path = module.partition(".")
    if part == "encoder":
        if re.search(r"(bn\d|downsample\.1)$", path):
            return [f"{path}.bn_{m}.{leaf}" for m in range(num_modalities)]
        return [f"{path}.module.{leaf}"]
    if path == "classifier":
        return [f"clf_conv.module.{leaf}"]
    if part == "decoder":
        _, level, rest = path.split(".", 2)
        unit = re.search(r"\b\d+\b", rest)
        template = _DECODER[re.sub(r"\b\d+\b", "#", rest)]
        name = template.format(level=int(level) + 1, unit=int(unit[0]) + 1 if unit else None)
        return [f"{name}.module.{leaf}"]
    return [key]
