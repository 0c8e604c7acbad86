"""Videos that the predict command is given: which frames belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from models.sources import images_of, is_video, option_of
from models.training.errors import UsageError
from models.video import Video

VIDEO_KINDS = ("rgb", "depth")  # what frames of 8 bits can be read as

Frames = Video | list[Path]


def match_frames(paths: Mapping[str, Path]) -> dict[str, Frames]:
    """By modality its frames, as many for each, of videos or folders.

    A folder's are in order of their names, ``9`` before ``10``.

    Raises:
        UsageError: a path is neither; a video of something else than ``VIDEO_KINDS``; numbers differ.
        DataError: a video cannot be read.
    """
    found: dict[str, Frames] = {}
    for modality, path in paths.items():
        if path.is_dir():
            found[modality] = sorted(images_of(path).values(), key=_numbers_by_value)
        elif not is_video(path):
            raise UsageError(f"{option_of(modality)}: {path} is neither a video nor a folder of frames")
        elif modality not in VIDEO_KINDS:
            raise UsageError(
                f"{option_of(modality)}: only {' and '.join(VIDEO_KINDS)} are read from video, got {path}; "
                "give a folder of frames, stored as in training"
            )
        else:
            found[modality] = Video(path, depth=modality == "depth")
    (first, frames), *others = found.items()
    for modality, other in others:
        if len(other) != len(frames):
            raise UsageError(
                f"{option_of(modality)}: {paths[modality]} holds {len(other)} frames, "
                f"but {paths[first]} {len(frames)}"
            )
    return found


def _numbers_by_value(path: Path) -> list[tuple[int, str]]:
    """A key to sort names by."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.stem)]
