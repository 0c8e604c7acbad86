"""The export of a trained network: made, written, read back, and compared with the network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

import cen_ext
from cen_ext import use_backend
from models.data import DataError
from models.deployment import operators as compiled_operators
from models.deployment.agreement import Agreement, compare
from models.deployment.formats import FORMATS, Run, check_needs
from models.deployment.interface import Interface, Plain, least_of, multiple_of
from models.deployment.pruning import prune
from models.networks.messages import first_line
from models.training import checkpoint, registry
from models.training.errors import UsageError, writable

_NOISE_SIDE = 128  # of images that stand in for scenes


def export(
    path: Path,
    output: Path,
    format: str,
    *,
    overrides: Sequence[str] = (),
    outputs: str = "ensemble",
    form: str = "separate",
    size: tuple[int, int] | None = None,
    half: bool = False,
    operators: str = "standard",
    scenes: int = 4,
) -> Agreement:
    """Export a trained network without what its exchange discards, and compare the file's answers.

    Generators leave without dropout, and normalize by each image's own statistics.

    Args:
        path: run folder, checkpoint, or file of weights.
        output: the file, of the format's suffix.
        format: of ``FORMATS``: ``"onnx"`` (standard operators of opset 18), ``"torch"`` (``torch.export``),
            or ``"aot"`` (AOTInductor's package, compiled for this machine's processor).
        overrides: ``field=value`` assignments, such as where the validation images are, ``data.root=...``.
        outputs, form: of the ``Interface``.
        size: height and width to fix; None: any will do, but of a network that needs multiples torch's
            programs are for the size of the first scene, as a single unit is a case of its own to them.
        half: compute in float16.
        operators: of ``OPERATORS``: ``"standard"``, PyTorch's, or of an AOTInductor package ``"compiled"``,
            this library's for CPUs wherever they are faster for the first scene; the file brings them along.
        scenes: how many validation scenes to compare on; without a data set here, noise.

    Returns:
        How far file and network agree.

    Raises:
        UsageError: as ``models.load``; another suffix; a library is missing; compiled operators are not
            here, or are not for this file; the network cannot be exported, or the file does not say what the
            network says, and is not kept.
        DataError: the data set is not whole.
    """
    known = FORMATS[format]
    check_needs(format)
    compiled_operators.check(operators, format, half)
    if output.suffix != known.suffix:
        raise UsageError(f"--output must end in {known.suffix} for --format {format}, got {output}")
    writable(output, "--output")
    system = checkpoint.system(path)
    trained = system.load(path, [*overrides, "run.device=cpu"])
    net = trained.net
    names = tuple(spec.name for spec in trained.inputs)
    multiple = multiple_of(net)
    compared = _scenes(system, trained, scenes, multiple)
    if size is None and format != "onnx" and multiple > 1:
        height, width = compared[0].shape[-2:]
        size = (height, width)
    if size is not None:
        if size[0] % multiple or size[1] % multiple:
            raise UsageError(
                f"--size must be multiples of {multiple} for this network, got {size[0]}x{size[1]}"
            )
        compared = [scene if scene.shape[-2:] == size else F.interpolate(scene, size) for scene in compared]
    interface = Interface(names, form, outputs, multiple, size, least_of(net))
    with system.answering(trained), torch.no_grad():
        try:
            program = trace(net, interface, compared[0], half=half, operators=operators)
        except RuntimeError as error:
            why = first_line(error)
            if "Constraints violated" in why:  # whose text speaks of torch's own arguments
                why = "torch.export finds no one program for all sizes and numbers of its images"
            raise UsageError(f"{path} cannot be exported: {why}") from error
        used = compiled_operators.names(program)
        if operators == "compiled" and not used:
            raise UsageError(f"--operators compiled: {path} has no layer that they are faster for")
        metadata = {
            "cen_ext": cen_ext.__version__,
            "interface": asdict(interface),
            "half": half,
            "operators": used,
            **system.description(trained),
        }
        with checkpoint.writing(output) as temporary:
            try:
                known.write(program, interface, metadata, temporary)
            except RuntimeError as error:
                raise UsageError(
                    f"{path} cannot be written as {format}: {first_line(error)}"
                    + "; perhaps it can for one size, --size HEIGHTxWIDTH"
                    * (format == "aot" and size is None)
                ) from error
            found = compare(
                _reference(net, interface),
                known.load(temporary),
                interface,
                compared,
                classes="classes" in metadata,
            )
            if not found.holds(half):
                raise UsageError(f"{output} is not kept, as it does not say what {path} says: {found}")
    return found


@torch.no_grad()
def trace(
    net: torch.nn.Module,
    interface: Interface,
    scene: Tensor,
    *,
    half: bool = False,
    operators: str = "standard",
) -> ExportedProgram:
    """The program of a network that is pruned for it.

    Args:
        net: in evaluation mode.
        interface: the program's inputs and outputs.
        scene: an input ``[M, 3, H, W]``.
        half: compute in float16.
        operators: of ``OPERATORS``.
    """
    compiled = operators == "compiled"
    with use_backend(None if compiled else "reference"):
        if compiled:
            plain = Plain(prune(net, scene).net, interface, layout=torch.channels_last).eval()
            compiled_operators.choose(plain, interface.arguments(scene))
        else:
            plain = Plain(prune(net, scene, multiple=1).net, interface, half).eval()
        # Two of each, and of units of a side, as a size of 1 would be taken to be fixed.
        if interface.size is None:
            scene = F.interpolate(scene, [max(side, 2 * interface.multiple) for side in scene.shape[-2:]])
        example = torch.stack([scene] * 2, 1).flatten(0, 1)
        shapes = interface.dynamic_shapes()
        return torch.export.export(plain, interface.arguments(example), dynamic_shapes=shapes, strict=False)


def _scenes(system: registry.System, trained: Any, count: int, multiple: int) -> list[Tensor]:
    """The inputs to compare on, on the CPU.

    Raises:
        DataError: the data set is not whole.
    """
    try:
        found: list[Tensor] = system.scenes(trained, count)
        return found
    except DataError:
        raise
    except UsageError as error:
        print(
            f"warning: the file is compared with the network on noise, not on images: {error}",
            file=sys.stderr,
            flush=True,
        )
    side = max(_NOISE_SIDE // multiple, 1) * multiple
    shape = (len(trained.inputs), 3, side, side + multiple)
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise) for _ in range(count)]


def _reference(net: torch.nn.Module, interface: Interface) -> Run:
    """The network with the interface's inputs and outputs."""

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        output = net(torch.cat(tuple(inputs)))
        return [getattr(output, name) for name in interface.output_names]

    return run
