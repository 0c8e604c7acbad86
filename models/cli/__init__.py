"""The command line, one module per command: ``cen``, and ``python -m models`` as well.

Each module has ``add``, which adds its parser. The recipe's system (``models.training.registry.System``) does
a command's work for a recipe; the commands themselves know no system.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import models.recipes  # noqa: F401 - fills the registry
from models.cli import (
    analyse,
    compare,
    data,
    evaluate,
    export,
    importing,
    predict,
    prepare,
    recipes,
    report,
    serve,
    train,
    version,
)
from models.data import DataError
from models.training.errors import RecipeError, UsageError, program
from models.training.importable import import_modules, use_current_folder

_COMMANDS = (
    *(data, train, evaluate, compare, report, analyse),
    *(predict, serve, export, importing, prepare, recipes),
)
_IMPORT = "--import"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; ``run`` of what it returns is the command. Wrong ones end the program."""
    parser = argparse.ArgumentParser(prog=program(), description="Train and use the networks.")
    parser.add_argument(
        "--version", action=version.PrintVersion, help="show the version and the environment, and exit"
    )
    parser.add_argument(
        _IMPORT,
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="import a module first that registers encoders, fusions or recipes of your own; may be repeated",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in _COMMANDS:
        command.add(commands)
    arguments, rest = parser.parse_known_args(argv)
    if flags := [argument for argument in rest if argument.startswith("-")]:
        misplaced = any(flag.partition("=")[0] == _IMPORT for flag in flags)
        hint = f"; {_IMPORT} MODULE goes before the command" * misplaced
        parser.error(f"unrecognized arguments: {' '.join(flags)}{hint}")
    if "overrides" in arguments:  # assignments after a flag end up in rest
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command != "train" and _several():
        parser.error(f"{arguments.command} runs in one process: start it without torchrun")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Mistakes of the caller's are printed in one line and give 2."""
    use_current_folder()
    arguments = parse(argv)
    try:
        import_modules(arguments.imports)
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
    except (UsageError, DataError) as error:
        if isinstance(error, RecipeError):
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr, flush=True)
        if _several():  # the threads that connect the processes abort one which ends in the usual way
            os._exit(2)
        return 2
    except BrokenPipeError:  # stdout was closed early, as by head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _several() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
