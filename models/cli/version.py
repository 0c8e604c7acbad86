"""``cen --version``: the version, and what a report of a problem needs to know of the machine."""

from __future__ import annotations

import argparse
from typing import Any

from models.training.run_folder import environment

_OMITTED = ("command", "processes")  # of a run


class PrintVersion(argparse.Action):
    """Print version and environment, and end the program."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        found = environment()
        print(f"cen_ext {found.pop('cen_ext')}")
        for name, value in found.items():
            if name not in _OMITTED and value:
                print(f"{name}: {_line(value)}")
        parser.exit()


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {text}" for name, text in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
