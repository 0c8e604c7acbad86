"""Paths with wildcards, whose files belong together by what the wildcards matched."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path

from models.data.files import composed
from models.data.images import FILE_SUFFIXES
from models.networks.messages import suggest
from models.training.errors import UsageError

_WILDCARD = re.compile(r"\*\*/?|\*|\?|\[!?\]?[^\]]*\]")
_SEPARATORS = ("_", "-", "__")

Matched = tuple[str, ...]  # what each wildcard of a pattern matched, in their order


def is_pattern(path: Path) -> bool:
    """Whether a path has wildcards, ``*``, ``?``, ``[...]`` or ``**``, and is no file or folder itself."""
    return _WILDCARD.search(path.as_posix()) is not None and not path.exists()


def match_patterns(
    patterns: Mapping[str, Path], options: Mapping[str, str], partial: bool = False, remedy: str = ""
) -> dict[str, dict[str, Path]]:
    """By scene, named by what the wildcards matched and in order of that, the file of every modality.

    Args:
        patterns: by modality the pattern of its files; ``data/*/rgb_*.png`` and ``data/*/depth_*.png`` pair
            what both wildcards matched alike: ``data/kitchen/rgb_7.png`` is of the scene ``kitchen_7``.
        options: by modality the option that gave it, for messages.
        partial: whether scenes may lack modalities.
        remedy: what the message of a missing counterpart is to end in.

    Raises:
        UsageError: a path is none with wildcards, or has another number of them; nothing is matched; a
            counterpart is missing, if not ``partial``; scenes have the same name.
    """
    first, *others = patterns
    for kind, pattern in patterns.items():
        if not is_pattern(pattern):
            raise UsageError(
                f"{options[kind]}: {pattern} has no wildcard; give a pattern for every modality, or for none"
            )
    counts = {kind: len(_WILDCARD.findall(pattern.as_posix())) for kind, pattern in patterns.items()}
    for kind in others:
        if counts[kind] != counts[first]:
            raise UsageError(
                f"{options[kind]}: {patterns[kind]} has {counts[kind]} wildcards, but {patterns[first]} "
                f"{counts[first]}: files pair by what these match, so that there must be as many"
            )
    found = {kind: _matches(pattern, options[kind]) for kind, pattern in patterns.items()}
    if not partial:
        for files in found.values():
            for key, file in files.items():
                for other, counterparts in found.items():
                    if key not in counterparts:
                        near = suggest("_".join(key), ["_".join(each) for each in counterparts])
                        raise UsageError(f"{file} has no counterpart in {patterns[other]}{near}{remedy}")
    keys = sorted({key for files in found.values() for key in files})
    names = _names(keys, patterns[first])
    return {
        name: {kind: files[key] for kind, files in found.items() if key in files}
        for name, key in zip(names, keys, strict=True)
    }


def _matches(pattern: Path, option: str) -> dict[Matched, Path]:
    """The images that a pattern matches, by what its wildcards did."""
    text = pattern.as_posix()
    parts, end = "", 0
    for wildcard in _WILDCARD.finditer(text):
        parts += re.escape(text[end : wildcard.start()]) + _expression(wildcard.group())
        end = wildcard.end()
    expression = re.compile(parts + re.escape(text[end:]), re.DOTALL)
    found: dict[Matched, Path] = {}
    for name in sorted(glob.glob(text, recursive=True)):  # noqa: PTH207 - patterns may be absolute
        path = Path(name)
        matched = expression.fullmatch(path.as_posix())
        if matched and path.suffix.lower() in FILE_SUFFIXES and path.is_file():
            key = tuple(composed(part or "") for part in matched.groups())
            if (twin := found.setdefault(key, path)) != path:
                raise UsageError(
                    f"{option}: {twin} and {path} match {pattern} alike: which one is the scene's?"
                )
    if not found:
        raise UsageError(f"{option}: {pattern} matches no image ({', '.join(sorted(FILE_SUFFIXES))})")
    return found


def _expression(wildcard: str) -> str:
    """A group of a regular expression that matches what a wildcard does."""
    if wildcard.startswith("["):
        inner = wildcard[1:-1].replace("\\", r"\\")
        negated = inner.startswith("!")
        inner = inner[negated:]
        escaped = "\\" * inner.startswith("^")  # a letter to glob, a negation to re
        return f"([{'^' * negated}{escaped}{inner}])"
    return {"**/": "(?:(.*)/)?", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}[wildcard]


def _names(keys: list[Matched], pattern: Path) -> list[str]:
    """A name for each scene, unique."""
    for separator in _SEPARATORS:
        names = [separator.join(filter(None, key)).replace("/", separator) or "scene" for key in keys]
        if len(set(names)) == len(names):
            return names
    name = next(name for name in names if names.count(name) > 1)
    raise UsageError(f"{pattern}: two scenes would be named {name}; give patterns that match fewer files")
