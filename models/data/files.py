"""The files of a split's samples, by a layout's description."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from models.data.classes import NAMES_FILE
from models.data.images import FILE_SUFFIXES, DataError
from models.data.layouts import CAMERA, LABELS, Layout
from models.networks.messages import suggest

Entry = dict[str, Path]  # keys: kinds of file: modalities, labels, camera

_ANY = ".*"  # at the end of a path: whatever suffix the file has
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


def find_samples(
    layout: Layout,
    root: Path,
    split: str,
    kinds: Iterable[str],
    list_file: str = "",
    optional: Collection[str] = (),
    remedy: str = "",
) -> list[Entry]:
    """The files of every sample of a split, in the order of its list or of their names.

    Args:
        layout: of the data set.
        root: its folder.
        split: ``train``, ``val``, or the name of another list there.
        kinds: of the files wanted.
        list_file: path of a list to read in place of the layout's.
        optional: kinds whose files need not be there; their paths are returned all the same. Without a list
            a sample is whatever any of them has a file of.
        remedy: what the message of a modality's missing file ends in.

    Raises:
        DataError: a list or file is missing, a line is malformed. Files are looked for, not opened.
    """
    kinds = tuple(kinds)
    needed = [*kinds, *(["rgb"] if any("{rgb}" in layout.files[kind] for kind in kinds) else [])]
    listed: Iterator[Entry | str]
    if "{file}" in layout.lists:
        what, listed = split, iter(_parallel_lists(layout, root, split, needed))
    elif layout.lists or list_file:
        path = _list_path(layout, root, split, list_file)
        what, listed = path.name, iter(_read_list(layout, root, split, path, needed))
    else:
        what, listed = split, iter(_names_in_folders(layout, root, split, optional))
    folders = Folders()
    entries = []
    for item in listed:
        entry = item if isinstance(item, dict) else {}
        name = item if isinstance(item, str) else next(iter(entry.values())).stem
        for kind in sorted(needed, key=lambda kind: "{rgb}" in layout.files[kind]):
            path = entry[kind] if kind in entry else _fill(layout, root, split, kind, name, entry)
            entry[kind] = folders.find(path)
        entries.append({kind: entry[kind] for kind in kinds})
    _check(entries, what, optional, remedy)
    return entries


def _fill(layout: Layout, root: Path, split: str, kind: str, name: str, entry: Entry) -> Path:
    """A kind's path of the sample ``name``; ``.*`` still at its end."""
    template = layout.files[kind]
    values: dict[str, object] = {"name": name, "split": layout.split(split)}
    if "{rgb}" in template:
        return Path(template.format(**values, rgb=entry["rgb"])).resolve()
    if "{number" in template:
        if not name.isdecimal():
            raise DataError(
                f"{root / layout.folder(kind, split)}: {name!r} is not a number, as {template} wants"
            )
        values["number"] = int(name) + (layout.label_shift.get(split, 0) if kind == LABELS else 0)
    return root / template.format(**values)


class Folders:
    """Finds files by names that may be spelled otherwise on disk; every folder is read once."""

    def __init__(self) -> None:
        self._spelled: dict[Path, dict[str, Path]] = {}
        self._by_stem: dict[Path, dict[str, list[Path]]] = {}

    def find(self, path: Path) -> Path:
        """The file of a path: the image of any suffix where it ends in ``.*``, and else the path as the disk
        has it, where an accent may be part of its letter or a sign of its own; the path itself without one.

        Raises:
            DataError: several images differ in the suffix only.
        """
        if not path.name.endswith(_ANY):
            return path if path.is_file() else self.spelled(path)
        folder = path.parent if path.parent.is_dir() else self.spelled(path.parent)
        if folder not in self._by_stem:
            names = self._by_stem[folder] = defaultdict(list)
            for name in visible(_names(folder)):
                if Path(name).suffix.lower() in FILE_SUFFIXES:
                    names[composed(Path(name).stem)].append(folder / name)
        found = self._by_stem[folder].get(composed(path.name.removesuffix(_ANY)), [path])
        if len(found) > 1:
            twins = sorted(file.name for file in found)
            raise DataError(f"{folder}: {' and '.join(twins)} differ in the suffix only")
        return found[0]

    def spelled(self, path: Path) -> Path:
        """The path with each of its parts as the folder above has it."""
        if path.exists() or path.parent == path:
            return path
        folder = self.spelled(path.parent)
        if folder not in self._spelled:
            self._spelled[folder] = {composed(name): folder / name for name in _names(folder)}
        return self._spelled[folder].get(composed(path.name), path)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def visible(names: Iterable[str]) -> list[str]:
    """Names without those that systems leave beside people's files: ``._*``, ``.DS_Store``, ``Thumbs.db``."""
    return [name for name in names if not name.startswith(".") and name.lower() not in _SYSTEM_FILES]


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk in order of names, without hidden folders and files.

    Linked folders are followed, but none into itself.
    """
    for found, folders, files in os.walk(folder, followlinks=True):
        above = {parent.resolve() for parent in (Path(found), *Path(found).parents)}
        folders[:] = [
            name for name in sorted(visible(folders)) if (Path(found) / name).resolve() not in above
        ]
        yield Path(found), folders, sorted(visible(files))


def composed(name: str) -> str:
    """A name with every accent in its letter: macOS stores them apart."""
    return unicodedata.normalize("NFC", name)


def _list_path(layout: Layout, root: Path, split: str, list_file: str) -> Path:
    path = root / (list_file or layout.list_file(split))
    if not path.is_file():
        found = sorted(other.stem for other in root.glob(f"*{path.suffix}") if other.name != NAMES_FILE)
        there = f"the lists there: {', '.join(found)}" if found else "the folder holds no list at all"
        raise DataError(f"{path}: no such list; {there}" + suggest(path.stem, found))
    return path


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, numbered from 1; Windows' separators of folders become /.

    Raises:
        DataError: there is none, or no such file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Notepad's byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list ({error})") from error
    stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    lines = [(number, line.replace("\\", "/")) for number, line in stripped if line]
    if not lines:
        raise DataError(f"{path}: the list is empty")
    return lines


def _read_list(
    layout: Layout, root: Path, split: str, path: Path, kinds: Sequence[str]
) -> Iterator[Entry | str]:
    """The files that each line names, or the sample's name."""
    for number, line in read_lines(path):
        # Names may hold spaces, and so may paths that are separated by tabs.
        separator = "\t" if "\t" in line or layout.lines == "name" else None
        columns = [column for column in line.split(separator) if column]
        if layout.lines == "paths":
            yield _by_folder(layout, root, split, kinds, columns, f"{path}, line {number}")
            continue
        name = columns[0] if layout.lines == "name" else Path(columns[0]).name
        suffix = Path(name).suffix
        yield name.removesuffix(suffix) if suffix.lower() in FILE_SUFFIXES else name


def _by_folder(
    layout: Layout, root: Path, split: str, kinds: Sequence[str], columns: Sequence[str], where: str
) -> Entry:
    """The paths of a line by their kinds."""
    folders = {Path(column).parent.name: column for column in columns}
    wanted = {kind: Path(layout.folder(kind, split)).name for kind in kinds if kind != CAMERA}
    if len(folders) < len(columns) or not folders.keys() >= set(wanted.values()):
        example = " ".join(f"{folder}/000003.png" for folder in wanted.values())
        raise DataError(
            f"{where}: expected one path in each folder, such as {example}, found {' '.join(columns)!r}"
        )
    return {kind: root / folders[folder] for kind, folder in wanted.items()}


def _parallel_lists(layout: Layout, root: Path, split: str, kinds: Sequence[str]) -> Iterator[Entry]:
    """The files of a layout with one list for every kind; paths with or without the folder of the layout."""
    lists = {}
    for kind in kinds:
        if "{rgb}" in layout.files[kind]:
            continue
        path = root / layout.list_file(split, kind)
        base = layout.folder(kind, split)
        lists[kind] = (
            path,
            [
                root / line if Path(line).parts[0] == base else root / base / line
                for _, line in read_lines(path)
            ],
        )
    (first, paths), *others = lists.values()
    for other, its in others:
        if len(its) != len(paths):
            raise DataError(f"{other}: {len(its)} lines, but {first.name} has {len(paths)}")
    for row in zip(*(paths for _, paths in lists.values()), strict=True):
        yield dict(zip(lists, row, strict=True))


def _names_in_folders(layout: Layout, root: Path, split: str, optional: Collection[str]) -> list[str]:
    """The names of the samples whose file of the first kind, or of an optional one, is there, in order."""
    first = next(iter(layout.files))
    of_split = "{split}" in layout.files[first]  # then a folder that splits share tells nothing
    kinds = [first] + [
        kind
        for kind in optional
        if kind not in (first, CAMERA)
        and "{rgb}" not in layout.files[kind]
        and ("{split}" in layout.files[kind] or not of_split)
    ]
    found: dict[str | int, str] = {}
    for kind in kinds:
        for name in _names_in_folder(layout, root, split, kind):
            found.setdefault(int(name) if "{number" in layout.files[kind] else name, name)
    if not found:
        folder = Folders().spelled(root / layout.folder(first, split))
        raise DataError(f"{folder}: no file there is named like {layout.files[first]}")
    return sorted(found.values())


def _names_in_folder(layout: Layout, root: Path, split: str, kind: str) -> list[str]:
    """The names of the samples whose file of a kind is there."""
    folder = Folders().spelled(root / layout.folder(kind, split))
    pattern = re.escape(layout.files[kind].replace("{split}", layout.split(split)))
    place = re.escape("{name}")
    pattern = pattern.replace(place, "(?P<name>.+)", 1).replace(place, "(?P=name)")
    pattern = re.sub(r"\\\{number(:\w+)?\\\}", r"(?P<name>\\d+)", pattern)
    if pattern.endswith(re.escape(_ANY)):
        suffixes = "|".join(map(re.escape, sorted(FILE_SUFFIXES)))
        pattern = pattern.removesuffix(re.escape(_ANY)) + f"(?i:{suffixes})"
    files = (
        (place / name).relative_to(root).as_posix() for place, _, those in walk(folder) for name in those
    )
    matches = (re.fullmatch(composed(pattern), composed(file)) for file in files)
    return [match["name"] for match in matches if match]


def _check(entries: Sequence[Entry], what: str, optional: Collection[str], remedy: str) -> None:
    """Raise if a file is missing."""
    missing = [
        (kind, path)
        for entry in entries
        for kind, path in entry.items()
        if kind not in optional and not path.is_file()
    ]
    if missing:
        kind, path = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = "" if kind in (LABELS, CAMERA) else remedy
        raise DataError(f"{path}: listed in {what}, but there is no such file{more}{hint}")
