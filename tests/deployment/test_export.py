"""Programs that trained networks are exported to, and what the command refuses."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from cen_ext import Conv3x3, ExchangeBatchNorm2d, max_pool_same
from cen_ext.ops import dispatch
from models.__main__ import main
from models.deployment import operators, prune
from models.deployment.agreement import Agreement, compare
from models.deployment.export import trace
from models.deployment.formats import FORMATS
from models.deployment.interface import Interface, Plain
from models.networks.outputs import SegmentationOutput
from models.segmentation.build import open_validation
from models.translation.inference import translating
from tests.deployment.test_pruning import image, made
from tests.helpers import training_runs, translation_runs
from tests.helpers.networks import randomise_norms

TWO = ("rgb", "depth")


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_runs.prepare_rooms(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(scope="module")
def run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "segmentation"
    assert main(training_runs.command(rooms, output)) == 0
    return output


def onnx() -> None:
    for module in FORMATS["onnx"].needs:
        pytest.importorskip(module, reason="needs onnx, onnxscript and onnxruntime")


def error_of(capsys: pytest.CaptureFixture[str], *command: str | Path) -> str:
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("outputs", ["ensemble", "branches", "all"])
@pytest.mark.parametrize("form", ["separate", "stacked"])
@pytest.mark.parametrize("name", ["own encoder", "three", "late concat", "alone", "private"])
def test_interfaces_return_the_networks_outputs(name, form, outputs):
    """Also where the ensemble is classified once, and where the fusion has a head or one branch."""
    net = made(name)
    if net.alpha is not None:
        torch.nn.init.normal_(net.alpha)
    torch.nn.init.normal_(net.decoder.classifier.weight)  # private ones start alike
    interface = Interface(
        TWO[: net.num_modalities] if net.num_modalities < 3 else ("a", "b", "c"), form, outputs
    )
    x = image(net, 2)
    with torch.no_grad():
        plain, expected = Plain(prune(net, x).net, interface), net(x)
        found = plain(*interface.arguments(x))
    assert len(found) == len(interface.output_names)
    for y, kind in zip(found, interface.output_names, strict=True):
        torch.testing.assert_close(y, getattr(expected, kind), rtol=1e-4, atol=1e-5)


def agreement(format: str, net: torch.nn.Module, interface: Interface, path: Path, side: int) -> Agreement:
    """Write a network, read the file back, and compare on scenes of several sizes."""
    scenes = [image(net, 1, (side, side + 32)), image(net, 1, (side + 32, side))]
    FORMATS[format].write(trace(net, interface, scenes[0]), interface, {"a": ["µ", 1]}, path)
    assert FORMATS[format].metadata(path) == {"a": ["µ", 1]}

    def reference(inputs: Sequence[Tensor]) -> list[Tensor]:
        output = net(torch.cat(tuple(inputs)))
        return [getattr(output, name) for name in interface.output_names]

    with torch.no_grad():
        return compare(reference, FORMATS[format].load(path), interface, scenes, classes=True)


@pytest.mark.parametrize("name", ["own encoder", "pspnet"])
def test_onnx_files_agree_at_any_size(name, tmp_path):
    onnx()
    found = agreement("onnx", made(name), Interface(TWO, outputs="all"), tmp_path / "net.onnx", 64)
    assert found.scenes == 6
    assert found.holds(half=False), found


def test_onnx_files_have_standard_operators_and_the_interfaces_names(tmp_path):
    onnx()
    import onnx as library

    net, interface, path = made("own encoder"), Interface(TWO), tmp_path / "net.onnx"
    FORMATS["onnx"].write(trace(net, interface, image(net)), interface, {}, path)
    model = library.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert [each.name for each in model.graph.input] == ["rgb", "depth"]
    assert [each.name for each in model.graph.output] == ["ensemble"]
    shapes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input]
    assert all(shape[1] == 3 and all(isinstance(shape[i], str) for i in (0, 2, 3)) for shape in shapes)
    library.checker.check_model(model)


@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_programs_agree_at_any_size(form, tmp_path):
    net, interface = made("own encoder"), Interface(TWO, form, "all")
    found = agreement("torch", net, interface, tmp_path / "net.pt2", 64)
    assert found.holds(half=False), found


@pytest.mark.parametrize("side", [32, 64])
def test_generators_agree_by_each_images_statistics(side, tmp_path):
    """Programs for one size; an ONNX file for any multiple, traced at two units of each side."""
    onnx()
    torch.manual_seed(0)
    net = models.unet(size=32, base_width=4, threshold=0.02).eval()
    randomise_norms(net)
    with translating(net, dropout=False):
        fixed = Interface(TWO, multiple=32, size=(side, side))
        scenes = [image(net, 1, (side, side)) for _ in range(2)]
        path = tmp_path / "net.pt2"
        FORMATS["torch"].write(trace(net, fixed, scenes[0]), fixed, {}, path)
        with torch.no_grad():
            expected = net(scenes[1]).ensemble
        (found,) = FORMATS["torch"].load(path)(fixed.arguments(scenes[1]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        any_size = Interface(TWO, outputs="all", multiple=32)
        assert agreement("onnx", net, any_size, tmp_path / "net.onnx", side).holds(half=False)


def test_the_command_writes_what_it_has_compared(run, rooms, tmp_path, capsys):
    file = tmp_path / "new" / "net.pt2"
    assert main(["export", str(run), "--output", str(file), "--scenes", "2"]) == 0
    printed = capsys.readouterr()
    assert f"{file}: compared with the network on 6 scenes: largest difference" in printed.out
    assert "warning" not in printed.err
    metadata = FORMATS["torch"].metadata(file)
    trained = models.load(run, ["run.device=cpu"])
    assert metadata["interface"]["modalities"] == ["rgb", "depth"]
    assert metadata["classes"] == list(trained.class_names)
    assert [each["name"] for each in metadata["inputs"]] == ["rgb", "depth"]
    assert metadata["inputs"][0]["std"] == list(trained.inputs[0].std)
    assert str(rooms) not in json.dumps(metadata)
    sample = open_validation(trained.recipe)[0]
    images = trained.read(**trained_files(rooms, sample.name))
    with torch.no_grad():
        expected = trained.net(images).ensemble
    (found,) = FORMATS["torch"].load(file)([image[None] for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def trained_files(rooms: Path, name: str) -> dict[str, Path]:
    """A scene's files."""
    found = {kind: next((rooms / kind).rglob(f"{name}.*")) for kind in ("rgb", "depth")}
    return found


def test_without_its_data_a_network_is_compared_on_noise(run, tmp_path, capsys):
    weights = tmp_path / "net.safetensors"
    assert main(["export", str(run), "--output", str(weights)]) == 0
    assert main(["export", str(weights), "--output", str(tmp_path / "net.pt2"), "--scenes", "1"]) == 0
    assert "on noise, not on images: data.root must be set" in capsys.readouterr().err


def test_a_file_that_says_something_else_is_not_kept(run, tmp_path, capsys, monkeypatch):
    def wrong(path: Path) -> object:
        load = FORMATS["torch"].load(path)
        return lambda inputs: [-y for y in load(inputs)]

    broken = FORMATS["torch"]._replace(load=wrong)
    monkeypatch.setitem(FORMATS, "onnx", broken._replace(suffix=".onnx"))
    error = error_of(capsys, "export", run, "--output", tmp_path / "net.onnx", "--scenes", "1")
    assert f"net.onnx is not kept, as it does not say what {run} says: 5 scenes" in error
    assert list(tmp_path.iterdir()) == []


class Small(nn.Module):
    """A 3x3 convolution between exchanging norms, and max pooling."""

    num_modalities = 2

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 64, 3, 4, 1), Conv3x3(64, 64)
        self.norms = nn.ModuleList(ExchangeBatchNorm2d(64, 2, threshold=0.1) for _ in range(2))

    def forward(self, x: Tensor) -> SegmentationOutput:
        y = max_pool_same(self.norms[1](self.conv(self.norms[0](self.stem(x)))), 5)
        branches = y.unflatten(0, (2, -1))
        return SegmentationOutput(branches, branches.mean(0), None)


def test_compiled_operators_stay_in_packages(tmp_path):
    """Where they are faster for the scene; they run at any size then."""
    if not dispatch.IS_COMPILED:
        pytest.skip("needs the compiled part")
    torch.manual_seed(0)
    net, interface, path = Small().eval(), Interface(TWO), tmp_path / "net.pt2"
    randomise_norms(net)
    scenes = [image(net, 1, size) for size in ((64, 96), (33, 47))]
    assert operators.names(trace(net, interface, scenes[0])) == []
    small = trace(net, interface, scenes[1], operators="compiled")
    assert operators.names(small) == ["cen_ext::max_pool_same"]
    program = trace(net, interface, scenes[0], operators="compiled")
    assert operators.names(program) == ["cen_ext::conv3x3", "cen_ext::max_pool_same"]
    FORMATS["aot"].write(program, interface, {}, path)
    with zipfile.ZipFile(path) as package:
        (name,) = (name for name in package.namelist() if name.endswith("/operators.so"))
        assert package.read(name) == operators.library().read_bytes()

    def reference(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [net(torch.cat(tuple(inputs))).ensemble]

    with torch.no_grad():
        found = compare(reference, FORMATS["aot"].load(path), interface, scenes, classes=False)
    assert found.scenes == 6
    assert found.holds(half=False), found


def test_compiled_operators_that_are_not_here_are_refused(run, capsys, tmp_path, monkeypatch):
    command = ["export", run, "--output", tmp_path / "net.pt2", "--format", "aot", "--operators", "compiled"]
    monkeypatch.setattr(dispatch, "_NOT_COMPILED", "the compiled part is missing")
    assert "--operators compiled is not possible here: the compiled part is missing" in error_of(
        capsys, *command
    )
    assert list(tmp_path.iterdir()) == []


def test_half_precision_has_a_tolerance_of_its_own(tmp_path):
    net, interface = made("own encoder"), Interface(TWO)
    x = image(net, 1)
    program = trace(net, interface, x, half=True)
    FORMATS["torch"].write(program, interface, {}, tmp_path / "half.pt2")
    with torch.no_grad():
        expected = net(x).ensemble
    (found,) = FORMATS["torch"].load(tmp_path / "half.pt2")(interface.arguments(x))
    assert found.dtype == torch.float32
    difference = (found - expected).abs().max().item()
    largest = expected.abs().max().item()
    assert Agreement(1, difference, largest, 1.0).holds(half=True)
    assert not Agreement(1, difference, largest, 1.0).holds(half=False)
    stored = torch.export.load(tmp_path / "half.pt2").state_dict
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize("wrong", ["nan", "inf"])
def test_what_is_no_number_agrees_with_nothing(wrong):
    """Wherever among the outputs it is."""
    scenes = [torch.zeros(2, 3, 40, 48), torch.ones(2, 3, 40, 48)]

    def mean(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(tuple(inputs)).mean((2, 3))]

    def broken(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.where(y == 0, float(wrong), y) for y in mean(inputs)]

    interface = Interface(TWO)
    assert compare(mean, mean, interface, scenes, classes=False).holds(half=False)
    assert not compare(mean, broken, interface, scenes, classes=False).holds(half=True)


@pytest.mark.parametrize(
    ("agreement", "half", "holds"),
    [
        (Agreement(1, 0.9e-4, 0.5, 1.0), False, True),
        (Agreement(1, 1.1e-4, 0.5, 1.0), False, False),
        (Agreement(1, 9e-4, 10.0, 1.0), False, True),
        (Agreement(1, 0.0, 1.0, 0.9998), False, False),
        (Agreement(1, 1e-2, 1.0, 0.995), True, True),
        (Agreement(1, float("nan"), 1.0, 1.0), True, False),
    ],
)
def test_what_counts_as_agreement(agreement, half, holds):
    assert agreement.holds(half) == holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--output", "net.safetensors", "--outputs", "all"],
            "--outputs goes with --format onnx, torch, aot",
        ),
        (["--output", "net.pt", "--half"], "--half goes with --format"),
        (["--output", "net.pt", "data.root=x"], "field=value goes with --format"),
        (
            ["--output", "net.pt2", "--format", "onnx"],
            "--output must end in .onnx for --format onnx, got net.pt2",
        ),
        (
            ["--output", "net.pt", "--format", "safetensors"],
            "must end in .safetensors for --format safetensors",
        ),
        (["--output", "net.tflite"], "--output must end in .safetensors or .pt for weights, got net.tflite"),
        (["--output", "net.pt", "--operators", "compiled"], "--operators goes with --format"),
        (
            ["--output", "net.pt2", "--operators", "compiled"],
            "--operators compiled goes with --format aot, not with torch",
        ),
        (
            ["--output", "net.pt2", "--format", "aot", "--operators", "compiled", "--half"],
            "--operators compiled computes in float32: it does not go with --half",
        ),
        (["--output", "net.pt2", "--scenes", "0"], "--scenes must be at least 1, got 0"),
    ],
)
def test_contradicting_options_are_refused(options, message, run, capsys, tmp_path, monkeypatch):
    onnx()
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, "export", run, *options)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_a_generator_cannot_take_are_refused(tmp_path, capsys):
    views = translation_runs.prepare_views(tmp_path / "views")
    output = tmp_path / "run"
    settings = [*translation_runs.TINY, f"data.root={views}", f"run.output={output}"]
    assert main(["train", "synthetic_translation_demo", *settings, "optim.stages.0.steps=1"]) == 0
    file = tmp_path / "net.pt2"
    command = ["export", output, "--output", file, "--scenes", "2"]
    assert "--size must be multiples of 32" in error_of(capsys, *command, "--size", "48x64")
    assert main([str(part) for part in command]) == 0
    assert "compared with the network on 5 scenes" in capsys.readouterr().out
    assert FORMATS["torch"].metadata(file)["target"]["name"]


def test_the_library_that_is_missing_is_named(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(needs=("no_such_library",)))
    error = error_of(capsys, "export", run, "--output", tmp_path / "net.onnx")
    assert "--format onnx needs no_such_library: pip install 'cen_ext[onnx]'" in error


@pytest.mark.parametrize("system", ["segmentation", "translation"])
def test_networks_are_pruned_as_they_are_loaded(system, run, rooms, tmp_path):
    if system == "segmentation":
        path, files = run, trained_files(rooms, open_validation(models.load(run).recipe)[0].name)
    else:
        views = translation_runs.prepare_views(tmp_path / "views")
        path = tmp_path / "run"
        settings = [*translation_runs.TINY, f"data.root={views}", f"run.output={path}"]
        assert main(["train", "synthetic_translation_demo", *settings, "optim.stages.0.steps=1"]) == 0
        name = next((views / "edge_texture").rglob("*.png")).name.replace("edge_texture", "*")
        files = {kind: next((views / kind).rglob(name)) for kind in translation_runs.DOMAINS}
    usual, pruned = (models.load(path, ["run.device=cpu"], prune=prune) for prune in (False, True))
    assert type(pruned) is type(usual)
    expected, found = usual.predict(**files), pruned.predict(**files)
    for name, values in expected.items():
        assert abs(values.astype(float) - found[name]).mean() < 0.01
