"""Finds the documents in a folder that somebody else may have made.

Only regular files are documents. A link may lead to another place of the folder; one that leads out of it is skipped,
because it could name any file of the machine, and so are FIFOs, sockets and devices. A file is opened without following
a link on the way to it, so a folder that changes while it is read leads nowhere else.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from chunkmill.chunking.document import HTML_SUFFIXES, suffix_of
from chunkmill.domain.chunks import MAX_ID_BYTES
from chunkmill.system.files import Folder, Kind

TEXT_SUFFIXES = frozenset((".txt", ".md", ".rst"))
NAMED = 5
"""How many of the skipped entries are named; the others are counted."""
SPHINX_PARTS = {"_sources", "_static", "searchindex.js"}
"""What Sphinx puts beside the pages that it makes: what they were made from, and what they look and are searched
with."""
ENDS, LONGEST_END = 100, 12
"""How many ends of names are told apart, and how long they may be, so that memory does not grow with a folder."""


@dataclass(slots=True)
class SkippedEntries:
    """The entries of folders that were not read on purpose."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """Path and reason of the first ones."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files of other kinds there were, by the ends of their names."""
    named: Collection[Path] = ()
    """Files that are sources of their own, so they do not count among these."""

    def add(self, path: Path, why: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(f"{path} {why}")

    def add_other(self, path: Path) -> None:
        """Count a file that is no document by its name."""
        end = suffix_of(path.name)
        end = end if len(end) <= LONGEST_END else ""
        self.others[end if end in self.others or len(self.others) < ENDS else ""] += 1

    def of_other_kinds(self, readable: Collection[str] = (), tables: Collection[str] = ()) -> str:
        """How many files were not read because of their names; empty if there was none. ``--chunk`` would read the
        ``readable`` ones, and ``tables`` have records."""
        if not self.others:
            return ""
        counts = sorted(self.others.items(), key=lambda counted: (-counted[1], counted[0]))
        kinds = [f"{number:,} {end or 'of other names'}" for end, number in counts[:NAMED]]
        rest = sum(number for _, number in counts[NAMED:])
        more = [f"{rest:,} more"] if rest else []
        ends = sorted(set(readable) & set(self.others))
        hint = f"; --chunk 200 reads {', '.join(ends)} too" if ends else ""
        if not self.others.keys().isdisjoint(tables):
            hint += "; to enqueue the records of a table, name it beside the folder"
        return f"not read because of their kind: {', '.join(kinds + more)}{hint}"

    def __str__(self) -> str:
        more = f", and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        return f"skipped: {'; '.join(self.first)}{more}"


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A text file of a folder, or with a ``problem`` a part of the folder that cannot be read."""

    folder: Folder
    name: str
    """Its path inside the folder, with ``/`` between the parts."""
    parts: tuple[str, ...]
    """The parts of the path at which it is; another one than its name if that is a link."""
    problem: str | None = None
    has_no_id: bool = False
    """Its name is the problem: it cannot be an id, so no collection has this document."""

    def open(self) -> BinaryIO:
        """Raises OSError."""
        return self.folder.open(self.parts)


def documents(root: Path, skipped: SkippedEntries, suffixes: Set[str] = TEXT_SUFFIXES) -> Iterator[FolderFile]:
    """The documents in ``root``, in an order that is always the same, so that two runs give the same job.

    A document is a file whose name ends with one of the ``suffixes``, in any case, or with one of them and ``.gz``.

    Hidden files and folders belong to tools and are left out. If pages are read, what Sphinx puts beside them is
    skipped.
    """
    inside = root.resolve()
    with Folder(root) as folder:
        left: list[tuple[str, ...]] = [()]
        while left:
            parts = left.pop()
            if len(os.fsencode("/".join(parts))) >= MAX_ID_BYTES:
                problem = f"the path is too long for an id, which may have {MAX_ID_BYTES} bytes"
                yield FolderFile(folder, "/".join(parts), parts, problem)
                continue
            try:
                entries = [entry for entry in folder.list(parts) if not entry[0].startswith(".")]
            except OSError as error:
                yield FolderFile(folder, "/".join(parts), parts, f"cannot be read: {error.strerror}")
                continue
            if not suffixes.isdisjoint(HTML_SUFFIXES) and (beside := _beside_pages([name for name, _ in entries])):
                for name in sorted(beside):
                    skipped.add(root.joinpath(*parts, name), "belongs to the pages beside it, which Sphinx made")
                entries = [entry for entry in entries if entry[0] not in beside]
            for name, kind in entries:
                at = (*parts, name)
                if kind != "folder" and (target := _read_at(root, inside, at, kind, skipped, suffixes)) is not None:
                    name_problem = _problem_of_name("/".join(at))
                    yield FolderFile(folder, "/".join(at), target, name_problem, has_no_id=name_problem is not None)
            left += [(*parts, name) for name, kind in reversed(entries) if kind == "folder"]


def _problem_of_name(name: str) -> str | None:
    """Why the path of a file cannot be an id; None if it can."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "its path is not valid UTF-8, so it cannot be an id; give it another name"
    return f"the path is too long for an id, which may have {MAX_ID_BYTES} bytes" if length > MAX_ID_BYTES else None


def _beside_pages(names: Collection[str]) -> set[str]:
    """Those of a folder's entries that Sphinx puts beside its pages. They are empty if the folder has no such pages."""
    has_pages = any(suffix_of(name) in HTML_SUFFIXES for name in names)
    return SPHINX_PARTS.intersection(names) if has_pages and "_sources" in names else set()


def _read_at(
    root: Path, inside: Path, at: tuple[str, ...], kind: Kind, skipped: SkippedEntries, suffixes: Collection[str]
) -> tuple[str, ...] | None:
    """Where the entry is read, if it is a document. What is skipped is noted."""
    path = root.joinpath(*at)
    is_text = suffix_of(path.name) in suffixes
    if kind != "link":
        if is_text and kind == "other":
            skipped.add(path, "is not a regular file")
        if kind == "file" and not is_text and path not in skipped.named:
            skipped.add_other(path)
        return at if is_text and kind == "file" else None
    try:
        target = inside.joinpath(*at).resolve(strict=True)
        is_folder = target.is_dir()
    except (OSError, RuntimeError):  # a RuntimeError is a circle of links before Python 3.13
        if is_text:
            skipped.add(path, "is a link that leads nowhere")
        return None
    if not (is_text or is_folder):
        return None
    if not target.is_relative_to(inside):
        skipped.add(path, "is a link that leads out of the folder")
        return None
    if is_folder:
        return None  # its documents are read where they are
    if not target.is_file():
        skipped.add(path, "is a link to what is not a regular file")
        return None
    return target.relative_to(inside).parts
