"""Tables as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Columns of one width, the first row being the head; words to the left, numbers to the right."""
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [
        not any(cell.lstrip("-+")[:1].isdigit() for cell in column[1:]) or column[0] == "output"
        for column in columns
    ]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if word else f"{cell:>{width}}"
            for cell, width, word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in cells
    )
