"""The names of the entries in the checkpoints that the paper's authors released for translation.

The released networks keep one instance norm per modality where ours has one ``[M, C]`` entry, in encoder and
decoder, and wrap every shared convolution. Levels count from 1 there and from 0 here; L is their number, 8
for images of 256 pixels.

    generator, ours                             released
    alpha                                       alpha
    encoder.levels.<i>.conv.<entry>             conv<i+1>.conv.module.<entry>
    encoder.levels.<i>.norm.<entry>  [M, C]     conv<i+1>.insnorm_conv.insnorm_<m>.<entry>  [C], for every m
    decoder.levels.<i>.conv.<entry>             deconv<i+1>.deconv.module.<entry>
    decoder.levels.<i>.norm.<entry>  [M, C]     deconv<i+1>.insnorm_deconv.insnorm_<m>.<entry>  [C]
    decoder.image.<entry>                       deconv<L>.deconv.module.<entry>

    discriminator, ours                         released
    levels.<i>.conv.<entry>                     conv<i+1>.conv.module.<entry>
    levels.<i>.norm.<entry>  [1, C]             conv<i+1>.insnorm.module.<entry>  [C], shared by the branches
    decide.<entry>                              conv5.conv.module.<entry>

``num_batches_tracked`` is equal for all modalities. The released networks also hold the norms of ``conv1``,
``conv<L>`` and ``deconv<L>`` (discriminator: ``conv1`` and ``conv5``), which they never run; ours have none.
"""

from __future__ import annotations

import re

from models.networks.systems.patchgan import PatchGAN
from models.networks.systems.unet import UNet, Up

_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # a norm's entries


def released_names(net: UNet | PatchGAN) -> dict[str, list[str]]:
    """The released network's names for every entry of net's state dict; several for a private entry.

    Raises:
        ValueError: net is of another kind than the released networks.
    """
    if isinstance(net, PatchGAN):
        return {key: [_discriminator_name(key, len(net.levels))] for key in net.state_dict()}
    norms = {level.norm.num_modalities for level in net.decoder.levels if isinstance(level, Up)}
    if norms != {net.num_modalities}:
        raise ValueError(
            "net must be as the released networks are, a UNet of decoder_norms='private', got one of "
            "decoder_norms='shared'"
        )
    return {key: _generator_names(key, net) for key in net.state_dict()}


def unused_names(net: UNet | PatchGAN) -> set[str]:
    """Entries of the released network that it never uses and net has not."""
    if isinstance(net, PatchGAN):
        norms = [f"conv{level}.insnorm.module" for level in (1, len(net.levels) + 1)]
    else:
        last = len(net.encoder.levels)
        idle = ("conv1.insnorm_conv", f"conv{last}.insnorm_conv", f"deconv{last}.insnorm_deconv")
        norms = [f"{name}.insnorm_{m}" for name in idle for m in range(net.num_modalities)]
    return {f"{norm}.{leaf}" for norm in norms for leaf in _LEAVES}


def _generator_names(key: str, net: UNet) -> list[str]:
    module, _, leaf = key.rpartition(".")
    if module == "decoder.image":
        return [f"deconv{len(net.encoder.levels)}.deconv.module.{leaf}"]
    match = re.fullmatch(r"(encoder|decoder)\.levels\.(\d+)\.(conv|norm)", module)
    if match is None:
        return [key]  # alpha
    part, level, kind = match.groups()
    block = {"encoder": "conv", "decoder": "deconv"}[part]
    released = f"{block}{int(level) + 1}"
    if kind == "conv":
        return [f"{released}.{block}.module.{leaf}"]
    return [f"{released}.insnorm_{block}.insnorm_{m}.{leaf}" for m in range(net.num_modalities)]


def _discriminator_name(key: str, num_levels: int) -> str:
    module, _, leaf = key.rpartition(".")
    if module == "decide":
        return f"conv{num_levels + 1}.conv.module.{leaf}"
    _, level, kind = module.split(".")
    return f"conv{int(level) + 1}.{'conv' if kind == 'conv' else 'insnorm'}.module.{leaf}"
