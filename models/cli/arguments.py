"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # returned by ``add_subparsers``


def add_command(commands: Commands, name: str, help: str, **options: Any) -> argparse.ArgumentParser:
    """A command's parser; its help stands in the list of commands and above its own arguments."""
    return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **options)


def add_recipe(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a name that recipes lists, or package.module:function, one of your own",
        **options,
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN",
        help="run folder (its best.pt), a checkpoint, or a file that export or import wrote",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="settings to change; recipes RECIPE lists them"
    )
