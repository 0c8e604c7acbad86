"""3DGNN against its formulas, written once more node by node in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import models.networks.systems.gnn3d as module
from models.networks.counting import count_parameters
from models.networks.encoders.weights import load_imagenet
from models.networks.outputs import SegmentationOutput
from models.networks.systems.base import make_system
from models.networks.systems.gnn3d import CELLS, GNN3D, GraphNetwork, nearest_neighbors

C = 6
GRID = (5, 7)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scene(images: int = 2, missing: float = 0.2, grid: tuple[int, int] = GRID) -> Tensor:
    """Points in float64, of which some are missing."""
    points = torch.randn(images, 3, *grid, dtype=torch.float64)
    return points * (torch.rand(images, 1, *grid) >= missing)


def graph(**options) -> GraphNetwork:
    return GraphNetwork(C, **options).double()


def neighbors_of(i: int, points: list[Tensor], count: int) -> list[int]:
    """The numbers of the nearest points that are not missing."""
    if not points[i].any():
        return []
    distances = {j: float(((p - points[i]) ** 2).sum()) for j, p in enumerate(points) if p.any()}
    return sorted(distances, key=distances.__getitem__)[:count]


def by_hand(net: GraphNetwork, features: Tensor, points: Tensor) -> Tensor:
    """States ``[C, h, w]`` of one image."""
    at, initial = list(points.flatten(1).T), list(features.flatten(1).T)
    states, memories = initial, [torch.zeros(C, dtype=torch.float64) for _ in initial]
    w, b = net.cell.linear.weight, net.cell.linear.bias
    near = [neighbors_of(i, at, net.neighbors) for i in range(len(at))]
    for _ in range(net.steps):
        sent = [(net.message.weight @ h + net.message.bias).clamp(min=0) for h in states]
        renewed = []
        for i, h in enumerate(states):
            message = sum((sent[j] for j in near[i]), torch.zeros(C, dtype=torch.float64))
            both = torch.cat([h, message / max(1, len(near[i]))])
            if len(b) == C:
                renewed.append((w @ both + b).clamp(min=0))
                continue
            enters, stays, leaves, new = (w @ both + b).split(C)
            memories[i] = torch.sigmoid(stays) * memories[i] + torch.sigmoid(enters) * torch.tanh(new)
            renewed.append(torch.sigmoid(leaves) * torch.tanh(memories[i]))
        states = renewed
    return torch.stack(states, 1).unflatten(1, points.shape[-2:])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("neighbors", "steps"), [(4, 1), (4, 3), (1, 2), (64, 3)])
def test_the_formulas(cell: str, neighbors: int, steps: int) -> None:
    """64 neighbors are more than there are nodes: then all are."""
    net = graph(cell=cell, neighbors=neighbors, steps=steps)
    features, points = torch.randn(2, C, *GRID, dtype=torch.float64), scene()
    expected = torch.stack([by_hand(net, *each) for each in zip(features, points, strict=True)])
    found = net(features, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - features).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_neighbors_are_the_same_in_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = scene(3).flatten(2).transpose(1, 2)
    monkeypatch.setattr(module, "_DISTANCES", rows * points.shape[0] * points.shape[1])
    found = nearest_neighbors(points, 5)
    assert found.nodes.shape == found.weights.shape == (3, 35, 5)
    for image, nodes, weights in zip(points, found.nodes, found.weights, strict=True):
        for i in range(35):
            expected = neighbors_of(i, list(image), 5)
            assert nodes[i][weights[i] > 0].tolist() == expected
            assert weights[i].sum().item() == pytest.approx(float(bool(expected)))


def test_far_points_are_told_apart_exactly() -> None:
    """Differences of squares would lose a centimeter at 1 km to float32."""
    points = torch.zeros(1, 5, 3)
    points[0, :, 0] = torch.tensor([0.0, 0.01, 0.03, 0.06, 0.1]) + 1024
    found = nearest_neighbors(points, 2)
    assert [set(pair.tolist()) for pair in found.nodes[0]] == [{0, 1}, {0, 1}, {1, 2}, {2, 3}, {3, 4}]


def test_permuted_nodes_have_permuted_states() -> None:
    net, order = graph(neighbors=4), torch.randperm(35)
    features, points = torch.randn(2, C, 1, 35, dtype=torch.float64), scene(grid=(1, 35))
    found = net(features[..., order], points[..., order])
    torch.testing.assert_close(found, net(features, points)[..., order])


def test_only_distances_count() -> None:
    """Turned, moved, and in another unit the scene has the same graph; missing points are missing."""
    net, points = graph(neighbors=4), scene()
    features = torch.randn(2, C, *GRID, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    known = points.any(1, keepdim=True)
    moved = (torch.einsum("ij,njhw->nihw", turn, points) * 7 + 5) * known
    torch.testing.assert_close(net(features, moved), net(features, points))


def test_nodes_without_a_point_tell_nobody_and_are_told_nothing() -> None:
    net, points = graph(neighbors=4), scene(1, missing=0.4)
    features = torch.randn(1, C, *GRID, dtype=torch.float64)
    missing = ~points.any(1)[0]
    assert 0 < missing.sum() < 35
    changed = torch.where(missing, torch.randn_like(features), features)
    first, second = net(features, points)[0], net(changed, points)[0]
    torch.testing.assert_close(first[:, ~missing], second[:, ~missing])
    alone = net(features, torch.zeros_like(points))[0]
    torch.testing.assert_close(alone[:, missing], first[:, missing])
    assert (alone - first)[:, ~missing].abs().max() > 1e-3


def test_images_of_a_batch_are_apart() -> None:
    net, points = graph(neighbors=40), scene(3)
    features = torch.randn(3, C, *GRID, dtype=torch.float64)
    each = torch.cat([net(features[i : i + 1], points[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(features, points), each)


def test_an_exported_graph_takes_any_size() -> None:
    net = graph(neighbors=30)
    batch, height, width = (Dim(name, min=1) for name in ("batch", "height", "width"))
    sizes = ({0: batch, 2: height, 3: width},) * 2
    example = torch.randn(2, C, *GRID, dtype=torch.float64), scene()
    program = torch.export.export(net, example, dynamic_shapes=sizes, strict=False).module()
    for grid in (GRID, (4, 3), (9, 8)):
        inputs = torch.randn(3, C, *grid, dtype=torch.float64), scene(3, grid=grid)
        torch.testing.assert_close(program(*inputs), net(*inputs))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell: str) -> None:
    net = graph(cell=cell, neighbors=3, steps=2)
    features = torch.randn(1, C, 2, 3, dtype=torch.float64, requires_grad=True)
    points = scene(1, grid=(2, 3))
    assert torch.autograd.gradcheck(lambda x: net(x, points), features)
    net(features, points).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(("cell", "expected"), [("vanilla", 787_456), ("lstm", 2_361_856)])
def test_parameters_of_the_graph(cell: str, expected: int) -> None:
    """3C² + 2C as published, and 9C² + 5C, of C = 512."""
    with torch.device("meta"):
        assert count_parameters(GraphNetwork(cell=cell)) == expected


@pytest.mark.parametrize(("encoder", "expected"), [("resnet50", 33_774_184), ("resnet101", 52_766_312)])
def test_parameters(encoder: str, expected: int) -> None:
    with torch.device("meta"):
        net = make_system("gnn3d", 40, (3, 3), encoder=encoder)
    assert count_parameters(net) == expected


@pytest.fixture(scope="module")
def net() -> GNN3D:
    torch.manual_seed(0)
    return GNN3D(5, (3, 3), neighbors=4).double()


@pytest.mark.parametrize(("size", "grid"), [((33, 33), (5, 5)), ((37, 50), (5, 7))])
def test_the_whole(net: GNN3D, size: tuple[int, int], grid: tuple[int, int]) -> None:
    """The classifier sees [h^T; h⁰], each node at the pixel nearest to the middle of its cell."""
    net.eval()
    colors, points = torch.randn(1, 3, *size, dtype=torch.float64), scene(1, grid=size)
    with torch.no_grad():
        found = net([colors, points])
        initial = net.reduce(net.encoder(colors)[-1]).clamp(min=0)
        rows, columns = (
            [int((i + 0.5) * whole / cells) for i in range(cells)]
            for whole, cells in zip(size, grid, strict=True)
        )
        states = net.graph(initial, points[..., rows, :][..., columns])
        weight = net.classifier.weight[:, :, 0, 0]
        expected = torch.einsum("kc,nchw->nkhw", weight[:, :512], states)
        expected += torch.einsum("kc,nchw->nkhw", weight[:, 512:], initial)
        expected += net.classifier.bias[:, None, None]
    assert isinstance(found, SegmentationOutput)
    assert found.branches.shape == (1, 1, 5, *grid)
    torch.testing.assert_close(found.branches[0], expected)
    torch.testing.assert_close(found.ensemble, expected)


def test_gradients_reach_every_parameter(net: GNN3D) -> None:
    net.train()
    output = net([torch.randn(1, 3, 33, 33, dtype=torch.float64), scene(1, grid=(33, 33))])
    output.branches.square().sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == ["alpha"]  # of a single branch
    net.zero_grad()


def test_frozen_statistics() -> None:
    with torch.device("meta"):
        assert not GNN3D(2, (3, 3)).train().encoder.bn1.training
        assert GNN3D(2, (3, 3), frozen_statistics=False).train().encoder.bn1.training


def test_imagenet_weights_load(net: GNN3D, tmp_path: Path) -> None:
    """Of torchvision's names and shapes."""
    own = net.encoder.state_dict()
    state = {key: torch.randn(value.shape) for key, value in own.items() if value.is_floating_point()}
    state |= {"fc.weight": torch.randn(1000, 2048), "fc.bias": torch.randn(1000)}
    assert state["layer3.0.downsample.0.weight"].shape == (1024, 512, 1, 1)
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    torch.save(state, tmp_path / "resnet50.pth")
    report = load_imagenet(net.encoder, tmp_path / "resnet50.pth")
    assert report.missing == report.unexpected == []
    assert torch.equal(net.encoder.layer4[2].conv3.weight, state["layer4.2.conv3.weight"].double())


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((3,), {}, "network=gnn3d takes 2 modalities, got 1"),
        ((3, 3, 3), {}, "network=gnn3d takes 2 modalities, got 3"),
        ((3, 1), {}, "channels must be 3 of colors and 3 of points, .*=rgb,points has them, got 3 and 1"),
        ((3, 3), {"neighbors": 0}, "neighbors must be at least 1, got 0"),
        ((3, 3), {"graph_steps": 0}, "graph_steps must be at least 1, got 0"),
        ((3, 3), {"graph_cell": "lstn"}, "graph_cell must be vanilla or lstm, got 'lstn'.*'lstm'"),
        ((3, 3), {"encoder": "resnet18"}, "encoder must be resnet50 or resnet101 with network=gnn3d, got"),
    ],
)
def test_refusals(channels: tuple[int, ...], options: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        make_system("gnn3d", 40, channels, **options)
