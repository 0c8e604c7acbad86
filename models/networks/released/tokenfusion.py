"""The names of the entries in the checkpoints of TokenFusion's SegFormers.

Wang et al., "Multimodal Token Fusion for Vision Transformers", CVPR 2022, released SegFormers of two
modalities for NYUDv2. They exchange tokens, which score networks choose; there is no such exchange here, so
that what the score networks hold is left over, and a network with the other weights computes something else:
it is a start for training, whose layer norms each modality has for itself.

    ours                                        theirs
    encoder.stage<i>.<norm>.<entry>  [M, C]     encoder.<public>.ln_<m>.<entry>  [C], one per modality
    encoder.stage<i>.<layer>.<entry>            encoder.<public>.module.<entry>, or without module
    alpha                                       alpha
    decoder.linears.<i-1>.<entry>               decoder.linear_c<i>.proj.<entry>
    decoder.fuse.{conv,norm}.<entry>            decoder.linear_fuse.{conv,bn}.<entry>
    decoder.classifier.<entry>                  decoder.linear_pred.<entry>

``<public>`` is a Mix Transformer's public name (``models.networks.encoders.mit``). Which of the shared layers
they wrap as ``module`` tells nothing; so it is taken off all of them. The names inside of blocks are those of
error messages in public reports; those of the decoder are SegFormer's, as no report shows theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from cen_ext.modules import ExchangeNorm
from models.networks.decoders.segformer import SegFormer
from models.networks.encoders.mit import MixTransformer, public_name

_DECODER = {
    "fuse.conv": "linear_fuse.conv",
    "fuse.norm": "linear_fuse.bn",
    "classifier": "linear_pred",
}
_OWN_PARTS = re.compile(r"(patch_embed|block|norm)\d\.")  # of their encoder, beside which are score networks


def released_names(net: SegFormer) -> dict[str, list[str]]:
    """Their names, without ``module``, for every entry of net's state dict; several for a private entry.

    Raises:
        ValueError: net is of another kind than their networks.
    """
    encoder, modalities = net.encoder, net.num_modalities
    private = {
        f"encoder.{name}": norm.num_modalities
        for name, norm in encoder.named_modules()
        if isinstance(norm, ExchangeNorm)
    }
    alike = isinstance(encoder, MixTransformer) and set(private.values()) == {modalities}
    if not alike or net.head is not None:
        raise ValueError(
            "net must be as TokenFusion's networks are, a SegFormer on a Mix Transformer with private norms "
            f"and an ensemble, got one on a {type(encoder).__name__} with {net.fusion}"
        )
    return {key: _names(key, private.get(key.rpartition(".")[0], 0)) for key in net.state_dict()}


def without_scores(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a checkpoint that a SegFormer has, without ``module`` in their names."""
    plain = {key.replace(".module.", "."): value for key, value in state.items()}
    return {
        key: value
        for key, value in plain.items()
        if not key.startswith("encoder.") or _OWN_PARTS.match(key.removeprefix("encoder."))
    }


def _names(key: str, modalities: int) -> list[str]:
    """Their names for an entry of ours, of a norm of so many modalities or, with 0, of a shared layer."""
    part, _, path = key.partition(".")
    module, _, leaf = path.rpartition(".")
    if part == "encoder":
        public = public_name(f"{module}.")
        return [f"encoder.{public}ln_{m}.{leaf}" for m in range(modalities)] or [f"encoder.{public}{leaf}"]
    if module in _DECODER:
        return [f"decoder.{_DECODER[module]}.{leaf}"]
    if linear := re.fullmatch(r"linears\.(\d)", module):
        return [f"decoder.linear_c{int(linear[1]) + 1}.proj.{leaf}"]
    return [key]
