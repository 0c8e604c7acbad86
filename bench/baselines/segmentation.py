"""RefineNet and PSPNet with channel exchange as usually written: baselines, and checks of ``models``.

Lists of M tensors everywhere, one call per modality for every shared layer, one ``nn.BatchNorm2d`` each, the
exchange by boolean masks into a fresh tensor. Parameter names are those of ``models``' networks, with the
modality's number inside the norms' (``bn1.0.weight``); ``bench.baselines.exchange.split_state`` and
``stacked_state`` convert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.baselines.exchange import each, eager_penalty, exchange, replaced

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


class PrivateNorm(nn.ModuleList):
    """One batch norm per modality and, with a threshold, the exchange after it."""

    def __init__(self, channels: int, num_modalities: int, threshold: float = 0.0, region: str = "own"):
        super().__init__(nn.BatchNorm2d(channels) for _ in range(num_modalities))
        self.threshold = threshold
        self.region = region
        self.exchange = exchange

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [norm(x) for norm, x in zip(self, xs, strict=True)]
        if self.threshold == 0 or len(xs) == 1:
            return xs
        return self.exchange(xs, replaced([norm.weight for norm in self], self.threshold, self.region))


class Block(nn.Module):
    """A residual block from pairs (convolution, norm); relu after each, the last after the skip."""

    def __init__(self, convs: list[nn.Conv2d], norms: list[PrivateNorm], downsample: nn.Sequential | None):
        super().__init__()
        self.length = len(convs)
        for i, (conv, norm) in enumerate(zip(convs, norms, strict=True), start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
        self.downsample = downsample
        self.relu = nn.ReLU(inplace=True)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        skips = xs
        for i in range(1, self.length + 1):
            xs = getattr(self, f"bn{i}")(each(getattr(self, f"conv{i}"), xs))
            if i < self.length:
                xs = each(self.relu, xs)
        if self.downsample is not None:
            conv, norm = self.downsample
            skips = norm(each(conv, skips))
        return each(self.relu, [x + skip for x, skip in zip(xs, skips, strict=True)])


class Encoder(nn.Module):
    def __init__(
        self, name: str, num_modalities: int, threshold: float, region: str, dilated: bool = False
    ) -> None:
        super().__init__()
        self.num_modalities, self.threshold, self.region = num_modalities, threshold, region
        self.bottleneck = name not in ("resnet18", "resnet34")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = PrivateNorm(64, num_modalities)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels, dilation = 64, 1
        for stage, depth in enumerate(DEPTHS[name]):
            blocks = []
            for i in range(depth):
                halves = stage > 0 and i == 0
                before = dilation
                if halves and dilated and stage >= 2:
                    dilation, halves = 2 * dilation, False
                blocks.append(self.block(channels, 64 * 2**stage, 2 if halves else 1, (before, dilation)))
                channels = 64 * 2**stage * (4 if self.bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.channels = [channels // 8, channels // 4, channels // 2, channels]

    def block(self, channels: int, width: int, stride: int, dilations: tuple[int, int]) -> Block:
        def conv(channels: int, out: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
            padding = kernel // 2 * dilation
            return nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=False)

        first, second = dilations
        plain = (self.num_modalities,)
        exchanging = (self.num_modalities, self.threshold, self.region)
        out = 4 * width if self.bottleneck else width
        if self.bottleneck:
            convs = [conv(channels, width, 1), conv(width, width, 3, stride, first), conv(width, out, 1)]
            norms = [PrivateNorm(width, *plain), PrivateNorm(width, *exchanging), PrivateNorm(out, *plain)]
        else:
            convs = [conv(channels, width, 3, stride, first), conv(width, width, 3, 1, second)]
            norms = [PrivateNorm(width, *exchanging), PrivateNorm(width, *exchanging)]
        downsample = None
        if stride != 1 or channels != out:
            downsample = nn.Sequential(conv(channels, out, 1, stride), PrivateNorm(out, *plain))
        return Block(convs, norms, downsample)

    def forward(self, xs: list[Tensor]) -> list[list[Tensor]]:
        xs = each(self.maxpool, each(self.relu, self.bn1(each(self.conv1, xs))))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            xs = stage(xs)
            features.append(xs)
        return features


def conv3x3(channels: int, out: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=bias)


class Unit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels, bias=True)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.conv2(F.relu(self.conv1(x))) + x


class Pool(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(channels, channels) for _ in range(4))
        self.maxpool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        top = x
        for conv in self.convs:
            top = conv(self.maxpool(top))
            x = x + top
        return x


class Level(nn.Module):
    def __init__(self, channels: int, width: int, first: bool = False, last: bool = False) -> None:
        super().__init__()
        inner = 2 * width if first else width
        self.reduce = conv3x3(channels, inner)
        self.adapt = nn.Sequential(Unit(inner), Unit(inner))
        self.pool = Pool(inner)
        self.refine = nn.Sequential(Unit(inner), Unit(inner), Unit(inner))
        if not first:
            self.join = conv3x3(width, width)
        if not last:
            self.project = conv3x3(inner, width)

    def forward(self, xs: list[Tensor], coarser: list[Tensor] | None) -> list[Tensor]:
        xs = each(self.adapt, each(self.reduce, xs))
        if coarser is not None:
            up = nn.Upsample(size=xs[0].shape[2:], mode="bilinear", align_corners=True)
            xs = [x + y for x, y in zip(each(self.join, xs), each(up, coarser), strict=True)]
        xs = each(self.refine, each(self.pool, xs))
        return each(self.project, xs) if hasattr(self, "project") else xs


class Decoder(nn.Module):
    def __init__(self, channels: list[int], num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.cascades = nn.ModuleList(
            Level(c, width, first=i == 0, last=i == 3) for i, c in enumerate(reversed(channels))
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = conv3x3(width, num_classes, bias=True)

    def forward(self, features: list[list[Tensor]]) -> list[Tensor]:
        finest, fine, coarse, coarsest = features
        levels = (each(self.dropout, coarsest), each(self.dropout, coarse), fine, finest)
        xs = None
        for cascade, level in zip(self.cascades, levels, strict=True):
            xs = cascade(level, xs)
        return each(self.classifier, each(self.dropout, xs))


class EagerNetwork(nn.Module):
    """A list of M ``[N, 3, H, W]`` to M branches, their ensemble and the outputs of an auxiliary head."""

    def __init__(
        self, encoder: Encoder, decoder: nn.Module, num_modalities: int, frozen_statistics: bool
    ) -> None:
        super().__init__()
        self.frozen_statistics = frozen_statistics
        self.encoder = encoder
        self.decoder = decoder
        self.auxiliary = None
        self.alpha = nn.Parameter(torch.zeros(num_modalities))

    def train(self, mode: bool = True) -> EagerNetwork:
        super().train(mode)
        for module in self.encoder.modules():
            if self.frozen_statistics and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, xs: list[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        features = self.encoder(xs)
        branches = self.decoder(features)
        weights = F.softmax(self.alpha, dim=0)
        ensemble = sum(weights[m] * branch.detach() for m, branch in enumerate(branches))
        return branches, ensemble, self.auxiliary(features) if self.auxiliary else []


class EagerRefineNet(EagerNetwork):
    """Arguments as ``models.refinenet``."""

    def __init__(
        self,
        encoder: str,
        num_classes: int = 40,
        num_modalities: int = 2,
        *,
        threshold: float = 0.02,
        region: str = "own",
        dropout: float = 0.5,
        width: int = 256,
        frozen_statistics: bool = True,
    ) -> None:
        body = Encoder(encoder, num_modalities, threshold, region)
        decoder = Decoder(body.channels, num_classes, width, dropout)
        super().__init__(body, decoder, num_modalities, frozen_statistics)


class ConvNorm(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, num_modalities: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = PrivateNorm(out, num_modalities)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return each(F.relu, self.norm(each(self.conv, xs)))


class Pyramid(nn.Module):
    """PSPNet's head: stage 4 concatenated with its averages over 1, 2 by 2, 3 by 3 and 6 by 6 regions."""

    def __init__(self, channels: int, num_classes: int, width: int, dropout: float, num_modalities: int):
        super().__init__()
        self.bins = (1, 2, 3, 6)
        self.pyramid = nn.ModuleList(ConvNorm(channels, channels // 4, 1, num_modalities) for _ in self.bins)
        self.merge = ConvNorm(2 * channels, width, 3, num_modalities)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[list[Tensor]]) -> list[Tensor]:
        xs = features[3]
        levels = [xs]
        for bins, level in zip(self.bins, self.pyramid, strict=True):
            pooled = level([F.adaptive_avg_pool2d(x, bins) for x in xs])
            up = nn.Upsample(size=xs[0].shape[2:], mode="bilinear", align_corners=True)
            levels.append(each(up, pooled))
        merged = self.merge([torch.cat(parts, 1) for parts in zip(*levels, strict=True)])
        return each(self.classifier, each(self.dropout, merged))


class Auxiliary(nn.Module):
    """PSPNet's head on stage 3."""

    def __init__(self, channels: int, num_classes: int, dropout: float, num_modalities: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(channels, channels // 4, 3, num_modalities)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels // 4, num_classes, 1)

    def forward(self, features: list[list[Tensor]]) -> list[Tensor]:
        return each(self.classifier, each(self.dropout, self.reduce(features[2])))


class EagerPSPNet(EagerNetwork):
    """Arguments as ``models.pspnet``."""

    def __init__(
        self,
        encoder: str,
        num_classes: int = 40,
        num_modalities: int = 2,
        *,
        threshold: float = 0.02,
        region: str = "own",
        dropout: float = 0.1,
        width: int = 512,
        frozen_statistics: bool = True,
    ) -> None:
        body = Encoder(encoder, num_modalities, threshold, region, dilated=True)
        head = Pyramid(body.channels[3], num_classes, width, dropout, num_modalities)
        super().__init__(body, head, num_modalities, frozen_statistics)
        self.auxiliary = Auxiliary(body.channels[2], num_classes, dropout, num_modalities)


def eager_loss(
    net: EagerNetwork,
    outputs: tuple[list[Tensor], Tensor, list[Tensor]],
    target: Tensor,
    sparsity: float,
    auxiliary: float = 0.4,
) -> Tensor:
    """Eq. 4 with the auxiliary head's part: arguments as of ``models.segmentation.losses``."""

    def discriminate(logits: Tensor) -> Tensor:
        logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, target, ignore_index=255)

    branches, ensemble, heads = outputs
    loss = sum(discriminate(logits) for logits in (*branches, ensemble))
    loss = loss + auxiliary * sum(discriminate(logits) for logits in heads)
    return loss + sparsity * eager_penalty(net)
