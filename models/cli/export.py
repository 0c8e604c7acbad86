"""``cen export RUN --output FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_checkpoint, add_command
from models.training import checkpoint, config


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "export", help="write a run's network, and what it is fed, to one file")
    add_checkpoint(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors or .pt"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    output = checkpoint.network_file(arguments.output)
    path, contents = checkpoint.load(arguments.checkpoint, checkpoint.BEST)
    # The training's data folder and device are matters of that machine.
    recipe, _ = checkpoint.settings_here(contents, ())
    known = config.to_plain(config.without_paths(recipe))
    checkpoint.save_network(output, {**contents, "config": known})
    which = "average of the weights" if contents["task"].get("ema") else "weights"
    print(f"{output}: the {which} of {path}")
