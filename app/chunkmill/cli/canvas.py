"""Draws points and lines on a terminal, with the dots of braille letters. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

BLANK = 0x2800
# Which bit of a braille letter is the dot in a column and a row, from the top: https://www.unicode.org/charts/PDF/U2800.pdf
BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
ACROSS, DOWN = 2, 4
"""The dots of one letter."""


class Canvas:
    """``columns`` × ``rows`` letters, with twice as many dots across and four times as many down."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.width, self.height = ACROSS * columns, DOWN * rows
        self._bits: dict[tuple[int, int], int] = {}
        self._colours: dict[tuple[int, int], Counter[str]] = {}

    def dot(self, x: int, y: int, colour: str) -> None:
        """Draw the dot ``x`` from the left and ``y`` from the bottom. One that is outside is not drawn."""
        if not (0 <= x < self.width and 0 <= y < self.height):
            return
        down = self.height - 1 - y
        cell = x // ACROSS, down // DOWN
        self._bits[cell] = self._bits.get(cell, 0) | BITS[x % ACROSS][down % DOWN]
        self._colours.setdefault(cell, Counter())[colour] += 1

    def lines(self) -> list[Text]:
        """The rows from the top. A letter has the colour of most of its dots."""
        made = []
        for row in range(self.rows):
            line = Text()
            for column in range(self.columns):
                bits = self._bits.get((column, row), 0)
                if not bits:
                    line.append(" ")
                    continue
                colours = self._colours[column, row]
                # Of equally many the first in the alphabet, so that the same points look the same.
                colour = min(colours, key=lambda name: (-colours[name], name))
                line.append(chr(BLANK + bits), Style(color=colour))
            made.append(line)
        return made


def scatter(points: Sequence[tuple[float, float]], colours: Sequence[str], columns: int, rows: int) -> list[Text]:
    """Points with their colours, as large as fits with one scale for both axes."""
    canvas = Canvas(columns, rows)
    if points:
        lows = [min(point[axis] for point in points) for axis in (0, 1)]
        widths = [max(point[axis] for point in points) - low for axis, low in enumerate(lows)]
        # A letter is about twice as high as wide, so a dot is as high as wide.
        scale = min(
            (
                (size - 1) / width
                for size, width in zip((canvas.width, canvas.height), widths, strict=True)
                if width > 0
            ),
            default=0.0,
        )
        margins = [
            (size - 1 - width * scale) / 2 for size, width in zip((canvas.width, canvas.height), widths, strict=True)
        ]
        for (x, y), colour in zip(points, colours, strict=True):
            canvas.dot(round(margins[0] + (x - lows[0]) * scale), round(margins[1] + (y - lows[1]) * scale), colour)
    return canvas.lines()


def area(values: Sequence[float | None], most: float, colour: str, columns: int, rows: int) -> list[Text]:
    """Values over time, each filled down to zero. What is None stays empty, and what is beyond ``most`` is cut."""
    canvas = Canvas(columns, rows)
    for x in range(canvas.width if values else 0):
        value = values[x * len(values) // canvas.width]
        if value is None or most <= 0:
            continue
        # The least that is not nothing is one dot.
        for y in range(min(canvas.height, math.ceil(value / most * canvas.height))):
            canvas.dot(x, y, colour)
    return canvas.lines()


def bar(share: float, columns: int) -> str:
    """A bar over ``share`` of the columns, which ends at an eighth of a column."""
    eighths = round(max(0.0, min(1.0, share)) * columns * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def round_up(value: float) -> float:
    """The next number of one or two digits at which an axis may end: 1, 1.5, 2, 2.5, 3 and so on; 1 for 0."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        factor * power for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= value * (1 - 1e-9)
    )
