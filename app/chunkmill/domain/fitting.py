"""How wide the columns of a table are on a screen, so that no word is broken. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

SHORT, SHORTEST = 12, 6
"""A cell of so many columns stays on one line if possible, as ``11-29 17:04``; and one of the second number in any
case, as ``100 %``."""
LONGEST_WORD = 32
"""A longer word, such as a path or a URL, may be broken if the table does not fit otherwise."""
GAP = 2
"""How many blanks stand between two columns."""


def column_widths(
    columns: Sequence[Sequence[str]], screen: int, length: Callable[[str], int], *, breaks_long: bool = True
) -> list[int] | None:
    """The width of each column; None if they do not fit beside each other without broken words.

    Without ``breaks_long``, words longer than ``LONGEST_WORD`` are not broken either.

    A column holds its head and its cells. ``screen`` is the number of columns of the screen, and ``length`` says how
    many of them a text takes.
    """
    room = screen - GAP * (len(columns) - 1)
    most = [max(map(length, column)) for column in columns]
    if sum(most) <= room:
        return most
    for short, longest in ((SHORT, screen), (SHORTEST, screen), (SHORTEST, LONGEST_WORD))[: 2 + breaks_long]:
        least = [min(longest, _least(column, short, length)) for column in columns]
        if sum(least) <= room:
            return _shared(least, most, room - sum(least))
    return None


def _least(column: Sequence[str], short: int, length: Callable[[str], int]) -> int:
    parts = (part for text in column for part in ([text] if length(text) <= short else text.split()))
    return max(map(length, parts), default=1)


def _shared(least: Sequence[int], most: Sequence[int], spare: int) -> list[int]:
    """What is left goes to the columns that want more, in proportion to what they want."""
    wanted = [m - n for n, m in zip(least, most, strict=True)]
    total = sum(wanted)
    return [n + (want if total <= spare else spare * want // total) for n, want in zip(least, wanted, strict=True)]
