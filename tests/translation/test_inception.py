"""FID's Inception against the known figures of the network, and its blocks against formulas in numpy."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.training.errors import UsageError
from models.translation.metrics import inception
from models.translation.metrics.inception import Inception, load_inception

Array = np.ndarray


@pytest.fixture(scope="module")
def net() -> Inception:
    """Random weights and statistics; scales that keep activations of the same size through the layers."""
    torch.manual_seed(0)
    net = Inception()
    randomise(net)
    return net


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_mean") or name.endswith("bias"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var") or name.endswith("bn.weight"):
                value.uniform_(0.5, 1.5)
            elif value.dim() == 4:
                value.normal_(0, (2 / value[0].numel()) ** 0.5)


# From the architecture's tables and the parameter list of the weights' file.
SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_2b_3x3.bn.running_var": (64,),
    "Conv2d_3b_1x1.conv.weight": (80, 64, 1, 1),
    "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch3x3_2.conv.weight": (320, 192, 3, 3),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch_pool.bn.bias": (192,),
    "fc.weight": (1008, 2048),
}


def test_parameters_and_shapes(net: Inception) -> None:
    # Inception-v3 without its auxiliary head has 23,834,568 parameters with 1000 classes; here are 8 more.
    assert sum(value.numel() for value in net.parameters()) == 23_834_568 + 8 * (2048 + 1)
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 94
    state = net.state_dict()
    assert {key: tuple(state[key].shape) for key in SHAPES} == SHAPES


def test_sizes_through_the_network(net: Inception) -> None:
    sizes = {}
    hooks = [
        module.register_forward_hook(lambda _, __, y, name=name: sizes.update({name: tuple(y.shape[1:])}))
        for name, module in net.named_children()
    ]
    features = net(torch.rand(2, 3, 64, 48))
    for hook in hooks:
        hook.remove()
    assert features.shape == (2, 2048)
    widths = (
        ("5b", 256, 35),
        ("5d", 288, 35),
        ("6a", 768, 17),
        ("6e", 768, 17),
        ("7a", 1280, 8),
        ("7c", 2048, 8),
    )
    expected = {f"Mixed_{name}": (width, size, size) for name, width, size in widths}
    expected |= {"Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2b_3x3": (64, 147, 147)}
    expected |= {"Conv2d_3b_1x1": (80, 73, 73), "Conv2d_4a_3x3": (192, 71, 71)}
    assert {name: sizes[name] for name in expected} == expected


def network_input(net: Inception, images: Tensor) -> Tensor:
    """The input of the first convolution."""
    seen: list[Tensor] = []
    hook = net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(images)
    hook.remove()
    return seen[0]


def test_images_of_the_networks_size_are_scaled_only(net: Inception) -> None:
    images = torch.rand(1, 3, 299, 299)
    assert torch.equal(network_input(net, images), 2 * images - 1)


def test_other_images_are_resized_between_pixel_centres(net: Inception) -> None:
    """A ramp stays one, and shrinking takes two neighbours only, however many pixels there are."""
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 32, 64)
    position = ((np.arange(299) + 0.5) * 64 / 299 - 0.5).clip(0, 63) / 63
    found = network_input(net, ramp)[0, 0, 7]
    assert np.abs(found.numpy() - (2 * position - 1)).max() < 1e-6  # a few roundings of values below 1
    stripes = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(299).expand(1, 3, 299, 4 * 299)
    assert network_input(net, stripes)[0, 0, 0].unique().tolist() == [0.0]  # mean of 1 and 0, every time


def convolved(x: Array, state: dict[str, Array], name: str, stride: int = 1, same: bool = True) -> Array:
    """ReLU of the norm of the convolution of ``[C, H, W]``, by the definitions."""
    weight = state[f"{name}.conv.weight"]
    height, width = weight.shape[2:]
    if same:
        x = np.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), (1, 2))[:, ::stride, ::stride]
    y = np.tensordot(weight, windows, ((1, 2, 3), (0, 3, 4)))
    mean, var, gain, bias = (
        state[f"{name}.bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return np.maximum((y - mean) / np.sqrt(var + 1e-3) * gain + bias, 0)


def pooled(x: Array, choose: Callable[..., Array], stride: int = 1) -> Array:
    """``choose`` of every 3×3 neighbourhood: what lies outside does not count; with stride 2, only inside."""
    if stride == 1:
        x = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::stride, ::stride]
    return choose(windows, axis=(-2, -1))


def chain(x: Array, state: dict[str, Array], *names: str) -> Array:
    for name in names:
        x = convolved(x, state, name)
    return x


def formula_a(x: Array, s: dict[str, Array]) -> list[Array]:
    return [
        chain(x, s, "branch1x1"),
        chain(x, s, "branch5x5_1", "branch5x5_2"),
        chain(x, s, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        chain(pooled(x, np.nanmean), s, "branch_pool"),
    ]


def formula_b(x: Array, s: dict[str, Array]) -> list[Array]:
    double = chain(x, s, "branch3x3dbl_1", "branch3x3dbl_2")
    return [
        convolved(x, s, "branch3x3", 2, same=False),
        convolved(double, s, "branch3x3dbl_3", 2, same=False),
        pooled(x, np.max, 2),
    ]


def formula_c(x: Array, s: dict[str, Array]) -> list[Array]:
    return [
        chain(x, s, "branch1x1"),
        chain(x, s, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
        chain(x, s, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
        chain(pooled(x, np.nanmean), s, "branch_pool"),
    ]


def formula_d(x: Array, s: dict[str, Array]) -> list[Array]:
    seven = chain(x, s, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    return [
        convolved(chain(x, s, "branch3x3_1"), s, "branch3x3_2", 2, same=False),
        convolved(seven, s, "branch7x7x3_4", 2, same=False),
        pooled(x, np.max, 2),
    ]


def formula_e(choose: Callable[..., Array]) -> Callable[[Array, dict[str, Array]], list[Array]]:
    def formula(x: Array, s: dict[str, Array]) -> list[Array]:
        single, double = chain(x, s, "branch3x3_1"), chain(x, s, "branch3x3dbl_1", "branch3x3dbl_2")
        return [
            chain(x, s, "branch1x1"),
            *(chain(single, s, f"branch3x3_2{side}") for side in "ab"),
            *(chain(double, s, f"branch3x3dbl_3{side}") for side in "ab"),
            chain(pooled(x, choose), s, "branch_pool"),
        ]

    return formula


BLOCKS = {
    "Mixed_5b": formula_a,
    "Mixed_6a": formula_b,
    "Mixed_6c": formula_c,
    "Mixed_7a": formula_d,
    "Mixed_7b": formula_e(np.nanmean),
    "Mixed_7c": formula_e(np.nanmax),  # the slip that FID keeps
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_its_formula(net: Inception, name: str) -> None:
    """In float64: sums of up to 4032 products of size 1, up to five deep, round by some 1e-13."""
    block = deepcopy(net.get_submodule(name)).double()
    channels = next(block.parameters()).shape[1]
    x = torch.randn(1, channels, 7, 6, dtype=torch.float64)
    state = {key: value.numpy() for key, value in block.state_dict().items()}
    expected = np.concatenate(BLOCKS[name](x[0].numpy(), state))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(block(x)[0].numpy(), expected, rtol=1e-11, atol=1e-11)


def test_features_are_the_means_of_the_last_block(net: Inception) -> None:
    seen: list[Tensor] = []
    hook = net.Mixed_7c.register_forward_hook(lambda _, __, y: seen.append(y))
    features = net(torch.rand(1, 3, 80, 80))
    hook.remove()
    np.testing.assert_allclose(features, seen[0].numpy().mean((2, 3)), rtol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(net: Inception, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state = net.state_dict()
    if suffix == ".pth":
        torch.save(state, path)
    else:  # files older than batch counters
        save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    loaded = load_inception(path)
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key])


def test_without_the_file_its_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.pth: no such .*pt_inception-2015-12-05-6726825d\.pth"):
        load_inception(tmp_path / "nothing.pth")
    with pytest.raises(UsageError, match=r"a folder; .*any local path, as \.pth or \.safetensors"):
        load_inception(tmp_path)


def test_other_weights_are_refused(net: Inception, tmp_path: Path) -> None:
    """torchvision's network has the same keys, 1000 classes and an auxiliary head."""
    path = tmp_path / "torchvision.pth"
    state = net.state_dict()
    state["fc.weight"] = torch.zeros(1000, 2048)
    state["AuxLogits.fc.weight"] = torch.zeros(1000, 768)
    del state["Mixed_5b.branch1x1.bn.bias"]
    torch.save(state, path)
    with pytest.raises(UsageError, match="not the weights of FID's Inception") as error:
        load_inception(path)
    for reason in (
        "Mixed_5b.branch1x1.bn.bias is missing, not (64,)",
        "fc.weight is (1000, 2048), not (1008, 2048)",
        "AuxLogits.fc.weight is unknown",
        inception.WEIGHTS,
    ):
        assert reason in str(error.value)
