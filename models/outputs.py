"""A network's answer to one scene, whose arrays are made when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.networks.messages import suggest

ENSEMBLE = "ensemble"
Number = TypeVar("Number", bound=np.generic)


class Outputs(Mapping[str, NDArray[Number]], ABC, Generic[Number]):
    """By output an array, made when it is first asked for, and the same one from then on.

    Args:
        names: of the outputs: the branches of the modalities that there are, and ``ensemble``.
        modalities: the names of all modalities.
        present: the numbers of those that there are; None: all.

    Attributes:
        modalities: the names of those that there are.

    Raises:
        KeyError: from the subscript: no such output; the message lists those that there are.
    """

    def __init__(
        self, names: Sequence[str], modalities: Sequence[str], present: Sequence[int] | None = None
    ) -> None:
        self._names = tuple(names)
        self._made: dict[str, NDArray[Number]] = {}
        self.modalities = tuple(name for m, name in enumerate(modalities) if present is None or m in present)

    @property
    def ensemble(self) -> NDArray[Number]:
        """The output that the branches make together."""
        return self[ENSEMBLE]

    def __getitem__(self, which: str) -> NDArray[Number]:
        if which not in self._made:
            self._made[which] = self._make(self._index(which))
        return self._made[which]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, which: object) -> bool:
        return which in self._names

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(self._names)}>"

    def _index(self, which: str) -> int:
        if which not in self._names:
            raise KeyError(
                f"no output {which!r}: expected {', '.join(self._names)}{suggest(which, self._names)}"
            )
        return self._names.index(which)

    @abstractmethod
    def _make(self, index: int) -> NDArray[Any]:
        """An output's array, by its number."""
