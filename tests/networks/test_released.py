"""Released checkpoints load; the network then gives the released code's numbers (tests/golden/README.md)."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import models
from models.fusion import Exchange, Fusion
from models.networks.released.segmentation import released_names
from tests.helpers import paths
from tests.helpers.golden_numbers import assert_matches, draw, released_form
from tests.helpers.networks import only_backend, randomise_norms

GOLDEN = json.loads((paths.GOLDEN / "refinenet50.json").read_text())
OUTPUTS = ("rgb", "depth", "ensemble")
MODES = ("frozen", "batch")


def golden_net(encoder: str, fusion: Fusion | None = None) -> models.RefineNet:
    return models.refinenet(encoder, 40, 2, fusion=fusion or Exchange(region="all"), dropout=0.0)


def released_shapes(encoder: str) -> dict[str, list[int]]:
    with torch.device("meta"):
        net = golden_net(encoder)
    return {
        name: list(value.shape)
        for name, value in released_form(released_names(net), net.state_dict()).items()
    }


def inputs_and_target() -> tuple[list[Tensor], Tensor]:
    xs = [draw(f"input:{name}", [2, 3, 65, 97]) for name in ("rgb", "depth")]
    r = np.random.RandomState(zlib.crc32(b"0:target"))
    target = torch.from_numpy(r.randint(0, 40, (2, 65, 97)))
    target[:, :5] = 255
    return xs, target


class Run(NamedTuple):
    """The outputs of one backend with the golden weights."""

    logits: dict[torch.dtype, dict[str, Tensor]]  # eval, by output
    alpha: Tensor
    loss: dict[str, float]  # by mode, as the rest
    gradients: dict[str, dict[str, Tensor]]
    statistics: dict[str, Tensor]  # after a step in batch mode


@pytest.fixture(scope="module", params=["reference", "cpu"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The network on one backend; all comparisons share it."""
    with only_backend(request.param):
        yield golden_run(GOLDEN)


def golden_run(golden: dict[str, Any], fusion: Fusion | None = None) -> Run:
    """The golden weights' outputs, with the gradients that the golden numbers have."""
    net = golden_net("resnet50", fusion)
    models.load_released(net, {key: draw(key, shape) for key, shape in released_shapes("resnet50").items()})
    xs, target = inputs_and_target()

    logits = {}
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            out = net.to(dtype).eval()([x.to(dtype) for x in xs])
        logits[dtype] = dict(zip(OUTPUTS, [*out.branches, out.ensemble], strict=True))

    names = released_names(net)
    loss, gradients = {}, {}
    for mode in MODES:
        net.encoder.frozen_statistics = mode == "frozen"
        net.train().zero_grad()
        out = net([x.double() for x in xs])
        value = sum(loss_at_label_resolution(y, target) for y in (*out.branches, out.ensemble))
        value.backward()
        loss[mode] = value.item()
        of_all = released_form(names, {key: p.grad for key, p in net.named_parameters()})
        # A gigabyte of gradients is dropped; copies keep none of it alive.
        gradients[mode] = {key: of_all[key].clone() for key in golden["grads"][mode]}
    buffers = {key: buffer for key, buffer in net.named_buffers() if key in names}
    return Run(logits, out.alpha.detach(), loss, gradients, released_form(names, buffers))


def loss_at_label_resolution(logits: Tensor, target: Tensor) -> Tensor:
    full = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=255)


def check_logits(run: Run, golden: dict[str, Any], output: str) -> None:
    # A mean error of half an ulp was measured on a processor with AVX2 alone, none with AVX-512.
    assert_matches(run.logits[torch.float32][output], golden["logits"][output], 1e-5, common=2.0**-23)
    # The golden logits are float64 rounded to float32: round ours too.
    assert_matches(run.logits[torch.float64][output].float(), golden["logits"][output], 2e-7)


def check_every_logit(run: Run, file: Path, output: str) -> None:
    golden = torch.from_numpy(np.load(file)[f"eval_{output}"])
    single, double = (run.logits[dtype][output] for dtype in (torch.float32, torch.float64))
    assert (single - golden).abs().max() <= 1e-5 * golden.abs().max()
    one_ulp = 2.0**-23
    torch.testing.assert_close(double.float(), golden, rtol=one_ulp, atol=0)


def check_loss_and_gradients(run: Run, golden: dict[str, Any], mode: str) -> None:
    assert run.loss[mode] == pytest.approx(golden["loss"][mode], rel=1e-10)
    for name, of_parameter in golden["grads"][mode].items():
        assert_matches(run.gradients[mode][name], of_parameter, 1e-6)


@pytest.mark.parametrize("output", OUTPUTS)
def test_eval_logits(run: Run, output: str) -> None:
    check_logits(run, GOLDEN, output)


@pytest.mark.parametrize("output", OUTPUTS)
def test_eval_logits_element_by_element(run: Run, output: str, shared: Path) -> None:
    check_every_logit(run, shared / "golden" / "refinenet50.npz", output)


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients(run: Run, mode: str) -> None:
    check_loss_and_gradients(run, GOLDEN, mode)


def test_running_statistics_and_alpha(run: Run) -> None:
    for entry, golden in GOLDEN["batch_statistics"].items():
        leaf = "running_mean" if entry.startswith("running_mean") else "running_var"
        module = entry.removeprefix(f"{leaf}_")
        assert_matches(run.statistics[f"{module}.{leaf}"].float(), golden, 2e-7)
    torch.testing.assert_close(run.alpha.float(), torch.tensor(GOLDEN["alpha"]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("encoder", ["resnet50", "resnet101", "resnet152"])
def test_key_map_gives_every_released_name_and_shape(encoder: str) -> None:
    lines = sorted(f"{key} {shape}" for key, shape in released_shapes(encoder).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == GOLDEN["shapes_sha256"][encoder]


@pytest.mark.parametrize("encoder", ["resnet50", "resnet101", "resnet152"])
def test_key_map_against_the_listed_shapes(encoder: str, shared: Path) -> None:
    depth = encoder.removeprefix("resnet")
    if depth == "50":
        expected = json.loads((shared / "golden" / "refinenet50.json").read_text())["shapes"]
    else:
        expected = json.loads((shared / "golden" / f"refinenet{depth}_shapes.json").read_text())
    assert released_shapes(encoder) == expected


def test_inputs_are_those_of_the_golden_file(shared: Path) -> None:
    golden = np.load(shared / "golden" / "refinenet50.npz")
    xs, target = inputs_and_target()
    for name, x in zip(("rgb", "depth"), xs, strict=True):
        assert np.array_equal(golden[name], x.numpy())
    assert np.array_equal(golden["target"], target.numpy())


def small_net(num_modalities: int = 2) -> models.RefineNet:
    net = models.refinenet("resnet18", 4, num_modalities, width=4)
    randomise_norms(net)
    torch.nn.init.normal_(net.alpha)
    return net


@pytest.fixture
def checkpoint() -> tuple[models.RefineNet, dict[str, Tensor]]:
    net = small_net()
    state = released_form(released_names(net), net.state_dict())
    return net, {key: value.clone() for key, value in state.items()}


def assert_equal_states(found: models.RefineNet, expected: models.RefineNet) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@pytest.mark.parametrize("wrapper", [None, "segmenter", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("file", [None, "net.pth.tar"])
def test_every_form_of_file_loads(
    checkpoint: tuple[models.RefineNet, dict[str, Tensor]],
    tmp_path: Path,
    wrapper: str | None,
    prefix: str,
    file: str | None,
) -> None:
    net, state = checkpoint
    source: Any = {prefix + key: value for key, value in state.items()}
    if wrapper is not None:
        source = {wrapper: source, "epoch_start": 7}
    if file is not None:
        torch.save(source, tmp_path / file)
        source = tmp_path / file
    other = small_net()
    assert models.load_released(other, path_or_state_dict=source) is other
    assert_equal_states(other, net)


@pytest.mark.parametrize("num_modalities", [1, 3])
def test_any_number_of_modalities_from_safetensors(tmp_path: Path, num_modalities: int) -> None:
    net = small_net(num_modalities)
    state = {k: v.clone() for k, v in released_form(released_names(net), net.state_dict()).items()}
    save_file(state, tmp_path / "net.safetensors")
    assert_equal_states(models.load_released(small_net(num_modalities), tmp_path / "net.safetensors"), net)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    checkpoint: tuple[models.RefineNet, dict[str, Tensor]],
) -> None:
    _, state = checkpoint
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    del state["layer1.0.bn1.bn_1.weight"]
    state["fc.weight"] = torch.zeros(3)
    state["clf_conv.module.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="does not fit") as error:
        models.load_released(net, state)
    for part in (
        "missing: layer1.0.bn1.bn_1.weight;",
        "left over: fc.weight;",
        "clf_conv.module.bias (7,) (expected (4,))",
    ):
        assert part in str(error.value)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_another_number_of_modalities_is_refused(
    checkpoint: tuple[models.RefineNet, dict[str, Tensor]],
) -> None:
    with pytest.raises(ValueError, match=r"does not fit this 3-modality network: missing: bn1\.bn_2"):
        models.load_released(small_net(3), checkpoint[1])
    with pytest.raises(ValueError, match=r"left over: bn1\.bn_1\.weight.* and \d+ more"):
        models.load_released(small_net(1), checkpoint[1])


def test_bad_files_are_named(tmp_path: Path) -> None:
    net = small_net()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such weights file"):
        models.load_released(net, tmp_path / "nowhere.pth")
    texts = {"broken": b"not weights at all", "empty": b"", "weights": b"weights, in words\n", "json": b"{}"}
    for name, text in texts.items():
        for suffix in (".pth", ".safetensors"):
            (tmp_path / name).with_suffix(suffix).write_bytes(text)
            with pytest.raises(ValueError, match=rf"{name}\{suffix}: not a file of weights"):
                models.load_released(net, (tmp_path / name).with_suffix(suffix))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: a folder; expected a \.pth or"):
        models.load_released(net, tmp_path)
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pth")
    with pytest.raises(ValueError, match=r"numbered\.pth: not a state dict"):
        models.load_released(net, tmp_path / "numbered.pth")
    torch.save({"segmenter": [1, 2]}, tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: not a state dict"):
        models.load_released(net, tmp_path / "list.pth")
