"""Where the windows of a long text begin and end: the rule that `LongText.SPLIT` names. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

# Two neighbouring windows share an eighth of the tokens that fit into one, so a sentence that one window cuts is often
# complete in the other. The number is part of what LongText.SPLIT means, because with another one the vectors differ.
_OVERLAP_SHARE: Final = 8


class WindowBounds(NamedTuple):
    """The tokens ``start`` to ``end`` of a text, and the window's ``weight`` in the text's mean."""

    start: int
    end: int
    weight: int


def window_bounds(length: int, room: int) -> list[WindowBounds]:
    """The overlapping windows, of at most ``room`` tokens each, of a text of ``length`` tokens.

    There are as few windows as hold the text if each two neighbours share an eighth of ``room``. All are equally long,
    give or take a token: if they were cut to the limit one after the other, the last could have a handful of tokens.

    No token is in more than two windows. A token that is in two counts half in each, so the weights are numbers of
    tokens that add up to the text's. They are doubled, so that they are whole numbers.
    """
    overlap = room // _OVERLAP_SHARE
    fresh = length - overlap  # tokens beyond the first overlap; each window adds an equal part of them
    count = max(1, -(-fresh // (room - overlap)))
    starts = [number * fresh // count for number in range(count)]
    ends = [start + overlap for start in [*starts[1:], fresh]]
    neighbours = [(number > 0) + (number < count - 1) for number in range(count)]
    return [
        WindowBounds(start, end, 2 * (end - start) - overlap * beside)
        for start, end, beside in zip(starts, ends, neighbours, strict=True)
    ]
