"""Files of weights: what training scripts save beside them, and encoders' weights of other inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.data import IMAGENET_MEAN, IMAGENET_STD
from models.fusion import NoFusion
from models.networks.encoders import ExchangeResNet, load_imagenet
from models.networks.encoders.weights import misfits, read_state_dict
from models.segmentation import refinenet
from models.segmentation.initial import load_weights
from models.segmentation.settings import ModelSettings

STATE = {"module.a": torch.arange(3.0)}
BESIDE = {
    "best_val": np.float64(51.1),
    "epoch": np.int64(174),
    "better": np.bool_(True),
    "confusion": np.arange(6).reshape(2, 3),
    "mean": np.float32([0.5]),
}


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_numbers_and_arrays_of_either_numpy_beside_the_weights(tmp_path: Path, core: str) -> None:
    path = tmp_path / "model-best.pth.tar"
    torch.save({"segmenter": STATE, **BESIDE}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    own = np.float64().__reduce__()[0].__module__.removesuffix(".multiarray").encode()
    assert content.count(own + b".multiarray") == 2  # one name of numbers, one of arrays
    path.write_bytes(content.replace(own + b".multiarray", core.encode() + b".multiarray"))
    assert torch.equal(read_state_dict(path)["a"], STATE["module.a"])


def test_what_would_run_code_is_named(tmp_path: Path) -> None:
    torch.save({"segmenter": STATE, "where": Path("a")}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: .* it holds pathlib\S*Path.*weights_only=False"):
        read_state_dict(tmp_path / "net.pth")


@pytest.mark.parametrize("trained_on", ["rgb", "bgr", "caffe"])
def test_stem_of_weights_trained_on_other_inputs(tmp_path: Path, trained_on: str) -> None:
    """Fed as ever, it computes what the weights' own network computes of the same picture."""
    donor = ExchangeResNet("resnet18", 1).double()
    path = tmp_path / "resnet18.pth"
    torch.save({key: v[0] if v.dim() == 2 else v for key, v in donor.state_dict().items()}, path)
    net = refinenet("resnet18", 4, 1, width=4).double()
    here = {"inputs": [], "classes": []}
    notes = load_weights(net, ModelSettings(weights=path, weights_input=trained_on), here)
    assert len(notes) == {"rgb": 0, "bgr": 1, "caffe": 2}[trained_on]

    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    picture = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    normalised = (picture - mean) / std
    theirs = {"rgb": normalised, "bgr": normalised.flip(1), "caffe": (255 * (picture - mean)).flip(1)}
    expected = donor.conv1(theirs[trained_on])
    # The setting's factors are exact; the file's and the encoder's entries are float64.
    torch.testing.assert_close(net.encoder.conv1(normalised), expected, rtol=1e-12, atol=1e-12)


def test_caffes_stem_is_scaled_to_what_the_network_is_fed(tmp_path: Path) -> None:
    donor, std = ExchangeResNet("resnet18", 1), (0.5, 0.25, 0.125)
    path = tmp_path / "resnet18.pth"
    torch.save({key: v[0] if v.dim() == 2 else v for key, v in donor.state_dict().items()}, path)
    net = refinenet("resnet18", 4, 1, width=4)
    here = {"inputs": [{"name": "depth", "std": [0.993]}, {"name": "rgb", "std": list(std)}], "classes": []}
    load_weights(net, ModelSettings(weights=path, weights_input="caffe"), here)
    expected = donor.conv1.weight.flip(1) * 255 * torch.tensor(std)[:, None, None]
    torch.testing.assert_close(net.encoder.conv1.weight, expected)


@pytest.mark.parametrize("convolutions", ["shared", "private"])
def test_a_stem_of_one_channel_is_the_mean_over_red_green_and_blue(tmp_path: Path, convolutions: str) -> None:
    donor = ExchangeResNet("resnet18", 1)
    path = tmp_path / "resnet18.pth"
    torch.save({key: v[0] if v.dim() == 2 else v for key, v in donor.state_dict().items()}, path)
    net = ExchangeResNet("resnet18", 2, NoFusion(convolutions=convolutions), in_channels=1)
    report = load_imagenet(net, path, bgr=True, scale=(1.0, 2.0, 4.0))
    assert report == ([], [])
    blue, green, red = donor.conv1.weight.detach().unbind(1)
    expected = (red + 2 * green + 4 * blue)[:, None] / 3
    copies = 2 if convolutions == "private" else 1
    torch.testing.assert_close(net.conv1.weight.detach(), expected.repeat(copies, 1, 1, 1))


def test_a_report_of_what_does_not_match_and_other_layers_are_as_ever(tmp_path: Path) -> None:
    donor = ExchangeResNet("resnet18", 1)
    state = {key: v[0] if v.dim() == 2 else v for key, v in donor.state_dict().items()}
    torch.save(state, tmp_path / "resnet18.pth")
    encoder = ExchangeResNet("resnet18", 2)
    assert load_imagenet(encoder, tmp_path / "resnet18.pth", bgr=True, scale=(1.0, 2.0, 4.0)) == ([], [])
    red, green, blue = encoder.conv1.weight.unbind(1)
    assert torch.equal(torch.stack([blue / 4, green / 2, red], 1), donor.conv1.weight)
    assert torch.equal(encoder.layer1[0].conv1.weight, donor.layer1[0].conv1.weight)


def test_a_stem_of_one_channel_gets_the_mean(tmp_path: Path) -> None:
    """On a gray image it computes a third of what the weights' own network computes."""
    donor = ExchangeResNet("resnet18", 1).double()
    torch.save(
        {key: v[0] if v.dim() == 2 else v for key, v in donor.state_dict().items()}, tmp_path / "a.pth"
    )
    encoder = ExchangeResNet("resnet18", 2, in_channels=1).double()
    assert load_imagenet(encoder, tmp_path / "a.pth", bgr=True, scale=(0.5, 0.25, 0.125)) == ([], [])
    gray = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    colors = gray * torch.tensor([0.125, 0.25, 0.5])[:, None, None]  # blue first, as the donor has them
    torch.testing.assert_close(encoder.conv1(gray), donor.conv1(colors) / 3)


def test_misfits() -> None:
    shapes = {"a": (3,), "b": torch.Size([2, 2]), "c": ()}
    state = {"a": torch.zeros(3), "b": torch.zeros(2, 2), "c": torch.zeros(())}
    assert misfits(shapes, state) == ""
    state = {"a": torch.zeros(1, 3), "c": torch.zeros(()), "d": torch.zeros(1)}
    assert misfits(shapes, state) == "missing: b; left over: d; of another shape: a (1, 3) (expected (3,))"
