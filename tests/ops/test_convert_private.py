"""make_multimodal on norms of single rows that do not exchange: private copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cen_ext import PrivateNorm, make_multimodal, stack_modalities, unstack_modalities
from tests.helpers import vision
from tests.helpers.converted import assert_equals_copies, make_different, run

M = 2


class DoubledNorm(nn.GroupNorm):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class LayerNormAct(nn.LayerNorm):
    """A norm that ends in an activation with parameters, which is shared."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def without_bias() -> nn.Module:
    norm = DoubledNorm(2, 4)
    norm.bias = None
    return norm


class Windows(nn.Module):
    """Folds windows into the batch axis, as Swin does, and normalizes in them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        windows = x.unflatten(2, (2, -1)).unflatten(4, (3, -1)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2)
        windows = self.norm(windows).view(rows, 2, 3, height // 2, width // 3, channels)
        return windows.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


NORMS = {
    "layer of two dimensions": lambda: nn.LayerNorm((4, 6)),
    "layer of two dimensions without bias": lambda: nn.LayerNorm((4, 6), bias=False),
    "layer and act": lambda: LayerNormAct(6),
    "doubled": lambda: DoubledNorm(2, 4, eps=0.1),
    "doubled without bias": without_bias,
    "rms": lambda: nn.RMSNorm(6),
    "windows": Windows,
}
# timm's layers, with what they normalize of [N, 4, 4, 6]
TIMM = {
    "RmsNorm": 6,
    "RmsNorm2d": 4,
    "RmsNormAct": 6,
    "RmsNormAct2d": 4,
    "SimpleNorm": 6,
    "SimpleNorm2d": 4,
}


def network(norm: nn.Module) -> nn.Module:
    """With the norm between convolutions that keep ``[N, 4, 4, 6]``, and a batch norm."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), norm, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
    ).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def images() -> list[Tensor]:
    x = torch.randn(3, 3, 4, 6, dtype=torch.float64)
    return [x, 2 - x]


def assert_becomes_private(norm: nn.Module) -> None:
    net = network(norm)
    for training in (True, False):
        with pytest.warns(UserWarning, match=r"become private copies that do not exchange: '1(\.norm)?' \("):
            assert_equals_copies(net.train(training), images())
    with pytest.warns(UserWarning, match="private"):
        ours = make_multimodal(net, M)
    (private,) = (layer for layer in ours.modules() if isinstance(layer, PrivateNorm))
    assert all(parameter.dim() == 1 for parameter in private.parameters())


@pytest.mark.parametrize("case", NORMS)
def test_each_modality_has_a_norm_of_its_own(case: str) -> None:
    assert_becomes_private(NORMS[case]())


@pytest.mark.parametrize("name", TIMM)
def test_timms_norms_of_single_rows_become_private(name: str) -> None:
    layers = vision.timm().layers
    assert_becomes_private(getattr(layers, name)(TIMM[name]))


@pytest.fixture
def private() -> nn.Module:
    """A network of two modalities with a private norm of each kind, and history."""
    net = network(nn.Sequential(nn.LayerNorm((4, 6)), DoubledNorm(2, 4), nn.RMSNorm(6)))
    with pytest.warns(UserWarning, match="private"):
        ours = make_multimodal(net, M)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += torch.rand_like(parameter)
    return ours


def test_private_norms_are_of_their_originals_classes(private: nn.Module) -> None:
    norms = list(private[1])
    for norm, kind in zip(norms, (nn.LayerNorm, DoubledNorm, nn.RMSNorm), strict=True):
        assert isinstance(norm, kind)
        assert isinstance(norm, PrivateNorm)
        assert "num_modalities=2" in repr(norm)
    assert (norms[0].normalized_shape, norms[1].num_groups) == ((4, 6), 2)
    norms[2].weight.data[1, :3] = 7
    assert torch.equal(norms[2].weight[1, :3], torch.full((3,), 7.0, dtype=torch.float64))


def test_private_norms_are_copied_pickled_compiled_and_exported(private: nn.Module) -> None:
    x = torch.cat(images())
    y, dx, dy = run(copy.deepcopy(private), x)
    again = pickle.loads(pickle.dumps(private))
    compiled = torch.compile(copy.deepcopy(private), backend="aot_eager", fullgraph=True)
    for other in (again, compiled):
        for result, expected in zip(run(other, x, dy), (y, dx, dy), strict=True):
            torch.testing.assert_close(result, expected)
    private.eval()
    torch.testing.assert_close(torch.export.export(private, (x,)).module()(x), private(x))


def test_state_of_one_network_or_of_all_modalities_loads(private: nn.Module) -> None:
    norm = private[1][1]
    tables = torch.rand(M, 4, dtype=torch.float64)
    for weight in (tables[0], tables, tables.flatten()):
        norm.load_state_dict({"weight": weight, "bias": weight})
        for table in (norm.weight, norm.bias):
            torch.testing.assert_close(table, weight.view(-1, 4).expand(M, 4), check_dtype=False)
    assert list(norm.state_dict()) == ["weight", "bias"]
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        norm.load_state_dict({"weight": torch.rand(5), "bias": tables})


def test_rows_that_do_not_fit_are_refused(private: nn.Module) -> None:
    norm = private[1][2]
    with pytest.raises(ValueError, match="has 3 rows, not divisible by 2 modalities"):
        norm(torch.rand(3, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.rand(4, 5, dtype=torch.float64))
    assert norm.weight.shape == (M, 6)  # not the table of the modality that failed


def test_another_thread_may_run_a_private_norm() -> None:
    """While one modality's rows are normalized, the layer has the tables of all."""

    class Spy(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(ours.weight.shape)
            return super().forward(x)

    seen: list[torch.Size] = []
    ours: Any = nn.RMSNorm(6)
    with pytest.warns(UserWarning, match="private"):
        ours = make_multimodal(Spy(6), M)
    seen.clear()
    ours(torch.rand(4, 6))
    assert seen == [(M, 6)] * M


def test_tied_private_norms_stay_tied() -> None:
    net = network(nn.Sequential(nn.RMSNorm(6), nn.RMSNorm(6)))
    net[1][1].weight = net[1][0].weight
    with pytest.warns(UserWarning, match="private"):
        assert_equals_copies(net, images())
    with pytest.warns(UserWarning, match="private"):
        ours = make_multimodal(net, M)
    assert dict(ours[1][0].named_parameters())["weight"] is dict(ours[1][1].named_parameters())["weight"]
    assert ours[1][0].weight.requires_grad


def test_a_network_without_exchange_says_so() -> None:
    with pytest.warns(UserWarning, match="do not exchange, and the network has none that does: '' .RMSNorm"):
        ours = make_multimodal(nn.RMSNorm(6), M)
    assert isinstance(ours, PrivateNorm)


@pytest.mark.filterwarnings("ignore:norms")
def test_rows_may_come_in_sample_order() -> None:
    parts = images()
    net = network(nn.Sequential(nn.LayerNorm((4, 6)), DoubledNorm(2, 4), nn.RMSNorm(6)))
    ours = make_multimodal(net, M, 0, order="sample", example=parts[0])
    copies = [copy.deepcopy(net) for _ in range(M)]
    make_different(ours, copies)
    y = unstack_modalities(ours(stack_modalities(parts, order="sample")), M, order="sample")
    for single, rows, result in zip(copies, parts, y, strict=True):
        torch.testing.assert_close(single(rows), result)
    with pytest.warns(UserWarning, match=r"not get windows folded .* order='sample' .*'1\.norm' \(RMSNorm\)"):
        make_multimodal(network(Windows()), M, order="sample")
    with pytest.raises(
        ValueError, match=r"example: .* first seen in what '1\.norm' \(PrivateNorm\[RMSNorm\]\)"
    ):
        make_multimodal(network(Windows()), M, order="sample", example=parts[0])


def test_data_parallel_needs_sample_order() -> None:
    with pytest.warns(UserWarning, match="private"):
        ours = make_multimodal(nn.RMSNorm(6), M)
    with pytest.raises(RuntimeError, match="order='sample'"):
        ours._replicate_for_data_parallel()
    ours.order = "sample"
    assert isinstance(ours._replicate_for_data_parallel(), PrivateNorm)


@pytest.mark.parametrize("bad", [dict(num_modalities=0), dict(threshold=-1), dict(order="row")])
def test_bad_arguments_are_refused_without_layers_that_exchange(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must"):
        make_multimodal(nn.RMSNorm(6), **{"num_modalities": 2, **bad})
