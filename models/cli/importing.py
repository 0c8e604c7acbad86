"""``cen import RELEASED --recipe RECIPE --output FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_command, add_overrides
from models.training import registry


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "import",
        help="make a file for evaluate and predict of a network that the paper's authors released",
    )
    parser.add_argument("released", type=Path, metavar="RELEASED", help="the authors' .pth or .pth.tar")
    add_overrides(parser)
    parser.add_argument(
        "--recipe",
        required=True,
        help="the recipe of such networks: nyudv2_released_refinenet101, ..., or package.module:function",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="ends in .safetensors or .pt"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    system = registry.system_of(registry.find(arguments.recipe))
    system.import_released(arguments.released, arguments.recipe, arguments.overrides, arguments.output)
