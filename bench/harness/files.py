"""Where results go, and how they are written.

Nothing of the project is imported: ``bench.gpu`` runs before the compiled part is built, and where an
outdated one cannot be loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, and its folder where that is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
