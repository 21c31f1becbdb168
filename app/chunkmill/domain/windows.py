"""Where the windows of a long text begin and end: the rule that `LongText.SPLIT` names. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

# What two neighbouring windows share, as a part of a window's room: a sentence that one window cuts is whole in
# the other. Part of the space's meaning (LongText.SPLIT): another number makes other vectors.
_OVERLAP_SHARE: Final = 8


class WindowBounds(NamedTuple):
    """Tokens ``start`` to ``end`` of the text; ``weight`` is what the window counts for in the text's mean."""

    start: int
    end: int
    weight: int


def window_bounds(length: int, room: int) -> list[WindowBounds]:
    """Overlapping windows of at most ``room`` tokens over a text of ``length`` tokens.

    There are as few windows as hold the text with an eighth of the room shared by each two neighbours, and all are
    equally long (but for one token): the last of windows cut to the limit could be a handful of tokens, and would
    count as a window. No token is in more than two windows; one that is in two counts half in each, so the weights
    are token counts that add up to the text's. They are given doubled, as whole numbers.
    """
    overlap = room // _OVERLAP_SHARE
    fresh = length - overlap  # what the windows add to the first one's overlap, each its part
    count = max(1, -(-fresh // (room - overlap)))
    starts = [number * fresh // count for number in range(count)]
    ends = [start + overlap for start in [*starts[1:], fresh]]
    neighbours = [(number > 0) + (number < count - 1) for number in range(count)]
    return [
        WindowBounds(start, end, 2 * (end - start) - overlap * beside)
        for start, end, beside in zip(starts, ends, neighbours, strict=True)
    ]
