"""Parameter counts of the papers' networks, from the formulas of their layers."""

from __future__ import annotations

# RefineNet of one modality, 40 classes, by the ResNet's depth; and the ResNet's norms, which one more
# modality adds to it.
REFINENET = {50: 99_104_104, 101: 118_096_232, 152: 133_739_880}
NORMS = {50: 53_120, 101: 105_344, 152: 151_424}
# SegFormer-B2 of one modality, and the layer norms of one. TokenFusion's count for two is 26,018,426, with
# 1,260,048 of score networks, and alpha.
SEGFORMER, MIT_NORMS = 24_732_392, 25_984
# RefineNet on PVTv2-B2, whose layer norms are as many: 24,849,856 of the encoder.
PVT_REFINENET = 90_418_920

ALL = (1, 2, 3, 4)
WIDTHS = {1: 256, 2: 512, 3: 1024, 4: 2048}
PREFIX = {1: 225_344, 2: 1_444_928, 3: 27_535_424, 4: 42_500_160}  # of ResNet-101 up to a stage


def block_size(name: str, c: int, m: int = 2) -> int:
    """Parameters of a fusion's block that joins m modalities of c channels."""
    gate = m * c * (c // 16) * 9
    half = c // 2
    return {
        "concat": m * c * c,
        "average": 0,
        "self_attention": 2 * gate + 9 * m * c * c + c // 16 + m * c + 2 * c,
        "align": 5 * m * c * c,
        "mmf": m * (c * half + 4 * 9 * half * half + 2 * half + 9 * half * c) + 9 * c * c,
    }[name]


def refinenet101(name: str, setting: str, stages: tuple[int, ...]) -> int:
    """RefineNet on ResNet-101 with a fusion of Table 2, for two modalities."""
    blocks = sum(block_size(name, WIDTHS[stage]) for stage in stages)
    one = REFINENET[101]
    if setting == "shared":
        return one + NORMS[101] + blocks
    return (2 * one if name == "align" else one + PREFIX[stages[-1]]) + blocks


def unet_blocks(name: str, levels: tuple[int, ...], modalities: int = 2) -> int:
    """The blocks of a fusion in a U-Net-256; self-attention has a bias instead of its norm there."""
    widths = [min(64 << (level - 1), 512) for level in levels]
    biases = sum(widths) if name == "self_attention" else 0
    return sum(block_size(name, width, modalities) for width in widths) - biases
