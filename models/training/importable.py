"""Other people's modules: their functions, named ``package.module:function`` on the command line, and what
they register when they are imported, as ``--import package.module`` asks for.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from models.networks.messages import first_line, suggest
from models.training.errors import RecipeError, UsageError

_imported: list[str] = []  # the modules that ``import_modules`` was asked for last


class MissingModule(UsageError):
    """A module is not on the import path."""


def use_current_folder() -> None:
    """Put the current folder first on the import path, as ``python -m`` does and a console script does not.

    Python's own switch against that, ``-P`` or ``PYTHONSAFEPATH``, holds here as well.
    """
    here = str(Path.cwd())
    if not getattr(sys.flags, "safe_path", False) and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def import_modules(names: Iterable[str]) -> None:
    """Import modules for what they register: encoders, fusions, recipes.

    Raises:
        UsageError: a name that is no module's; as ``module_at``.
    """
    _imported.clear()
    for name in names:
        if not _is_dotted(name):
            path = _as_dotted(name)
            hint = f"; did you mean {path!r}?" if _is_dotted(path) else ""
            raise UsageError(f"--import {name}: expected package.module{hint}")
        module_at(name, f"--import {name}")
        _imported.append(name)


def imported(before: Iterable[str] = ()) -> list[str]:
    """The modules that ``import_modules`` was asked for, for a file's record, after those of one before."""
    return list(dict.fromkeys([*before, *_imported]))


def flags(names: Iterable[str]) -> str:
    """What a command line needs before its command to import modules."""
    return "".join(f"--import {name} " for name in names)


@contextmanager
def naming_missing(recorded: Mapping[str, Any]) -> Iterator[None]:
    """Let a UsageError in this context name the modules that were imported for a file's training and are not
    here: what is unknown may be registered there.

    They are named, not imported: a file from elsewhere is not to choose the code that runs, but for the one
    module of its recipe (``registry.recall``).

    Args:
        recorded: of the file, with the modules in ``imports``.
    """
    try:
        yield
    except RecipeError:  # of a module that is there
        raise
    except UsageError as error:
        missing = [name for name in recorded.get("imports", ()) if name not in sys.modules]
        if not missing:
            raise
        raise UsageError(
            f"{error}; the training had {flags(missing)}and this has not, where what is unknown may be "
            "registered: give it before the command, or import it in Python"
        ) from None


def function_at(reference: str) -> Callable[[], Any]:
    """Import the function that ``package.module:function`` names.

    Raises:
        UsageError: not of that form, or no such function in the module; as ``module_at``.
    """
    module_name, _, name = reference.partition(":")
    if not name.isidentifier() or not _is_dotted(module_name):
        path = _as_dotted(module_name)
        hint = f"; did you mean '{path}:{name}'?" if _is_dotted(path) and name.isidentifier() else ""
        raise UsageError(f"recipe {reference!r}: expected package.module:function{hint}")
    module = module_at(module_name, f"recipe {reference!r}")
    found = getattr(module, name, None)
    if callable(found):
        function: Callable[[], Any] = found
        return function
    what = f"has no function {name!r}" if found is None else f"holds {name!r}, but it is no function"
    functions = [key for key, value in vars(module).items() if callable(value)]
    raise UsageError(f"recipe {reference!r}: {_where(module)} {what}{suggest(name, functions)}")


def module_at(name: str, what: str) -> ModuleType:
    """Import a module by its dotted name.

    Args:
        name: such as ``package.module``.
        what: needs the module, for the message.

    Raises:
        MissingModule: it is not on the import path.
        RecipeError: its import fails; chained to the error.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{name}.".startswith(f"{absent}."):
            raise MissingModule(f"{what}: {_not_found(absent)}") from None
        raise RecipeError(
            f"{what}: importing {name} fails with {type(error).__name__}: {first_line(error)}"
        ) from error


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _as_dotted(path: str) -> str:
    """The module that a file's path may stand for."""
    return path.removesuffix(".py").strip("./").replace("/", ".")


def _not_found(name: str) -> str:
    """Say that there is no such module, where it was looked for, and what there is that is like it."""
    parent, _, last = name.rpartition(".")
    if not parent:
        places = [str(Path(place).absolute()) for place in sys.path]
    elif hasattr(sys.modules[parent], "__path__"):
        places = list(sys.modules[parent].__path__)
    else:
        return f"there is no module {name!r}: {_where(sys.modules[parent])} is no package"
    names = [module.name for module in pkgutil.iter_modules(places[:1])]  # mostly of the current folder
    return f"there is no module {name!r} in {', '.join(places)}{suggest(last, names)}"


def _where(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None) or 'no file'})"
