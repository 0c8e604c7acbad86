"""Import of the checkpoints that the paper's authors released.

``segmentation``, ``tokenfusion`` and ``translation`` beside this file have the names of their entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cen_ext.tables import table_shapes
from models.networks.decoders.segformer import SegFormer
from models.networks.encoders.weights import misfits, misfits_of, read_state_dict
from models.networks.released import segmentation, tokenfusion, translation
from models.networks.segmentor import SegmentationNetwork
from models.networks.systems.base import System
from models.networks.systems.patchgan import PatchGAN
from models.networks.systems.unet import UNet

Network = TypeVar("Network", bound=nn.Module)


def load_released(net: Network, path_or_state_dict: str | Path | Mapping[str, Any]) -> Network:
    """Load a checkpoint of a network that its authors released.

    Args:
        net: a ``RefineNet``, ``UNet`` or ``PatchGAN`` as the released ones are: the same number of modalities
            and sizes, and for a U-Net ``decoder_norms="private"``; or a ``SegFormer`` as TokenFusion's, whose
            score networks, and with them its exchange of tokens, are left out; or a system whose checkpoints
            have a known layout. Changed in place, and only if everything fits.
        path_or_state_dict: a file that ``torch.save`` or safetensors wrote, or a loaded state dict; bare or
            below ``segmenter``, ``state_dict`` or ``model``, with or without DataParallel's ``module.``.

    Returns:
        net.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: net is of another kind than the released networks; not a state dict; or keys are
            missing, left over or of another shape, and the message names them.
    """
    if isinstance(net, System):
        found = net.from_released(read_state_dict(path_or_state_dict))
        if problems := misfits_of(net, found):
            raise ValueError(f"the checkpoint does not fit this network: {problems}")
        net.load_state_dict(found)
        return net
    if isinstance(net, SegFormer):
        names, unused = tokenfusion.released_names(net), set[str]()
    elif isinstance(net, SegmentationNetwork):
        names, unused = segmentation.released_names(net), set[str]()
    elif isinstance(net, UNet | PatchGAN):
        names, unused = translation.released_names(net), translation.unused_names(net)
    else:
        raise ValueError(
            f"net must be a RefineNet, a SegFormer, a UNet or a PatchGAN, got a {type(net).__name__}"
        )
    state = read_state_dict(path_or_state_dict)
    if isinstance(net, SegFormer):
        state = tokenfusion.without_scores(state)
    own, private = net.state_dict(), table_shapes(net)
    _check_fit(own, private, names, {name: value for name, value in state.items() if name not in unused})
    net.load_state_dict(
        {
            key: torch.stack([state[name] for name in names[key]]) if key in private else state[names[key][0]]
            for key in own
        }
    )
    return net


def _check_fit(
    own: Mapping[str, Tensor],  # the network's entries
    private: Mapping[str, Sequence[int]],  # those that have a row for each modality, [M, C]
    names: Mapping[str, list[str]],  # their names in state
    state: Mapping[str, Tensor],
) -> None:
    """Raise ValueError unless state has those names, no others, in the shapes that the network asks for."""
    shapes = {  # a norm's entry [M, C] is M entries [C]
        name: private[key][1:] if key in private else own[key].shape for key in own for name in names[key]
    }
    if problems := misfits(shapes, state):
        num_modalities = max(map(len, names.values()))
        raise ValueError(f"the checkpoint does not fit this {num_modalities}-modality network: {problems}")
