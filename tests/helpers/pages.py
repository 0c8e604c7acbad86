"""HTML pages as tests look at them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_VOID = {"br", "hr", "img", "input", "link", "meta"}
_LINKS = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")


class Page(HTMLParser):
    """A page, parsed.

    Attributes:
        words: its text, spaces joined, without what is in scripts and styles.
        links: whatever elements refer to.
        tags: how often each element occurs.
        ids: of elements, in order.
        images: the attributes of pictures.
        described: labels of drawings.
        faults: elements that end where none has begun, or never.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: dict[str, int] = {}
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.described: list[str] = []
        self.faults: list[str] = []
        self._open: list[str] = []
        self._parts: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self._open]
        self.words = re.sub(r"\s+", " ", " ".join(self._parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in _LINKS]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "img":
            self.images.append(found)
        if found.get("role") == "img":
            self.described.append(found.get("aria-label") or "")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at line {self.getpos()[0]}")

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self._parts.append(data)
