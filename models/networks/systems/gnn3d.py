"""3DGNN: a graph over the points that depth shows, along which the features of a CNN on colors travel.

Qi et al., "3D Graph Neural Networks for RGBD Semantic Segmentation", ICCV 2017, is "the paper" here.
``GraphNetwork`` follows it. What it leaves open is ours and called so, and so is the CNN: the authors', a
DeepLab network, is described layer by layer in their archive of weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cen_ext import Conv3x3
from models.networks.dropout import Dropout
from models.networks.encoders.base import check_counts
from models.networks.encoders.resnet import ExchangeResNet
from models.networks.fusion.exchange import NoFusion
from models.networks.messages import suggest
from models.networks.systems.base import CHANNELS, Logits, System, register_system

WIDTH = 512  # C, of the graph's nodes
STRIDE = 8  # of their grid
_DISTANCES = 2**24  # that are held at a time


class Neighbors(NamedTuple):
    """The graph of N images of n nodes each.

    Attributes:
        nodes: ``[N, n, k]`` numbers from 0 to n-1, of any nodes where the weight is 0.
        weights: ``[N, n, k]`` one over the number of a node's neighbors; 0 for what is no neighbor.
    """

    nodes: Tensor
    weights: Tensor


@torch.no_grad()
def nearest_neighbors(points: Tensor, count: int) -> Neighbors:
    """Find every node's nearest neighbors in space, itself among them; all nodes where there are no more.

    Distances are exact, those of some nodes to all at a time: 64 MiB of them in float32, where a batch of
    four grids of 60x80 has 350. Of nodes that are equally far any may be taken. Ours: a node is its own
    neighbor; one without a point, 0 in all coordinates, has no neighbors and is nobody's.

    Args:
        points: ``[N, n, 3]``, in any unit of length.
        count: k.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    images, size, _ = points.shape
    placed = points.any(-1)
    rows = max(1, _DISTANCES // (images * size))
    found = []
    # An exported program takes images of any size, so that the number of parts is not known.
    for some in (points,) if torch.compiler.is_exporting() else points.split(rows, 1):
        if torch.compiler.is_exporting():  # ONNX has no such operator
            distances = (some[:, :, None] - points[:, None]).square().sum(-1).sqrt()
        else:
            distances = torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist")
        distances = distances.masked_fill(~placed[:, None], torch.inf)
        # There may be fewer nodes than k.
        found.append(F.pad(distances, (0, count), value=torch.inf).topk(count, largest=False))
    nodes = torch.cat([part.indices for part in found], 1).clamp(max=size - 1)
    known = torch.cat([part.values for part in found], 1).isfinite() & placed[:, :, None]
    return Neighbors(nodes, known.to(points.dtype) / known.sum(-1, keepdim=True).clamp(min=1))


class VanillaCell(nn.Module):
    """h ← relu(W [h; m]): the paper's vanilla recurrent update, with 2C² + C parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, channels)

    def forward(self, hidden: Tensor, message: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(self.linear(torch.cat([hidden, message], 1))), memory


class LSTMCell(nn.Module):
    """The paper's other update, an LSTM's, with 8C² + 4C parameters. Ours in detail:

    i, f, o, g = W [h; m]; c ← σ(f) c + σ(i) tanh(g); h ← σ(o) tanh(c), where c starts as 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, 4 * channels)

    def forward(self, hidden: Tensor, message: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        enters, stays, leaves, new = self.linear(torch.cat([hidden, message], 1)).chunk(4, 1)
        memory = stays.sigmoid() * memory + enters.sigmoid() * new.tanh()
        return leaves.sigmoid() * memory.tanh(), memory


CELLS: dict[str, type[VanillaCell] | type[LSTMCell]] = {"vanilla": VanillaCell, "lstm": LSTMCell}


class GraphNetwork(nn.Module):
    """Features passed on between the pixels of a grid that are near each other in space.

    In each of T steps a node i with the state h_i gets the message m_i, the mean of g(h_j) over its neighbors
    j, where g is a linear layer and relu, and renews its state from h_i and m_i. All steps share weights, and
    neighbors are those of the points. With the vanilla cell there are 3C² + 2C parameters.

    Args:
        channels: C.
        neighbors: k, of every node, see ``nearest_neighbors``; 64 in the paper.
        steps: T; 3 in the paper.
        cell: ``"vanilla"`` or ``"lstm"``, which renews the states.

    Raises:
        ValueError: a number below 1; another cell.
    """

    def __init__(
        self, channels: int = WIDTH, *, neighbors: int = 64, steps: int = 3, cell: str = "vanilla"
    ) -> None:
        super().__init__()
        check_counts(channels=channels, neighbors=neighbors, graph_steps=steps)
        if cell not in CELLS:
            raise ValueError(f"graph_cell must be {' or '.join(CELLS)}, got {cell!r}{suggest(cell, CELLS)}")
        self.neighbors = neighbors
        self.steps = steps
        self.message = nn.Linear(channels, channels)
        self.cell = CELLS[cell](channels)

    def forward(self, features: Tensor, points: Tensor) -> Tensor:
        """Compute the states ``[N, C, h, w]`` after T steps.

        Args:
            features: h⁰, ``[N, C, h, w]``.
            points: ``[N, 3, h, w]`` in any unit of length; 0 where they are missing.
        """
        images, _, height, width = features.shape
        graph = nearest_neighbors(points.flatten(2).transpose(1, 2), self.neighbors)
        starts = torch.arange(images, device=features.device) * (height * width)
        nodes = (graph.nodes + starts[:, None, None]).flatten(0, 1)
        hidden = features.flatten(2).transpose(1, 2).flatten(0, 1)
        weights, memory = graph.weights.flatten(0, 1), torch.zeros_like(hidden)
        for _ in range(self.steps):
            sent = F.relu(self.message(hidden))
            # Sent features gathered for every neighbor would take k times as much memory as all states.
            message = F.embedding_bag(nodes, sent, mode="sum", per_sample_weights=weights.to(sent.dtype))
            hidden, memory = self.cell(hidden, message, memory)
        states: Tensor = hidden.unflatten(0, (images, -1)).transpose(1, 2).unflatten(2, (height, width))
        return states


@register_system
class GNN3D(System):
    """3DGNN, of colors and ``points``; its logits are at 1/8.

    From the paper: the graph on the grid of the CNN's features at 1/8, which are the states h⁰, and the
    classifier on [h^T; h⁰].

    Ours, with the paper's module in it: the CNN is this library's dilated ResNet, which reads the colors
    alone, and a 3x3 convolution with bias to C = 512 channels, and relu; each node's point is that of the
    pixel nearest to the middle of its cell, never a mean; dropout stands before the classifier. So with 40
    classes it has 33,774,184 parameters on ResNet-50 and 52,766,312 on ResNet-101, 787,456 in the graph.

    Args:
        num_classes: K.
        channels: of the modalities: 3 of the colors, and 3 of the points, which only the graph reads.
        encoder: ``"resnet50"`` or ``"resnet101"``, from ImageNet weights in torchvision's names.
        neighbors, graph_steps, graph_cell: of ``GraphNetwork``.
        dropout: probability, before the classifier.
        frozen_statistics: as of ``ExchangeResNet``.

    Raises:
        ValueError: other modalities; as ``GraphNetwork``.
    """

    name = "gnn3d"
    encoders: ClassVar[tuple[str, ...]] = ("resnet50", "resnet101")
    options: ClassVar[tuple[str, ...]] = (
        "dropout",
        "frozen_statistics",
        "neighbors",
        "graph_steps",
        "graph_cell",
    )
    modalities: ClassVar[tuple[str, ...]] = ("rgb", "points")
    takes: ClassVar[tuple[int, ...]] = (2,)

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        *,
        encoder: str = "resnet50",
        dropout: float = 0.5,
        frozen_statistics: bool = True,
        neighbors: int = 64,
        graph_steps: int = 3,
        graph_cell: str = "vanilla",
    ) -> None:
        super().__init__(num_classes, channels)
        if tuple(channels) != (CHANNELS, CHANNELS):
            raise ValueError(
                f"channels must be {CHANNELS} of colors and {CHANNELS} of points, as data.modalities="
                f"rgb,points has them, got {' and '.join(map(str, channels))}"
            )
        self.encoder = ExchangeResNet(
            encoder, 1, NoFusion(), output_stride=STRIDE, frozen_statistics=frozen_statistics
        )
        self.reduce = Conv3x3(self.encoder.channels[-1], WIDTH)
        self.graph = GraphNetwork(WIDTH, neighbors=neighbors, steps=graph_steps, cell=graph_cell)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Conv2d(2 * WIDTH, num_classes, 1)

    def logits(self, images: Sequence[Tensor]) -> Logits:
        """Compute the logits at 1/8, rounded up.

        Args:
            images: colors and points, each ``[N, 3, H, W]``.
        """
        colors, points = images
        features = F.relu(self.reduce(self.encoder(colors)[-1]))
        placed = F.interpolate(points, features.shape[-2:], mode="nearest-exact")
        states = torch.cat([self.graph(features, placed), features], 1)
        return Logits(self.classifier(self.dropout(states, inplace=True)))
