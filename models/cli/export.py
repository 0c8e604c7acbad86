"""``cen export RUN --output FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_checkpoint, add_command, add_overrides
from models.deployment.export import export
from models.deployment.formats import FORMATS
from models.deployment.interface import FORMS, OUTPUTS
from models.deployment.operators import OPERATORS
from models.training import checkpoint, config
from models.training.errors import UsageError

_WEIGHTS = "safetensors"
_BY_SUFFIX = {".onnx": "onnx", ".pt2": "torch"}


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "export",
        help="write a run's network to one file: its weights for this toolkit, or a program for others",
    )
    add_checkpoint(parser)
    add_overrides(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors, .pt, .onnx or .pt2"
    )
    parser.add_argument(
        "--format",
        choices=(_WEIGHTS, *FORMATS),
        help="safetensors: weights and settings, for this toolkit; onnx: for ONNX Runtime, OpenVINO and the "
        "like; torch: for torch.export.load; aot: compiled by AOTInductor for this machine's processor; "
        "default: what FILE's suffix says",
    )
    parser.add_argument(
        "--outputs", choices=OUTPUTS, help="of a program; default: the ensemble's logits, or image"
    )
    parser.add_argument(
        "--inputs",
        choices=FORMS,
        help="of a program: one for each modality (default), or all modalities stacked on the batch axis",
    )
    parser.add_argument(
        "--size",
        type=size_of,
        metavar="HxW",
        help="height and width that a program is for; default: any; a generator's .pt2 is for one size, by "
        "default the first scene's",
    )
    parser.add_argument("--half", action="store_true", help="a program that computes in float16")
    parser.add_argument(
        "--operators",
        choices=OPERATORS,
        help="of --format aot: standard (default), PyTorch's alone; compiled: this library's for CPUs where "
        "they are faster, which the file brings along",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        metavar="N",
        help="compare a program with the network on N validation images; default: 4",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    name = arguments.format or _BY_SUFFIX.get(output.suffix, _WEIGHTS)
    if name == _WEIGHTS:
        _write_weights(arguments)
        return
    scenes = 4 if arguments.scenes is None else arguments.scenes
    if scenes < 1:
        raise UsageError(f"--scenes must be at least 1, got {scenes}")
    agreement = export(
        arguments.checkpoint,
        output,
        name,
        overrides=arguments.overrides,
        outputs=arguments.outputs or OUTPUTS[0],
        form=arguments.inputs or FORMS[0],
        size=arguments.size,
        half=arguments.half,
        operators=arguments.operators or OPERATORS[0],
        scenes=scenes,
    )
    print(f"{output}: compared with the network on {agreement}")


def size_of(text: str) -> tuple[int, int]:
    """Height and width, written 480x640."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, such as 480x640, got {text!r}")
    return int(height), int(width)


def _write_weights(arguments: argparse.Namespace) -> None:
    """Write what the toolkit itself reads again.

    Raises:
        UsageError: options that are a program's; as ``checkpoint.network_file``.
    """
    for option in ("outputs", "inputs", "size", "half", "operators", "scenes", "overrides"):
        if getattr(arguments, option):
            what = "field=value" if option == "overrides" else f"--{option}"
            raise UsageError(f"{what} goes with --format {', '.join(FORMATS)}, not with a file of weights")
    output = checkpoint.network_file(arguments.output)
    if arguments.format is not None and output.suffix != f".{_WEIGHTS}":
        raise UsageError(f"--output must end in .{_WEIGHTS} for --format {_WEIGHTS}, got {output}")
    path, contents = checkpoint.load(arguments.checkpoint, checkpoint.BEST)
    # The training's data folder and device are matters of that machine.
    recipe, _ = checkpoint.settings_here(contents, ())
    known = config.to_plain(config.without_paths(recipe))
    checkpoint.save_network(output, {**contents, "config": known})
    which = "average of the weights" if contents["task"].get("ema") else "weights"
    print(f"{output}: the {which} of {path}")
