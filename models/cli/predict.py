"""``cen predict RUN``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_checkpoint, add_command, add_overrides
from models.training import checkpoint
from models.training.errors import UsageError


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "predict",
        help="run a trained network on image files; translation takes their middle square, or all of it "
        "with eval.size=full",
    )
    add_checkpoint(parser)
    add_overrides(parser)
    parser.add_argument("--rgb", type=Path, help="image, folder of images, or (segmentation) video")
    parser.add_argument(
        "--depth", type=Path, help="depth image, folder or video; matched to --rgb by name or frame"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="MODALITY=PATH", help="the same of any other modality"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--which", help="ensemble, or a modality's branch; default: the ensemble, in translation all of them"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    inputs = {name: path for name in ("rgb", "depth") if (path := getattr(arguments, name)) is not None}
    for assignment in arguments.input:
        name, equals, path = assignment.partition("=")
        if not equals:
            raise UsageError(f"--input: expected MODALITY=PATH, got {assignment!r}")
        inputs[name] = Path(path)
    system = checkpoint.system(arguments.checkpoint)
    system.predict(arguments.checkpoint, inputs, arguments.output, arguments.which, arguments.overrides)
