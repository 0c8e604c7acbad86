"""What becomes of the norms of a network that is converted."""

from __future__ import annotations

from dataclasses import dataclass

CONVERTED, PRIVATE, SHARED, KEPT, UNKNOWN, REFUSED = (
    "converted",
    "private",
    "shared",
    "kept",
    "unknown",
    "refused",
)
_NAMED_AT_MOST = 8


@dataclass(frozen=True)
class NormRow:
    """One norm of a network.

    Attributes:
        name: in ``module.named_modules()``; a layer that is used at several places has a row for each.
        kind: name of its class.
        outcome: ``"converted"``: it becomes a norm of M modalities that can exchange. ``"private"``: M copies
            that do not exchange. ``"shared"``: it stays as it is, for all modalities, and does not mix them.
            ``"kept"``: it is a layer of this library already. ``"unknown"``: it stays as it is, and whether
            it mixes the modalities cannot be told. ``"refused"``: it cannot be converted.
        reason: why.
    """

    name: str
    kind: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """Every layer of a network that is a norm, or looks like one, and what becomes of it.

    ``str(report)`` is a table.
    """

    rows: tuple[NormRow, ...]

    def of(self, outcome: str) -> tuple[NormRow, ...]:
        """The rows with this outcome."""
        return tuple(row for row in self.rows if row.outcome == outcome)

    def __str__(self) -> str:
        cells = [("name", "class", "outcome", "reason")]
        cells += [(row.name or "(the module)", row.kind, row.outcome, row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
        return "\n".join(lines)


def listed(rows: tuple[NormRow, ...]) -> str:
    """Names and classes, of many the first."""
    named = ", ".join(f"{row.name!r} ({row.kind})" for row in rows[:_NAMED_AT_MOST])
    more = len(rows) - _NAMED_AT_MOST
    return f"{named} and {more} more, which cen_ext.conversion_report lists" if more > 0 else named
