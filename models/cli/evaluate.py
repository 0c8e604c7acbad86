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
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    system = checkpoint.system(arguments.checkpoint)
    system.evaluate(arguments.checkpoint, arguments.overrides, arguments.output)
