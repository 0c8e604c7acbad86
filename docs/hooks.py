"""What the site needs beside its pages: files of the checkout that they link to, and no address outside.

Pages link to the checkout as they do on GitHub, ``../examples/demo.py`` or ``../docs/features.png``.
Such files become part of the site, below ``checkout/``: Markdown as a page with links of its own, programs as
a page with their text, all else, such as pictures, as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHECKOUT = "checkout"
PROGRAMS = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".cuh": "cpp", ".json": "json", ".txt": "text"}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
# What a browser would fetch from elsewhere; a link that a reader may follow is none of it.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s>]*"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^\s>]*|@import[^;]*//[^;]*|url\([\"']?(?:https?:)?//[^)]*"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the checkout that pages link to, and those that these link to."""
    root = Path(config.config_file_path).parent
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for path in _linked(file, root):
            if _uri(path, root) not in files.src_uris:
                added = _added(path, root, config)
                files.append(added)
                waiting += [added] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to the checkout lead to the files that ``on_files`` has added."""
    root = Path(config.config_file_path).parent
    here = PurePosixPath(page.file.src_uri).parent

    def moved(link: re.Match[str]) -> str:
        path = _target(page.file, link[2], root)
        if path is None:
            return link[0]
        return f"{link[1]}{os.path.relpath(_uri(path, root), here)}{link[3] or ''}{link[4]}"

    return LINK.sub(moved, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that a browser would complete from elsewhere."""
    site = Path(config.site_dir)
    found = [
        f"{path.relative_to(site)}: {match[0][:100]}"
        for suffix in ("html", "css")
        for path in sorted(site.rglob(f"*.{suffix}"))
        for match in FETCHED.finditer(path.read_text(encoding="utf-8"))
    ]
    if found:
        raise PluginError("pages must not fetch anything from elsewhere:\n" + "\n".join(found))


def _linked(file: File, root: Path) -> Iterator[Path]:
    """The files that a page links to."""
    for link in LINK.finditer(file.content_string):
        path = _target(file, link[2], root)
        if path is not None:
            yield path


def _target(file: File, target: str, root: Path) -> Path | None:
    """The file of the checkout that a page's link leads to; None for other links."""
    inside = PurePosixPath(file.src_uri)
    folder = root / (inside.relative_to(CHECKOUT) if inside.parts[0] == CHECKOUT else "docs" / inside).parent
    path = Path(os.path.normpath(folder / target))
    return path if path.is_file() and root in path.parents else None


def _uri(path: Path, root: Path) -> str:
    """The address of a file of the checkout among the site's sources."""
    if root / "docs" in path.parents:
        return path.relative_to(root / "docs").as_posix()
    uri = f"{CHECKOUT}/{path.relative_to(root).as_posix()}"
    return f"{uri}.md" if path.suffix in PROGRAMS else uri


def _added(path: Path, root: Path, config: MkDocsConfig) -> File:
    """A file of the checkout, outside of ``docs``, as one of the site's."""
    if path.suffix not in PROGRAMS:
        return File.generated(config, _uri(path, root), abs_src_path=str(path))
    fenced = f"````{PROGRAMS[path.suffix]}\n{path.read_text(encoding='utf-8')}\n````"
    return File.generated(
        config, _uri(path, root), content=f"# {path.relative_to(root).as_posix()}\n\n{fenced}\n"
    )
