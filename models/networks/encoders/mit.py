"""Mix Transformers, SegFormer's encoders, for M modalities that share all but the layer norms.

Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS
2021, section 3.1 and the appendix's table of sizes. Written from the paper, as its code and weights are not
free.

Each modality has scales and shifts of its own in every layer norm, as in TokenFusion (Wang et al.,
"Multimodal Token Fusion for Vision Transformers", CVPR 2022), whose parameter counts tell so. The appendix
there exchanges channels by the scales of layer norms and does not say of which: here those of norm1 and norm2
of every block, as in timm's transformers (``Trace.exchange_points``). Ours, too: linear layers start as in
vision transformers, with deviations of 0.02, and convolutions as torch makes them; and there is no stochastic
depth, for which encoders have no option, where public configurations have one of 0.1.

Between a stage's first convolution and its end maps are ``[M*N, h, w, C]``, so that linear layers and layer
norms find the channels of a position side by side.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import ExchangeLayerNorm
from models.networks.encoders.base import ENCODERS, STRIDES, Encoder, NormLayer
from models.networks.fusion.base import DECODER, Fusion
from models.networks.messages import suggest

Quadruple = tuple[int, int, int, int]

WIDE: Quadruple = (64, 128, 320, 512)
# name -> (channels of the four stages, their blocks)
MITS: dict[str, tuple[Quadruple, Quadruple]] = {
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": (WIDE, (2, 2, 2, 2)),
    "mit_b2": (WIDE, (3, 4, 6, 3)),
    "mit_b3": (WIDE, (3, 4, 18, 3)),
    "mit_b4": (WIDE, (3, 8, 27, 3)),
    "mit_b5": (WIDE, (3, 6, 40, 3)),
}
HEADS: Quadruple = (1, 2, 5, 8)
REDUCTIONS: Quadruple = (8, 4, 2, 1)  # of keys and values, along each side
EXPANSION = 4  # hidden channels of a Mix-FFN


class PatchEmbedding(nn.Module):
    """Overlapping patches by a strided convolution, and a norm: ``[B, C, H, W]`` to ``[B, h, w, C']``."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int, norm_layer: NormLayer
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.norm = norm_layer(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return y


class EfficientAttention(nn.Module):
    """Self-attention with keys and values of a smaller map (Eq. 1 and 2), ``[B, h, w, C]`` to the same.

    Eq. 2 joins the R*R positions of a patch and projects them, which a convolution of size and stride R does.
    Patches at the end that are not whole have no part in it.

    Args:
        channels: C, a multiple of ``heads``.
        heads: of the attention.
        reduction: R, by which the map is smaller along each side; 1 for none.
        norm_layer: makes the norm of the smaller map.
    """

    def __init__(self, channels: int, heads: int, reduction: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.sr = nn.Conv2d(channels, channels, reduction, reduction) if reduction > 1 else None
        self.norm = norm_layer(channels) if reduction > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        smaller = x
        if self.sr is not None and self.norm is not None:
            smaller = self.norm(self.sr(x.movedim(-1, 1)).movedim(1, -1))
        key, value = self.kv(smaller).chunk(2, -1)
        y = F.scaled_dot_product_attention(self._split(self.q(x)), self._split(key), self._split(value))
        projected: Tensor = self.proj(y.transpose(1, 2).reshape(x.shape))
        return projected

    def _split(self, x: Tensor) -> Tensor:
        """``[B, h, w, C]`` to ``[B, heads, h*w, C/heads]``."""
        y: Tensor = x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return y


class MixFFN(nn.Module):
    """Two linear layers with a depthwise 3x3 convolution between them, which tells positions (Eq. 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.dwconv(self.fc1(x).movedim(-1, 1)).movedim(1, -1)
        y: Tensor = self.fc2(F.gelu(mixed))
        return y


class Block(nn.Module):
    """Attention and Mix-FFN, each behind a norm and with a skip; both norms exchange."""

    def __init__(self, channels: int, heads: int, reduction: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm1 = norm_layer(channels, exchange_point=True)
        self.attn = EfficientAttention(channels, heads, reduction, norm_layer)
        self.norm2 = norm_layer(channels, exchange_point=True)
        self.mlp = MixFFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class Stage(nn.Module):
    """Patch embedding, blocks and a norm, ``[B, C, H, W]`` to ``[B, channels, h, w]``."""

    def __init__(self, patch_embed: PatchEmbedding, blocks: Sequence[Block], norm: nn.Module) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.block = nn.Sequential(*blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.block(self.patch_embed(x)))
        return y.movedim(-1, 1)


class MixTransformer(Encoder):
    """A Mix Transformer whose M modalities share all but the layer norms and exchange channels there.

    Images are 29 pixels long along each side at the least, the first stage's keys being 1/32 of that; they
    need not divide by 32: the sizes of features are rounded up.

    Args:
        name: ``"mit_b0"`` to ``"mit_b5"``.
        num_modalities: M >= 1; 1 is a plain Mix Transformer.
        fusion: how the modalities meet.
        in_channels: channels of every modality's input.
        frozen_statistics: of no effect, as layer norms have no running statistics.

    Raises:
        ValueError: an unknown name; num_modalities or in_channels below 1; a fusion that wants private
            convolutions, a lateral connection in blocks, or to act where blocks halve the resolution alone.
    """

    weights_kind = "a Mix Transformer (SegFormer's)"
    stem_weight = "stage1.patch_embed.proj.weight"

    stage1: Stage
    stage2: Stage
    stage3: Stage
    stage4: Stage

    def __init__(
        self,
        name: str,
        num_modalities: int,
        fusion: Fusion,
        *,
        in_channels: int = 3,
        frozen_statistics: bool = True,
    ) -> None:
        if name not in MITS:
            raise ValueError(f"encoder must be one of {', '.join(MITS)}, got {name!r}{suggest(name, MITS)}")
        widths, depths = MITS[name]
        super().__init__(
            num_modalities,
            fusion,
            channels=widths,
            strides=STRIDES,
            in_channels=in_channels,
            frozen_statistics=frozen_statistics,
        )
        self._check_fusion(name)
        channels = in_channels
        for number, (width, depth, heads, reduction) in enumerate(
            zip(widths, depths, HEADS, REDUCTIONS, strict=True), 1
        ):
            norm_layer = functools.partial(
                self.norm_layer(number), layer=ExchangeLayerNorm, activation="identity", eps=1e-6
            )
            kernel, stride = (7, 4) if number == 1 else (3, 2)
            patches = PatchEmbedding(channels, width, kernel, stride, norm_layer)
            blocks = [Block(width, heads, reduction, norm_layer) for _ in range(depth)]
            self.add_module(f"stage{number}", Stage(patches, blocks, norm_layer(width)))
            channels = width
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.finish()

    def stem(self, x: Tensor) -> Tensor:
        return x  # what would be one is the first stage's patch embedding

    def stages(self) -> Sequence[nn.Module]:
        return (self.stage1, self.stage2, self.stage3, self.stage4)

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate a state dict of the public ImageNet weights to this encoder's names, without classifier.

        ``patch_embed1.``, ``block1.`` and ``norm1.`` of a stage are ``stage1.patch_embed.`` and so on here,
        and ``mlp.dwconv.dwconv.`` is ``mlp.dwconv.``; names inside are the same.
        """
        return {own_name(key): value for key, value in state.items() if not key.startswith("head.")}

    def _check_fusion(self, name: str) -> None:
        """Refuse a fusion that asks for what the network has not."""
        reasons = {
            "has linear layers, which have no private form": any(
                self.fusion.private_convolutions(stage) for stage in range(DECODER)
            ),
            "halves the resolution in no block": self.acts_where_halving_only(),
        }
        for reason, there in reasons.items():
            if there:
                raise ValueError(
                    f"encoder: {name} {reason}, so it cannot serve {self.fusion}; choose fusion=exchange "
                    "with its defaults, or another encoder, resnet50 for example"
                )


def own_name(key: str) -> str:
    """The name of an entry here, by its public one."""
    return re.sub(r"^(patch_embed|block|norm)(\d)\.", r"stage\2.\1.", key).replace(
        ".dwconv.dwconv.", ".dwconv."
    )


def public_name(key: str) -> str:
    """The public name of an entry, by its name here."""
    return re.sub(r"^stage(\d)\.(\w+)\.", r"\2\1.", key).replace(".dwconv.", ".dwconv.dwconv.")


for _name in MITS:
    ENCODERS.members[_name] = functools.partial(MixTransformer, _name)
