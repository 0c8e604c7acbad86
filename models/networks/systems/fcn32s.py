"""FCN-32s: VGG-16 made convolutional, and its coarse scores enlarged 32 times.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; Shelhamer,
Long and Darrell, PAMI 2017. For two modalities, section 5 there: late fusion averages the scores of two
networks, early fusion is one network whose first convolution reads the channels of both.

The image is padded by 100 pixels, so that the scores overhang it; of the enlarged ones the crop from pixel
19 on belongs to it. With 40 classes it has 134,424,424 parameters, and twice as many with late fusion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.dropout import Dropout
from models.networks.encoders.vgg import (
    COLORS,
    DEPTHS,
    WIDTHS,
    VGGBackbone,
    VGGStream,
    mean_over_colors,
)
from models.networks.encoders.weights import misfits
from models.networks.fusion.stages import initialize_convolutions
from models.networks.messages import suggest
from models.networks.systems.base import Logits, System, register_system

FCNFusion = Literal["late", "early"]

PADDING = 100  # of the image, in pixels
STRIDE = 32  # of the scores
OFFSET = 19  # of the crop, in pixels of the enlarged scores


class PaddedConv2d(nn.Conv2d):
    """The first convolution, 3x3 with a padding of 100, of an image and perhaps of others beside it.

    Args:
        in_channels: of the image for which there are pretrained weights.
        extra_channels: of all others.
        out_channels: K.

    Attributes:
        extra: ``[K, extra_channels, 3, 3]`` the weight that reads those; None where there are none.
    """

    def __init__(self, in_channels: int, extra_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=PADDING)
        # A parameter of its own, as pretrained weights are scaled and turned for colors alone.
        self.extra = nn.Parameter(torch.empty(out_channels, extra_channels, 3, 3)) if extra_channels else None
        if self.extra is not None:
            nn.init.kaiming_normal_(self.extra, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels + extra_channels, H, W]`` to ``[N, K, H + 198, W + 198]``."""
        weight = self.weight if self.extra is None else torch.cat([self.weight, self.extra], 1)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class FCNStream(VGGStream):
    """VGG-16 as a convolutional network: an image to features for each 32x32 pixels.

    Args:
        channels: of the images that the first convolution reads, the one of pretrained weights first.
        widths: of the five stages, and of the linear layers that became convolutions.
        dropout: probability after each of the latter.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], dropout: float) -> None:
        *widths, hidden = widths
        super().__init__(PaddedConv2d(channels[0], sum(channels[1:]), widths[0]), widths)
        self.fc6 = nn.Conv2d(widths[-1], hidden, 7)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, sum(channels), H, W]`` to ``[N, widths[-1], ceil((H + 6) / 32), ceil((W + 6) / 32)]``."""
        for stage in self.stages:
            x = _pooled(stage(x))
        x = self.dropout(F.relu_(self.fc6(x)))
        y: Tensor = self.dropout(F.relu_(self.fc7(x)))
        return y


class FCNEncoder(VGGBackbone):
    """One stream for each group of images.

    Args:
        groups: of each stream, the channels of the images that it reads concatenated.
        widths, dropout: as there.
    """

    def __init__(self, groups: Sequence[Sequence[int]], widths: Sequence[int], dropout: float) -> None:
        super().__init__([FCNStream(channels, widths, dropout) for channels in groups])
        initialize_convolutions(self)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """``[N, sum(channels), H, W]`` of every group to its stream's features."""
        return [stream(image) for stream, image in zip(self.streams, images, strict=True)]

    @property
    def stem_weights(self) -> tuple[str, ...]:
        # Three further channels, HHA's, are normalized as colors are.
        extra = [name for name, weight in self.named_parameters() if name.endswith(".extra")]
        colored = [name for name in extra if self.get_parameter(name).shape[1] == COLORS]
        return (*super().stem_weights, *colored)

    def from_pretrained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found, own = super().from_pretrained(state), self.state_dict()
        for name in own:
            read = f"{name.removesuffix('extra')}weight"
            if name.endswith(".extra") and read in found:
                found[name] = mean_over_colors(found[read], own[name].shape[1])
        return found


@register_system
class FCN32s(System):
    """FCN-32s; its logits are of the image's height and width.

    Weights: ``vgg16`` of torchvision, linear layers and all; published. A modality of one channel starts from
    the mean over red, green and blue, and so do with early fusion the channels of the other modality (both
    ours). Without weights, convolutions start as He et al. have it (ours). The scores start as zeros
    (published), so that the encoder learns from the second step on.

    Args:
        num_classes, channels: as ``System``.
        dropout: probability after each of the two layers that were linear.
        fcn_fusion: how two modalities meet: ``"late"``, two networks whose scores are averaged, or
            ``"early"``, one network of all channels. With one modality there is no difference.
        widths: of the five stages and of the layers that were linear, as published.

    Raises:
        ValueError: another fcn_fusion; as ``System``.
    """

    name: ClassVar[str] = "fcn32s"
    encoders: ClassVar[tuple[str, ...]] = ("vgg16",)
    options: ClassVar[tuple[str, ...]] = ("dropout", "fcn_fusion")
    takes: ClassVar[tuple[int, ...]] = (1, 2)

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        *,
        dropout: float = 0.5,
        fcn_fusion: FCNFusion = "late",
        widths: Sequence[int] = (*WIDTHS, 4096),
    ) -> None:
        super().__init__(num_classes, channels)
        if fcn_fusion not in (known := get_args(FCNFusion)):
            hint = suggest(str(fcn_fusion), known)
            raise ValueError(f"fcn_fusion must be {' or '.join(known)}, got {fcn_fusion!r}{hint}")
        self.fcn_fusion = fcn_fusion
        # The first image in colors is the one that early fusion has pretrained weights for.
        self.order = sorted(range(len(channels)), key=lambda m: channels[m] != COLORS)
        early, late = [[channels[m] for m in self.order]], [[count] for count in channels]
        self.encoder = FCNEncoder(early if fcn_fusion == "early" else late, widths, dropout)
        self.classifier = nn.ModuleList(nn.Conv2d(widths[-1], num_classes, 1) for _ in self.encoder.streams)
        for score in self.classifier.parameters():
            nn.init.zeros_(score)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        height, width = images[0].shape[-2:]
        if self.fcn_fusion == "early":
            images = [torch.cat([images[m] for m in self.order], 1)]
        features = self.encoder(images)
        scores = [score(feature) for score, feature in zip(self.classifier, features, strict=True)]
        return Logits(enlarged(torch.stack(scores).mean(0), height, width))

    def from_released(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate a state dict of the public PyTorch port's FCN-32s to this network's names.

        Args:
            state: ``conv1_1`` to ``conv5_3``, ``fc6``, ``fc7`` and ``score_fr``, each with weight and bias,
                and ``upscore.weight``, which is not learnt and left out. Networks that come from Caffe take
                blue first, from 0 to 255 less the mean over the data set.

        Returns:
            All entries; ``alpha``, which has no effect with a single branch, is this network's own.

        Raises:
            ValueError: this network is not one of a single modality in colors; keys are missing, left over
                or of another shape.
        """
        if self.channels != (COLORS,):
            raise ValueError(
                f"network=fcn32s loads the public weights, of one modality of {COLORS} channels, into a "
                f"network of just that, got channels {', '.join(map(str, self.channels))}"
            )
        own = self.state_dict()
        names = {
            f"{theirs}.{entry}": f"{ours}.{entry}"
            for theirs, ours in _released_layers().items()
            for entry in ("weight", "bias")
        }
        state = {key: value for key, value in state.items() if key != "upscore.weight"}
        if problems := misfits({theirs: own[ours].shape for theirs, ours in names.items()}, state):
            raise ValueError(f"state must be of the public FCN-32s: {problems}")
        return {"alpha": own["alpha"], **{ours: state[theirs] for theirs, ours in names.items()}}


def _pooled(x: Tensor) -> Tensor:
    """Maxima of 2x2 pixels, and at the end of an odd size of those that there are; x is not negative."""
    if not torch.compiler.is_exporting():
        return F.max_pool2d(x, 2, ceil_mode=True)
    # Exported programs take such sizes to be odd, or to be even; a row and column of zeros serves both.
    return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2)


def enlarged(scores: Tensor, height: int, width: int) -> Tensor:
    """Enlarge scores 32 times by the fixed bilinear transposed convolution, and crop from pixel 19 on.

    Each class has the kernel ``k[i] k[j]`` of 64x64, ``k[i] = 1 - |i - 31.5| / 32``.

    Args:
        scores: ``[N, K, h, w]``.

    Returns:
        ``[N, K, height, width]``, where the uncropped ones are ``32 (h + 1)`` high and ``32 (w + 1)`` wide.
    """
    classes = scores.shape[1]
    k = 1 - (torch.arange(2 * STRIDE, device=scores.device) - (STRIDE - 0.5)).abs() / STRIDE
    kernel = (k[:, None] * k).to(scores.dtype).expand(classes, 1, -1, -1)
    large = F.conv_transpose2d(scores, kernel, stride=STRIDE, groups=classes)
    # A slice would limit exported programs to sizes of which its end is known to lie within.
    right, below = OFFSET + width - large.shape[-1], OFFSET + height - large.shape[-2]
    return F.pad(large, (-OFFSET, right, -OFFSET, below))


def _released_layers() -> dict[str, str]:
    """The public port's names of layers, and this network's."""
    convolutions = {
        f"conv{stage + 1}_{unit + 1}": f"encoder.streams.0.stages.{stage}.{unit}.conv"
        for stage, depth in enumerate(DEPTHS)
        for unit in range(depth)
    }
    linear = {name: f"encoder.streams.0.{name}" for name in ("fc6", "fc7")}
    return {**convolutions, **linear, "score_fr": "classifier.0"}
