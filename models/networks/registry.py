"""Registries: names under which encoders and fusions are found."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, TypeVar

from models.networks.messages import suggest

T = TypeVar("T", bound=Callable[..., object])


class Registry(Generic[T]):
    """Members of one kind by name, filled by a bare decorator.

    Args:
        kind: the kind's name in error messages, ``"encoder"`` for example.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.members: dict[str, T] = {}

    def register(self, member: T) -> T:
        """Register a function under its name, or a class under its ``name`` or its own name in snake case.

        Raises:
            ValueError: the name is taken by another member.
        """
        name = getattr(member, "name", None) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", member.__name__).lower()
        taken = self.members.get(name)
        # Running a file twice, as `python -m` and reloads do, registers the same member again.
        if taken is not None and (taken.__module__, taken.__qualname__) != (
            member.__module__,
            member.__qualname__,
        ):
            raise ValueError(f"there are two {self.kind}s named {name!r}")
        self.members[name] = member
        return member

    def __getitem__(self, name: str) -> T:
        """The member of that name.

        Raises:
            ValueError: there is none; the nearest name is suggested.
        """
        if name not in self.members:
            names = ", ".join(self.members)
            raise ValueError(
                f"{self.kind} must be one of {names}, got {name!r}{suggest(str(name), self.members)}"
            )
        return self.members[name]

    def name_of(self, member: object) -> str:
        """The name under which the class of an object is registered.

        Raises:
            ValueError: it is not registered.
        """
        for name, kind in self.members.items():
            if kind is type(member):
                return name
        raise ValueError(f"{type(member).__name__} is not registered; decorate it with register_{self.kind}")

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self.members)
