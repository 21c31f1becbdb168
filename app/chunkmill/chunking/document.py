"""A document as it is cut: one text, its blocks, and the pages on which they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Final


class Kind(StrEnum):
    """How a document is read."""

    TEXT = "text"
    """Paragraphs between empty lines; source code is read so too."""
    MARKDOWN = "markdown"
    HTML = "html"
    PDF = "pdf"


TEXT_SUFFIXES: Final = frozenset((".txt", ".text", ".rst", ".adoc", ".asciidoc", ".org", ".tex"))
MARKDOWN_SUFFIXES: Final = frozenset((".md", ".markdown"))
HTML_SUFFIXES: Final = frozenset((".html", ".htm", ".xhtml"))
CODE_SUFFIXES: Final = frozenset((
    ".bash", ".c", ".cc", ".clj", ".cpp", ".cs", ".cu", ".cxx", ".dart", ".ex", ".exs", ".go", ".h", ".hh",
    ".hpp", ".hs", ".java", ".jl", ".js", ".jsx", ".kt", ".kts", ".lua", ".m", ".mjs", ".ml", ".mm", ".php",
    ".pl", ".pm", ".proto", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts",
    ".tsx", ".zig",
))  # fmt: skip
KINDS: Final[dict[str, Kind]] = (
    dict.fromkeys(TEXT_SUFFIXES | CODE_SUFFIXES, Kind.TEXT)
    | dict.fromkeys(MARKDOWN_SUFFIXES, Kind.MARKDOWN)
    | dict.fromkeys(HTML_SUFFIXES, Kind.HTML)
    | {".pdf": Kind.PDF}
)
"""The kind of a file by the end of its name, in lower case."""

_EMPTY_LINES: Final = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list, table, listing or heading of a document.

    ``text[start:end]`` of the document is the block. ``level`` is 1 to 6 for a heading, and 0 for anything else;
    ``title`` is the heading without its markup.
    """

    start: int
    end: int
    level: int = 0
    title: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """``blocks`` are in their order, do not overlap, and leave out only white space of ``text``.

    ``pages`` has the position in ``text`` at which each page begins, the first page being page 1. It is empty if the
    document has no pages. ``has_only_links`` is true for a page that leads to others and says little itself.
    """

    text: str
    blocks: Sequence[Block]
    pages: Sequence[int] = ()
    has_only_links: bool = False


class DocumentBuilder:
    """Makes a document of blocks that come one after the other, with an empty line between two of them."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._blocks: list[Block] = []
        self._length = 0

    def add(self, text: str, level: int = 0, *, is_near: bool = False) -> None:
        """Add a block. If it ``is_near``, no empty line stands before it, as between the items of a list."""
        if self._blocks:
            gap = "\n" if is_near else "\n\n"
            self._parts.append(gap)
            self._length += len(gap)
        title = " ".join(text.split()) if level else ""
        self._blocks.append(Block(self._length, self._length + len(text), level, title))
        self._parts.append(text)
        self._length += len(text)

    def document(self, *, has_only_links: bool = False) -> Document:
        return Document("".join(self._parts), self._blocks, has_only_links=has_only_links)


def suffix_of(name: str) -> str:
    """The end of a file's name that says its kind, in lower case: ``.html`` for ``Index.HTML`` and ``index.html.gz``.

    If nothing stands before ``.gz`` that says it, it is ``.gz``.
    """
    plain = PurePath(name.lower())
    return plain.with_suffix("").suffix or plain.suffix if plain.suffix == ".gz" else plain.suffix


def kind_of(name: str) -> Kind | None:
    """The kind of a file by its name; None if such a file is not a document."""
    return KINDS.get(suffix_of(name))


def paragraphs(text: str, start: int, end: int) -> list[Block]:
    """The paragraphs of a part of a text, which are separated by empty lines."""
    blocks = []
    at = start
    while at < end:
        gap = _EMPTY_LINES.search(text, at, end)
        until = end if gap is None else gap.start()
        if (block := trimmed(text, at, until)) is not None:
            blocks.append(block)
        at = end if gap is None else gap.end()
    return blocks


def trimmed(text: str, start: int, end: int) -> Block | None:
    """The block without white space around it; None if there is nothing else.

    The blanks before its first line stay, because they say how deep a piece of code stands.
    """
    part = text[start:end]
    left = len(part) - len(part.lstrip())
    if left == len(part):
        return None
    return Block(start + part.rfind("\n", 0, left) + 1, start + len(part.rstrip()))
