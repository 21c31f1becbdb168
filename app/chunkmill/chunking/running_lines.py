"""Finds the running heads and the page numbers in the pages of a document. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

LEAST_PAGES: Final = 3
"""On so many pages at least a line has to stand at its place, and on half of them."""
PLACES: Final = (0, 1, -1, -2)
"""Where such lines stand: the first two lines of a page and the last two."""
_NUMBER: Final = re.compile(r"\d{1,6}")


@dataclass(frozen=True, slots=True)
class _Form:
    """What the lines at one place of several pages have in common."""

    place: int
    before: str
    after: str = ""
    offset: int | None = None
    """By how much the number between ``before`` and ``after`` differs from that of the page. None if all is the same.
    """

    @property
    def has_words(self) -> bool:
        return any(map(str.isalpha, self.before + self.after))


def without_running_lines(pages: Sequence[str]) -> list[str]:
    """The pages without what is repeated at their beginnings and ends: lines that are the same on at least half of the
    pages, and page numbers, which count up with the pages.

    The first page on which a line stands keeps it, unless it is a mere page number. A line of words and a number that
    counts up is taken for a page number only if it ends the page, because "Exercise 7" may begin one.
    """
    lines = [page.split("\n") for page in pages]
    counts = Counter(form for number, page in enumerate(lines) for _, form in set(_forms(page, number)))
    least = max(LEAST_PAGES, sum(map(bool, pages)) // 2)
    running = {form for form, count in counts.items() if count >= least}
    kept: list[str] = []
    seen: set[_Form] = set()
    for number, page in enumerate(lines):
        here = [(at, form) for at, form in _forms(page, number) if form in running]
        dropped = {at for at, form in here if form in seen or (form.offset is not None and not form.has_words)}
        seen.update(form for _, form in here)
        kept.append("\n".join(line for at, line in enumerate(page) if at not in dropped).strip("\n"))
    return kept


def _forms(page: Sequence[str], number: int) -> Iterator[tuple[int, _Form]]:
    """The lines at the places of a page, by their indexes, with each form that they may have."""
    for place in PLACES:
        if not -len(page) <= place < len(page):
            continue
        at, line = place % len(page), page[place].strip()
        if not line:
            continue
        yield at, _Form(place, line)
        for digits in _NUMBER.finditer(line):
            form = _Form(place, line[: digits.start()], line[digits.end() :], int(digits[0]) - number)
            if place == -1 or not form.has_words:
                yield at, form
