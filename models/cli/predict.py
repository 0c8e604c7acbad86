"""``cen predict RUN``."""

from __future__ import annotations

import argparse
import re
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
    parser.add_argument(
        "--rgb", type=Path, help="image, folder of images, quoted 'pattern/*.png', or (segmentation) video"
    )
    parser.add_argument(
        "--depth", type=Path, help="the same of depth; matched to --rgb by name, wildcards or frame"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="MODALITY=PATH", help="the same of any other modality"
    )
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="[MODALITY=]SOURCE",
        help="in place of files (segmentation): a camera's number, a video or a URL; rgb without a modality",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="stop after N frames of --camera")
    parser.add_argument(
        "--watch",
        type=Path,
        metavar="FOLDER",
        help="predict scenes as they appear in FOLDER/MODALITY, until Ctrl-C",
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
    cameras = _cameras(arguments.camera)
    if cameras and arguments.watch:
        raise UsageError("--camera and --watch exclude each other")
    if arguments.frames is not None and (not cameras or arguments.frames < 1):
        raise UsageError("--frames: expected a number from 1 on, beside --camera")
    system = checkpoint.system(arguments.checkpoint)
    run, what = arguments.checkpoint, (inputs, arguments.output, arguments.which, arguments.overrides)
    if cameras:
        system.predict_cameras(run, cameras, *what, arguments.frames)
    elif arguments.watch:
        system.watch(run, arguments.watch, *what)
    else:
        system.predict(run, *what)


def _cameras(given: list[str]) -> dict[str, str]:
    """The sources by modality."""
    cameras: dict[str, str] = {}
    for text in given:
        named = re.fullmatch(r"(\w+)=(.*)", text)
        name, source = named.groups() if named else ("rgb", text)
        if not source or name in cameras:
            raise UsageError(f"--camera: expected one SOURCE, or MODALITY=SOURCE, of each, got {text!r}")
        cameras[name] = source
    return cameras
