"""``cen evaluate RUN``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_checkpoint, add_command, add_overrides
from models.training import checkpoint


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "evaluate", help="measure a trained network on the validation images")
    add_checkpoint(parser)
    add_overrides(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write results; default: beside the checkpoint"
    )
    parser.add_argument(
        "--corrupt",
        action="append",
        default=[],
        metavar="MODALITY=KIND:LEVEL",
        help="measure segmentation with corrupted inputs as well: missing, blank, noise:SIGMA, holes:SHARE "
        "or shift:PIXELS of a modality, several separated by commas; a modality alone, or all, stands for a "
        "standard list; may be repeated",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    system = checkpoint.system(arguments.checkpoint)
    overrides, output = arguments.overrides, arguments.output
    if arguments.corrupt:
        system.evaluate_corrupted(arguments.checkpoint, arguments.corrupt, overrides, output)
    else:
        system.evaluate(arguments.checkpoint, overrides, output)
