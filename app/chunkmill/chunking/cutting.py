"""Where a document is cut. Pure: what counts and what splits a long line are passed in.

A document is first divided at its headings, so a change in one section moves no cut of another. A section that is too
long is cut between its blocks, or lines, or sentences. The cuts in it depend on the text around them: of the places at
which a chunk may end, between half its size and its whole size, the one is taken whose following line has the smallest
hash. After a paragraph was inserted, the cuts behind it are therefore soon the same as before. A greedy cut would move
all of them. The rule is that of content-defined chunking (Muthitacharoen, Chen and Mazières, "A low-bandwidth network
file system", 2001), with the smallest value of a window in place of a fixed pattern.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from chunkmill.chunking.document import Block, Document, trimmed

COUNTED_LENGTH: Final = 1 << 18
"""How many characters are counted at a time. The tokenizer keeps some 100 bytes for each token of them."""
LONG_LINE: Final = 1 << 14
"""A longer line is first divided here, because the time to split a line grows faster than its length."""
LOOK_BACK: Final = 10
"""How many characters before a chunk are read for each token of its overlap."""

_SENTENCE_END: Final = re.compile(r"[.!?:;\u2026\u3002\uff01\uff1f][\"'\u2019\u201d\u00bb)\]*_`]*\s*\Z")
_BEGINNING: Final = re.compile(r"\n|[.!?][\"')\]]* |[\u3002\uff01\uff1f]")
"""What stands before a line or a sentence."""
_BLOCK, _SENTENCE, _LINE, _INSIDE = range(4)
"""What a cut divides, from the best to the worst: blocks, lines after the end of a sentence, lines, one line."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One chunk of a document, ``text[start:end]``. ``page`` and ``last_page`` are None if there are no pages."""

    start: int
    end: int
    headings: tuple[str, ...]
    """The titles of the headings above it, from the outermost to its own."""
    page: int | None = None
    last_page: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """How long a passage may be, and what measures it.

    ``sizes`` gives the size of each text, ``split`` the pieces of a text of which none is larger than a size, and
    ``tail`` the position in a text at which its last so many tokens or characters begin.
    """

    size: int
    overlap: int
    sizes: Callable[[Sequence[str]], list[int]]
    split: Callable[[str, int], list[str]]
    tail: Callable[[str, int], int]


@dataclass(slots=True)
class _Atom:
    """What is not divided any more. ``rank`` says what a cut before it divides."""

    start: int
    end: int
    size: int
    rank: int


@dataclass(frozen=True, slots=True)
class _Section:
    first: int
    after: int
    headings: tuple[str, ...]


def cut(document: Document, rule: Rule) -> Iterator[Passage]:
    """The passages of a document, in their order. None is larger than ``rule.size``, and they hold all of its text.

    All but the first passage of a section begin with the last ``rule.overlap`` tokens or characters of the one before.
    """
    blocks = document.blocks
    if not blocks:
        return
    text = document.text
    bounds = [block.start for block in blocks] + [blocks[-1].end]
    sizes = _measured(text, bounds, rule)
    for section in _sections(blocks):
        chosen = range(section.first, section.after)
        if sum(sizes[i] for i in chosen) <= rule.size:
            parts = [(bounds[section.first], blocks[section.after - 1].end)]
        else:
            limit = rule.size - rule.overlap
            atoms: list[_Atom] = []
            for i in chosen:
                atoms += _atoms(text, bounds[i], bounds[i + 1], sizes[i], limit, rule)
            parts = [(atoms[i].start, atoms[j - 1].end) for i, j in _packed(text, atoms, limit)]
        for start, end in _fitted(text, parts, rule):
            yield Passage(start, end, section.headings, *_pages(document.pages, start, end))


def _sections(blocks: Sequence[Block]) -> Iterator[_Section]:
    """Sections begin at a heading. A heading with nothing below it belongs to the section of the next one."""
    path: list[Block] = []
    first, has_body = 0, False
    for i, block in enumerate(blocks):
        if block.level:
            if has_body:
                yield _Section(first, i, tuple(above.title for above in path))
                first, has_body = i, False
            while path and path[-1].level >= block.level:
                path.pop()
            path.append(block)
        else:
            has_body = True
    yield _Section(first, len(blocks), tuple(above.title for above in path))


def _measured(text: str, bounds: Sequence[int], rule: Rule) -> list[int]:
    """The size of what stands between each two bounds. What is very long is not counted: it is larger than any size."""
    sizes: list[int] = []
    waiting: list[str] = []
    length = 0
    for start, end in pairwise(bounds):
        if end - start > LONG_LINE and end - start > rule.size * LOOK_BACK:
            sizes += [*rule.sizes(waiting), rule.size + 1]
            waiting, length = [], 0
            continue
        waiting.append(text[start:end])
        length += end - start
        if length > COUNTED_LENGTH:
            sizes += rule.sizes(waiting)
            waiting, length = [], 0
    return sizes + rule.sizes(waiting)


def _atoms(text: str, start: int, end: int, size: int, limit: int, rule: Rule) -> Iterator[_Atom]:
    """A block as it is if it fits, otherwise its lines, and of a line that does not fit its pieces."""
    if size <= limit:
        yield _Atom(start, end, size, _BLOCK)
        return
    bounds = [start]
    while (line_end := text.find("\n", bounds[-1], end) + 1) > 0:
        bounds.append(line_end)
    if bounds[-1] < end:
        bounds.append(end)
    sizes = _measured(text, bounds, rule)
    rank = _BLOCK
    for (at, after), of_line in zip(pairwise(bounds), sizes, strict=True):
        if of_line <= limit:
            yield _Atom(at, after, of_line, rank)
        else:
            for piece in _pieces(text[at:after], limit, rule):
                yield _Atom(at, at + len(piece), limit, rank)
                at += len(piece)
                rank = _INSIDE
        line = text[max(at, after - 200) : after]
        rank = _SENTENCE if not line.strip() or _SENTENCE_END.search(line) else _LINE


def _pieces(line: str, limit: int, rule: Rule) -> Iterator[str]:
    while len(line) > LONG_LINE:
        until = max(line.rfind(" ", LONG_LINE // 2, LONG_LINE) + 1, 0) or LONG_LINE
        yield from rule.split(line[:until], limit)
        line = line[until:]
    if line:
        yield from rule.split(line, limit)


def _packed(text: str, atoms: Sequence[_Atom], limit: int) -> Iterator[tuple[int, int]]:
    """Which atoms are one passage: ``(first, after)``."""
    first = 0
    while first < len(atoms):
        total, after = 0, first
        best: tuple[tuple[int, bytes], int] | None = None
        while after < len(atoms) and (after == first or total + atoms[after].size <= limit):
            total += atoms[after].size
            after += 1
            if after < len(atoms) and 2 * total >= limit:
                atom = atoms[after]
                # A text that repeats has many equal lines. The last of them makes fewer chunks.
                weight = (atom.rank, _hash(text[atom.start : atom.end]))
                if best is None or weight <= best[0]:
                    best = weight, after
        chosen = after if after == len(atoms) or best is None else best[1]
        yield first, chosen
        first = chosen


def _fitted(text: str, parts: Sequence[tuple[int, int]], rule: Rule) -> list[tuple[int, int]]:
    """The passages of a section with their overlaps, without white space around them. None is larger than the size.

    Two texts together may have more tokens than they have apart, so each passage is counted once more.
    """
    bare = [block for start, end in parts if (block := trimmed(text, start, end)) is not None]
    whole = [bare[0], *(Block(_overlapping(text, a, b, rule), b.end) for a, b in pairwise(bare))] if bare else []
    fitted: list[tuple[int, int]] = []
    for own, block, size in zip(bare, whole, _sizes_of(text, whole, rule), strict=True):
        if size <= rule.size:
            fitted.append((block.start, block.end))
        elif own.start > block.start and rule.sizes([text[own.start : own.end]])[0] <= rule.size:
            fitted.append((own.start, own.end))
        else:
            at = own.start
            for piece in rule.split(text[own.start : own.end], rule.size):
                if (block := trimmed(text, at, at + len(piece))) is not None:
                    fitted.append((block.start, block.end))
                at += len(piece)
    return fitted


def _sizes_of(text: str, blocks: Sequence[Block], rule: Rule) -> Iterator[int]:
    """The sizes of passages, some of them at a time."""
    some = max(1, COUNTED_LENGTH // max(1, max((block.end - block.start for block in blocks), default=1)))
    for at in range(0, len(blocks), some):
        yield from rule.sizes([text[block.start : block.end] for block in blocks[at : at + some]])


def _overlapping(text: str, before: Block, block: Block, rule: Rule) -> int:
    """Where the passage ``block`` begins with the overlap: at a line or sentence in it, otherwise at a word."""
    if not rule.overlap:
        return block.start
    begin = max(before.start, block.start - rule.overlap * LOOK_BACK)
    end = before.end
    at = begin + rule.tail(text[begin:end], rule.overlap)
    if at > before.start and not text[at - 1].isspace():
        # The first whole word, if there is one.
        while at < end and not text[at].isspace():
            at += 1
    while at < end and text[at].isspace():
        at += 1
    for place in _BEGINNING.finditer(text, max(begin, at - 2), end):
        if at <= place.end() < end:
            return place.end()
    return at if at < end else block.start


def _pages(pages: Sequence[int], start: int, end: int) -> tuple[int | None, int | None]:
    if not pages:
        return None, None
    return bisect_right(pages, start), bisect_right(pages, max(start, end - 1))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
