"""The files that the predict commands are given: which of them belong together."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from models.data.files import composed, visible
from models.data.images import FILE_SUFFIXES
from models.data.layouts import CAMERA
from models.networks.fusion import Fusion
from models.networks.messages import suggest
from models.patterns import is_pattern, match_patterns
from models.training.errors import UsageError, existing
from models.video import Video

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
VIDEO_KINDS = ("rgb", "depth")  # the modalities that frames of 8 bits can hold

Frames = Video | list[Path]


def is_video(path: Path) -> bool:
    """Whether the path is a video's, by its suffix."""
    return path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES


def option_of(modality: str) -> str:
    """The command line's option for a modality's files."""
    return f"--{modality}" if modality in ("rgb", "depth") else f"--input {modality}"


def check_kinds(
    inputs: Collection[str],
    modalities: Sequence[str],
    why_all: str | None = "",
    option: Callable[[str], str] = option_of,
) -> None:
    """Refuse inputs, by what they hold, that are not those of a network.

    Args:
        inputs: the modalities that are given.
        modalities, why_all: as for ``check_inputs``.
        option: the command line's option for a modality.

    Raises:
        UsageError: a modality is missing, or none of the network's.
    """
    for modality in [each for each in modalities if each not in inputs]:
        if why_all is not None or is_needed(modality, inputs):
            raise UsageError(
                f"{option(modality)} is required: the network's modalities are {', '.join(modalities)}"
                f"{why_all or ''}"
            )
    for modality in inputs:
        if modality not in modalities:
            raise UsageError(
                f"{option(modality)} is no input: the network's modalities are {', '.join(modalities)}"
            )


def check_inputs(
    inputs: Mapping[str, Path], modalities: Sequence[str], why_all: str | None = ""
) -> dict[str, Path]:
    """The paths in the order of the modalities.

    Args:
        inputs: by modality a path, or a pattern of paths (``models.patterns``).
        modalities: the network's, or ``camera``, which goes with depth.
        why_all: a reason why all are needed, to end the message with; None: some are enough.

    Raises:
        UsageError: a modality is missing, or none of the network's; a path does not exist.
    """
    check_kinds(inputs, modalities, why_all)
    given = [modality for modality in modalities if modality in inputs]
    return {
        modality: path if is_pattern(path) else existing(path, option_of(modality))
        for modality in given
        for path in [inputs[modality]]
    }


def why_all(fusion: Fusion) -> str | None:
    """A reason why a network of the fusion needs all of its modalities, for ``check_inputs``; None if not."""
    try:
        fusion.check_subset()
    except ValueError as error:
        return f"; {error}"
    return None


def note_absent(absent: Sequence[str], outputs: Sequence[str]) -> None:
    """Say on stderr which modalities are absent, if any are, and which outputs there are without them."""
    if absent:
        note(f"without {', '.join(absent)}: the outputs are those of {', '.join(outputs)}")


def note(text: str) -> None:
    """Print a note to where errors go."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def is_needed(kind: str, files: Collection[str]) -> bool:
    """Whether files of a scene that may lack modalities are useless without one of this kind."""
    if kind == CAMERA:
        return bool({"depth", "disparity"} & set(files))
    return not set(files) - {CAMERA}


def check_some(files: Collection[str], kinds: Sequence[str]) -> None:
    """Refuse files of one scene, by kind, that are of other kinds, or too few.

    Raises:
        UsageError: they are.
    """
    missing = [kind for kind in kinds if kind not in files and is_needed(kind, files)]
    if missing or set(files) - set(kinds):
        what = f"one of {missing[0]}" if missing else f"files of {', '.join(kinds)} alone"
        raise UsageError(f"expected {what}, got {', '.join(files) or 'none'}")


def check_complete(files: Collection[str], kinds: Sequence[str]) -> None:
    """Refuse files of one scene, by kind, that are not one of each.

    Raises:
        UsageError: one is missing, or of no such kind.
    """
    if set(files) != set(kinds):
        raise UsageError(f"expected a file of each of {', '.join(kinds)}, got {', '.join(files) or 'none'}")


def match_files(
    paths: Mapping[str, Path],
    endings: Mapping[str, str] = MappingProxyType({}),
    partial: bool = False,
    remedy: str = "",
) -> dict[str, dict[str, Path]]:
    """Match files, folders or patterns of them: by scene, in order of names, the file of every modality.

    Args:
        paths: by modality a file, a folder, or a pattern (``models.patterns``).
        endings: by modality what its names may end in that is not the scene's.
        partial: whether scenes may lack modalities.
        remedy: what the message of a missing counterpart is to end in.

    Raises:
        UsageError: a counterpart is missing, if not ``partial``; a folder without images, or with two of one
            name; a file beside a folder; or as ``match_patterns``.
    """
    first = next(iter(paths))
    if any(map(is_pattern, paths.values())):
        return match_patterns(paths, {kind: option_of(kind) for kind in paths}, partial, remedy)
    if not any(path.is_dir() for path in paths.values()):
        return {paths[first].stem.removesuffix(endings.get(first, "")): dict(paths)}
    for modality, path in paths.items():
        if not path.is_dir():
            raise UsageError(
                f"{option_of(modality)}: {path} is a file; give a folder for every modality, or for none"
            )
    found = {modality: images_of(path, endings.get(modality, "")) for modality, path in paths.items()}
    if partial:
        stems = sorted({stem for files in found.values() for stem in files})
        return {stem: {kind: files[stem] for kind, files in found.items() if stem in files} for stem in stems}
    for files in found.values():
        for stem, file in files.items():
            for other, others in found.items():
                if stem not in others:
                    hint = f"{suggest(stem, others)}{remedy}"
                    raise UsageError(f"{file} has no counterpart in {paths[other]}{hint}")
    return {stem: {modality: files[stem] for modality, files in found.items()} for stem in found[first]}


def images_of(folder: Path, ending: str = "") -> dict[str, Path]:
    """The images of a folder by their names without suffix and ``ending``."""
    files: dict[str, Path] = {}
    for path in sorted(folder / name for name in visible(path.name for path in folder.iterdir())):
        name = composed(path.stem).removesuffix(ending)
        if path.suffix.lower() in FILE_SUFFIXES and (twin := files.setdefault(name, path)) != path:
            raise UsageError(
                f"{twin} and {path} differ in the suffix only: which one is the scene's? Move the other away"
            )
    if not files:
        raise UsageError(f"{folder} holds no image ({', '.join(sorted(FILE_SUFFIXES))})")
    return files


def match_frames(paths: Mapping[str, Path]) -> dict[str, Frames]:
    """Open videos or folders: by modality its frames, as many for each.

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
