"""``cen train RECIPE``."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.cli.arguments import Commands, add_command, add_overrides, add_recipe


def add(commands: Commands) -> None:
    """Add the command's parser."""
    parser = add_command(commands, "train", help="train a recipe")
    add_recipe(parser)
    add_overrides(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="RUN",
        help="continue a run: its folder or a checkpoint of it; without RUN, the one in run.output",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from models.training.train import train

    resume, overrides = arguments.resume, arguments.overrides
    if isinstance(resume, str):
        if "=" in resume and not Path(resume).exists():  # `--resume field=value` names no path
            overrides, resume = [resume, *overrides], True
        else:
            resume = Path(resume)
    return train(arguments.recipe, overrides, resume)
