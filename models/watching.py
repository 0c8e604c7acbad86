"""Folders in which scenes appear: which of them are complete, and are to be predicted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from models.data import DataError
from models.data.files import composed, visible
from models.data.images import FILE_SUFFIXES
from models.sources import is_needed, note, option_of
from models.training.errors import UsageError, existing
from models.training.interrupt import Interrupt

INTERVAL = 0.5  # seconds between two looks; a file that is the same in both is whole

Files = dict[str, Path]
State = tuple[tuple[Path, int, int, int], ...]  # of a scene's files: inode, size, time of modification


def watched_folders(
    folder: Path, inputs: Mapping[str, Path], kinds: tuple[str, ...], why_all: str | None
) -> dict[str, Path]:
    """The folder of every kind of file: given, or that of its name in the watched folder.

    A network of one modality takes images in the watched folder itself if it has no folder of that name.

    Args:
        folder: the one that is watched.
        inputs: other folders, by what they hold.
        kinds: of the files that the network takes.
        why_all: a reason why all are needed; None: some are enough.

    Raises:
        UsageError: a folder does not exist, or there is none of a kind that is needed.
    """
    existing(folder, "--watch")
    for kind, path in inputs.items():
        if kind not in kinds:
            raise UsageError(f"{option_of(kind)} is no input: the network's are {', '.join(kinds)}")
        if not path.is_dir():
            raise UsageError(f"{option_of(kind)}: {path} is no folder, as --watch needs")
    found = {kind: inputs.get(kind, folder / kind) for kind in kinds}
    if len(kinds) == 1 and not found[kinds[0]].is_dir():
        found = {kinds[0]: folder}
    there = {kind: path for kind, path in found.items() if path.is_dir()}
    for kind in kinds:
        if kind not in there and (why_all is not None or is_needed(kind, there)):
            raise UsageError(
                f"--watch: {found[kind]} is no folder, and the files of {kind} are to be there{why_all or ''}"
            )
    return there


class Watch:
    """The scenes of folders that are complete and have not been predicted as they are now.

    A scene is complete once every folder has a file of its name that was the same in two looks: as many
    bytes, changed at the same time.

    Args:
        folders: by what they hold.
        results: the files that are there once a scene has been predicted, by its name.
        endings: by kind what names of files may end in that is not the scene's.

    Attributes:
        predicted, failed, skipped: how many scenes were, could not be, and had been before this watch.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        results: Callable[[str], list[Path]],
        endings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.folders, self.results, self.endings = folders, results, endings
        self.predicted = self.failed = self.skipped = 0
        self._seen: dict[str, State] = {}
        self._settled: dict[str, State] = {}
        self._twins: set[tuple[Path, Path]] = set()

    def look(self) -> dict[str, Files]:
        """Look into the folders once; by name the scenes that are to be predicted."""
        listed = {kind: self._list(kind, folder) for kind, folder in self.folders.items()}
        first, *others = listed.values()
        self._settled = {name: state for name, state in self._settled.items() if name in first}
        ready, seen = {}, {}
        for name in first:
            if not all(name in files for files in others):
                continue
            files = {kind: files[name] for kind, files in listed.items()}
            state = _state(files)
            if state is None or self._settled.get(name) == state:
                continue
            seen[name] = state
            if self._seen.get(name) != state:
                continue
            if name not in self._settled and self._is_done(name, state):
                self.skipped += 1
                self._settled[name] = state
            else:
                ready[name] = files
        self._seen = seen
        return ready

    def waiting(self) -> list[str]:
        """The names of scenes that lack files."""
        listed = [self._list(kind, folder) for kind, folder in self.folders.items()]
        return sorted(
            {name for files in listed for name in files if any(name not in each for each in listed)}
        )

    def run(self, predict: Callable[[str, Files], None]) -> None:
        """Predict scenes as they become complete, until Ctrl-C or SIGTERM.

        A scene whose files are broken is noted once, and tried again when they change.
        """
        with Interrupt() as interrupt:
            while not interrupt:
                for name, files in self.look().items():
                    self.settle(name, files, predict)
                    if interrupt:
                        break
                else:
                    time.sleep(INTERVAL)
        print(self.told(), flush=True)

    def settle(self, name: str, files: Files, predict: Callable[[str, Files], None]) -> None:
        """Predict a scene, as its files were when they were looked at."""
        self._settled[name] = self._seen[name]
        try:
            predict(name, files)
        except DataError as error:
            self.failed += 1
            note(f"{error}; the scene {name} is skipped until its files change")
        else:
            self.predicted += 1

    def told(self) -> str:
        """What was done, in words."""
        waiting = self.waiting()
        names = f" ({', '.join(waiting[:3])}{', ...' * (len(waiting) > 3)})" if waiting else ""
        return (
            f"{self.predicted} scenes predicted, {self.failed} failed, {self.skipped} were done before, "
            f"{len(waiting)} lack files{names}"
        )

    def _is_done(self, name: str, state: State) -> bool:
        """Whether the results of a scene are there, and newer than its files."""
        try:
            times = [path.stat().st_mtime_ns for path in self.results(name)]
        except FileNotFoundError:
            return False
        return min(times) >= max(modified for _, _, _, modified in state)

    def _list(self, kind: str, folder: Path) -> Files:
        """The images of a folder by their scenes' names."""
        files: Files = {}
        try:
            names = visible(path.name for path in folder.iterdir())
        except OSError as error:
            raise UsageError(f"--watch: {folder} cannot be read any more ({error.strerror})") from None
        for path in sorted(folder / name for name in names):
            if path.suffix.lower() not in FILE_SUFFIXES:
                continue
            name = composed(path.stem).removesuffix(self.endings.get(kind, ""))
            if (twin := files.setdefault(name, path)) != path and (twin, path) not in self._twins:
                self._twins.add((twin, path))
                note(f"{path} is skipped: {twin} is of the same scene")
        return files


def _state(files: Files) -> State | None:
    """What changes with the files; None where one is gone or empty."""
    states = []
    for path in files.values():
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        if found.st_size == 0:
            return None
        states.append((path, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(states)
