"""The paper's comparisons as settings: the rows of its Table 1 and the ablations of its section 4.1.

Wang et al., "Deep Multimodal Fusion by Channel Exchanging", NeurIPS 2020. The defaults are the paper's
network; the other values exist to be compared with it. As overrides of a segmentation recipe:

    Table 1: convolutions, norms, l1, exchange
    unshared  unshared  -     -     variant.convolutions=private variant.exchange=none
    shared    shared    -     -     variant.norms=shared variant.exchange=none
    shared    unshared  -     -     variant.exchange=none
    shared    unshared  half  -     variant.exchange=none variant.penalty=own
    shared    unshared  half  yes   (the defaults)
    shared    unshared  all   yes   model.region=all variant.penalty=all

    Section 4.1, "Additional ablation studies"
    1. a fixed portion, 30 %        variant.exchange=portion (the first channels) or smallest (scales)
       at down-sampling stages      variant.exchange=portion variant.exchange_at=downsampling
    3. summed                       variant.exchange=sum
       with a learnt soft gate      variant.exchange=gated_sum
    4. a concat-fusion block        variant.fusion=concat
    5. random exchange              variant.exchange=random
       discard, not exchange        variant.exchange=discard
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

from models.networks.messages import suggest
from models.training.config import setting

MIXES = ("portion", "smallest", "random", "discard", "sum", "gated_sum")  # run outside the operator
_FIXED = ("portion", "smallest", "random")  # replace a fixed number of channels


@dataclass(frozen=True)
class Variant:
    """What a network does otherwise than the paper's; ``ablations`` beside this has the formulas.

    Raises:
        ValueError: an unknown value, or a portion outside (0, 1]; the message begins with the field's name.
    """

    convolutions: Literal["shared", "private"] = setting(
        "shared", "shared by the modalities, or private: a set each, decoder included"
    )
    norms: Literal["private", "shared"] = setting(
        "private", "one norm a modality, or one for all, whose batch is all modalities'"
    )
    penalty: Literal["auto", "none", "own", "all"] = setting(
        "auto",
        "scales under the l1 penalty: each modality's own share, or all; auto: own if a threshold exchanges",
    )
    exchange: Literal["threshold", "none", "portion", "smallest", "random", "discard", "sum", "gated_sum"] = (
        setting(
            "threshold",
            "what happens after the norms of 3x3 convolutions: the paper's exchange, or a comparison to it",
        )
    )
    exchange_at: Literal["every", "downsampling"] = setting(
        "every", "after every 3x3 convolution of the encoder, or in the blocks that halve the resolution"
    )
    portion: float = setting(
        0.3, "share of the channels that a modality replaces with portion, smallest and random"
    )
    fusion: Literal["ensemble", "concat"] = setting(
        "ensemble", "weighted sum of the branches, or a learnt 1x1 convolution of their concatenation"
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if get_origin(hints[field.name]) is Literal and value not in choices:
                hint = suggest(str(value), choices)
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}{hint}")
        if not 0 < self.portion <= 1:
            raise ValueError(f"portion must be above 0 and at most 1, got {self.portion}")

    def check(self, num_modalities: int, region: str) -> None:
        """Refuse fields that contradict each other or the network.

        Raises:
            ValueError: the message begins with a field's name.
        """
        if self.norms == "shared":
            if self.exchange != "none":
                raise ValueError(
                    f"exchange must be none with norms=shared, got {self.exchange}: modalities that have "
                    "their scales in common have nothing to tell their channels apart"
                )
            if self.penalty == "own":
                raise ValueError(
                    "penalty must be none or all with norms=shared, got own: no scale is any modality's own"
                )
            if self.convolutions == "private":
                raise ValueError(
                    "norms must be private with convolutions=private, got shared: the channels of different "
                    "filters have no statistics in common"
                )
        if num_modalities == 1:
            for name, needs in (("exchange", self.exchange in MIXES), ("fusion", self.fusion == "concat")):
                if needs:
                    raise ValueError(
                        f"{name}={getattr(self, name)} needs at least two modalities, the network has one"
                    )
        if self.exchange in _FIXED and region == "own" and self.portion * num_modalities > 1:
            raise ValueError(
                f"portion must be at most 1/{num_modalities} with {num_modalities} modalities and "
                f"region=own, got {self.portion}"
            )

    @property
    def penalised(self) -> str:
        """``penalty``, where ``auto`` is none for exchanges that no threshold decides."""
        decided = self.exchange in ("threshold", "none", "discard")
        return "none" if self.penalty == "auto" and not decided else self.penalty
