"""Typed settings: nested frozen dataclasses, changed field by field with ``path.to.field=value``.

A settings dataclass declares each field with ``setting``. Types: bool, int, float, str, Path, Literal of
strings, tuples of these, unions of them and None (a text is of the first member that it can be), another
settings dataclass, a tuple of those (addressed by index, ``optim.stages.0.encoder_lr``), or a ``choice``
among the registered dataclasses of one kind. A
``__post_init__`` that raises a ValueError beginning with the field's name validates values.

Why not a library. These settings, a frozen dataclass that holds a tuple of dataclasses, were tried with three
(Python 3.11; CPU time of the import beyond a bare interpreter's, this module 75 ms):

- OmegaConf 2.4.0, 145 ms: suggests the nearest name within a group, not across groups (``rate`` for
  ``inner.rate``), and merging ``stages.1.rate=2`` from a list of assignments is a TypeError, ``names=rgb``
  a ValidationError.
- tyro 1.0.17, 165 ms: takes all of them, as ``--stages.1.rate 2``, and suggests; but 62 to 86 fields become
  flags among the commands' own, and its errors are boxes of several lines.
- simple-parsing 0.1.9, 152 ms: a tuple of dataclasses is a NotImplementedError.

None of them knows which fields may change when a run is resumed, or which ones the command line gave: beside
any of them ``differing``, ``changes``, ``describe``, ``recorded`` and ``forget_given`` would stay.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from models.networks.messages import suggest
from models.networks.registry import Registry
from models.training.errors import UsageError


class _Dataclass(Protocol):
    """An object of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


C = TypeVar("C", bound=_Dataclass)
_BOOLS = {"true": True, "false": False}


def setting(default: Any, help: str, *, resumable: bool = False) -> Any:
    """A field with its one-line description; a ``resumable`` one may change when a run is resumed."""
    return dataclasses.field(default=default, metadata={"help": help, "resumable": resumable})


def choice(default: Any, help: str, registry: Registry[Any]) -> Any:
    """A field that holds one of a registry's dataclasses, such as a fusion.

    ``path=name`` chooses one with its defaults, except that fields of both that are ``carried`` keep their
    values; ``path.option=value`` sets an option of the chosen one.
    """
    return dataclasses.field(default=default, metadata={"help": help, "registry": registry})


def _help(field: dataclasses.Field[Any]) -> str:
    """A field's description; a choice's names what can be chosen, which other modules may add to."""
    registry = field.metadata.get("registry")
    names = "" if registry is None else f": {', '.join(registry.names())}"
    return f"{field.metadata['help']}{names}"


def recorded() -> Any:
    """A field for the names of the fields beside it that ``override`` has set; itself it cannot be set."""
    return dataclasses.field(default=(), compare=False, metadata={"recorded": True})


def override(config: C, assignments: Sequence[str]) -> C:
    """The settings with ``path.to.field=value`` assignments applied, left to right.

    Raises:
        UsageError: no ``=``; an unknown field (the nearest name is suggested); a value of the wrong type or
            one that the settings' own checks refuse; a choice that discards an option assigned before it.
    """
    renamed = getattr(type(config), "renamed", {})
    given: dict[str, str] = {}
    before = flatten(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = renamed.get(path, path)
        if not equals:
            hint = "" if path in before else _suggest_path(path, list(before))
            raise UsageError(f"expected field=value, got {assignment!r}{hint}")
        config = _assign(config, path.split("."), text, path, list(before))
        after = flatten(config)
        for other, earlier in given.items():
            if other != path and after.get(other) != before[other]:
                raise UsageError(
                    f"{earlier} has no effect: {assignment}, which follows, discards it; leave it out, or "
                    f"give it after {assignment} if that has such an option"
                )
        given[path] = assignment
        before = after
    return config


def forget_given(config: C) -> C:
    """The settings without the record of what ``override`` has set: as if they were a recipe's own."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("recorded"):
            changes[field.name] = ()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = forget_given(value)
    return dataclasses.replace(config, **changes)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted path; of other dataclasses, mappings are groups as well."""
    if dataclasses.is_dataclass(config):
        children = [
            (field.name, getattr(config, field.name))
            for field in dataclasses.fields(config)
            if not field.metadata.get("recorded")
        ]
        children = [*_chosen(config), *children]
    elif _is_group(config):
        children = [(str(index), item) for index, item in enumerate(config)]
    elif isinstance(config, Mapping):
        children = list(config.items())
    else:
        return {prefix: config}
    dotted = f"{prefix}." if prefix else ""
    return {path: value for name, child in children for path, value in flatten(child, dotted + name).items()}


def describe(config: Any) -> list[str]:
    """One line a field, as it can be overridden: ``path=value  # what it means``."""
    values = {path: f"{path}={show(value)}" for path, value in flatten(config).items()}
    width = max(map(len, values.values()))
    return [f"{line:<{width}}  # {_help(_field(config, path))}" for path, line in values.items()]


def show(value: Any) -> str:
    """A value the way an override writes it."""
    if isinstance(value, tuple):
        return ",".join(map(show, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def to_plain(config: Any) -> Any:
    """The settings as dicts, lists, numbers and strings: for JSON and for checkpoints."""
    if dataclasses.is_dataclass(config):
        plain = {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {**plain, **{name: {"name": kind, **plain[name]} for name, kind in _chosen(config)}}
    if isinstance(config, tuple):
        return [to_plain(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def without_paths(config: C) -> C:
    """The settings with every path set to none: what lies where is one machine's matter."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path):
            changes[field.name] = None
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = without_paths(value)
    return dataclasses.replace(config, **changes)


def from_plain(default: C, plain: Mapping[str, Any]) -> C:
    """Settings of the type of ``default`` from ``to_plain``'s return; absent fields are the default's.

    What an earlier version wrote is translated by the type's ``from_old``, where it has such.

    Raises:
        UsageError: a choice is of a name that is not registered.
    """
    hints = get_type_hints(type(default))
    plain = default.from_old(plain) if hasattr(default, "from_old") else plain
    plain = _with_chosen(default, plain)
    return dataclasses.replace(
        default,
        **{
            name: _restore(value, hints[name], getattr(default, name))
            for name, value in plain.items()
            if name in hints
        },
    )


def changes(old: Any, new: Any, prefix: str = "") -> dict[str, str]:
    """List by path the values that differ, as ``path: old -> new``; of settings or other dataclasses."""
    before, after = flatten(old, prefix), flatten(new, prefix)
    return {
        path: f"{path}: {show(before.get(path))} -> {show(after.get(path))}"
        for path in before | after
        if before.get(path) != after.get(path)
    }


def differing(old: Any, new: Any) -> list[str]:
    """The fields that differ and are not ``resumable``, as ``path: old -> new``."""
    known = flatten(new)
    return [
        change
        for path, change in changes(old, new).items()
        if not _field(new if path in known else old, path).metadata.get("resumable")
    ]


def parse(text: str, kind: Any) -> Any:
    """A value of the type ``kind`` from its text.

    Raises:
        ValueError: the text is none; the message says what was expected.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if text.lower() in ("none", "null") else _parse_any(text, args)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"one of {', '.join(args)}{suggest(text, args)}")
        return text
    if origin is tuple:
        return _parse_tuple(text, args)
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError("true or false")
        return _BOOLS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
    if kind is Path and not text:  # which Path would take for the working directory
        raise ValueError("a path")
    return kind(text)


def _parse_any(text: str, kinds: tuple[Any, ...]) -> Any:
    """A value of the first of these types that the text is one of."""
    expected = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return parse(text, kind)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(", or ".join(expected))


def _parse_tuple(text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
    if args[-1] is Ellipsis:
        kinds = (args[0],) * len(items)
    elif len(items) == len(args):
        kinds = args
    else:
        raise ValueError(f"{len(args)} values separated by commas")
    return tuple(parse(item, kind) for item, kind in zip(items, kinds, strict=True))


def _assign(config: Any, path: list[str], text: str, full: str, paths: list[str]) -> Any:
    """The settings with one value replaced, rebuilt from the innermost dataclass outwards."""
    name, *rest = path
    if isinstance(config, tuple):
        index = int(name) if name.isdecimal() else -1
        if not 0 <= index < len(config) or not rest:
            raise _unknown(full, paths)
        return (*config[:index], _assign(config[index], rest, text, full, paths), *config[index + 1 :])
    known = (field.name for field in dataclasses.fields(config) if not field.metadata.get("recorded"))
    if name not in known:
        raise _unknown(full, paths)
    value = getattr(config, name)
    registry = _registry(config, name)
    if registry is not None and not rest:
        return dataclasses.replace(config, **{name: _choose(value, text, registry, full)})
    if (dataclasses.is_dataclass(value) or _is_group(value)) != bool(rest):
        raise _unknown(full, paths)
    if registry is not None and rest[0] not in {field.name for field in dataclasses.fields(value)}:
        raise _no_option(value, rest[0], registry, full, paths)
    if rest:
        return dataclasses.replace(config, **{name: _assign(value, rest, text, full, paths)})
    try:
        new = parse(text, get_type_hints(type(config))[name])
    except ValueError as error:
        raise UsageError(f"{full}={text}: expected {error}") from None
    changes = {name: new}
    for field in dataclasses.fields(config):
        if field.metadata.get("recorded"):
            changes[field.name] = tuple(dict.fromkeys((*getattr(config, field.name), name)))
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:  # the settings' own check, which begins with the field's name
        raise UsageError(f"{full.removesuffix(name)}{error}") from None


def _registry(config: Any, name: str) -> Registry[Any] | None:
    """The registry that a field is a choice of; None for another field."""
    return next(f for f in dataclasses.fields(config) if f.name == name).metadata.get("registry")


def _chosen(config: Any) -> list[tuple[str, str]]:
    """The fields that are choices, each with the name of its value."""
    return [
        (field.name, field.metadata["registry"].name_of(getattr(config, field.name)))
        for field in dataclasses.fields(config)
        if "registry" in field.metadata
    ]


def _choose(old: Any, name: str, registry: Registry[Any], path: str) -> Any:
    """The registered dataclass of that name, with what it carries over from ``old``; or ``old`` itself."""
    try:
        kind = registry[name]
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if type(old) is kind:
        return old
    before = {field.name for field in dataclasses.fields(old) if field.metadata.get("carried")}
    kept = [f.name for f in dataclasses.fields(kind) if f.metadata.get("carried") and f.name in before]
    return kind(**{name: getattr(old, name) for name in kept})


def _with_chosen(default: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The plain settings with every choice restored."""
    plain = dict(plain)
    for name, _ in _chosen(default):
        registry = _registry(default, name)
        if registry is not None and isinstance(plain.get(name), Mapping):
            options = dict(plain[name])
            try:
                kind = registry[options.pop("name")]
            except ValueError as error:
                raise UsageError(f"{name}: {error}; import the module that registers it") from None
            plain[name] = from_plain(kind(), options)
    return plain


def _unknown(path: str, paths: list[str]) -> UsageError:
    inside = [known for known in paths if known.startswith(f"{path}.")]
    if inside:
        return UsageError(f"{path} is a group of fields; set one of them: {', '.join(inside)}")
    return UsageError(f"unknown field {path!r}{_suggest_path(path, paths)}")


def _no_option(chosen: Any, option: str, registry: Registry[Any], path: str, paths: list[str]) -> UsageError:
    """The error of an option that a choice has not; others may have it."""
    members = registry.members.items()
    others = [name for name, member in members if option in getattr(member, "__dataclass_fields__", ())]
    if not others:
        return _unknown(path, paths)
    has = ", ".join(field.name for field in dataclasses.fields(chosen)) or "none"
    return UsageError(
        f"unknown field {path!r}: {option} is an option of {', '.join(others)}; those of "
        f"{registry.kind}={registry.name_of(chosen)} are {has}"
    )


def _suggest_path(path: str, paths: list[str]) -> str:
    """The nearest field: one of that very last name first, else the nearest whole path or last name."""
    leaves: dict[str, str] = {}
    for known in paths:
        leaves.setdefault(known.rpartition(".")[2], known)
    leaf = path.rpartition(".")[2]
    same = [known for known in paths if known.rpartition(".")[2] == leaf]
    hint = suggest(path, same or paths)
    if hint:
        return hint
    near = next((known for name, known in leaves.items() if suggest(leaf, [name])), None)
    return f"; did you mean {near!r}?" if near else ""


def _is_group(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(dataclasses.is_dataclass, value))


def _field(config: Any, path: str) -> dataclasses.Field[Any]:
    """The dataclass field at a dotted path."""
    *groups, name = path.split(".")
    for group in groups:
        config = config[int(group)] if isinstance(config, tuple) else getattr(config, group)
    return next(field for field in dataclasses.fields(config) if field.name == name)


def _restore(value: Any, kind: Any, default: Any) -> Any:
    """One field of ``from_plain``: lists become tuples, strings paths, dicts settings."""
    args = get_args(kind)
    if isinstance(value, Mapping):
        return from_plain(default, value)
    if isinstance(value, list):
        item = args[0] if args else None
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            return tuple(from_plain(item(), entry) for entry in value)
        return tuple(value)
    return Path(value) if isinstance(value, str) and (kind is Path or Path in args) else value
