"""How fast counts grow, measured over a sliding window."""

from __future__ import annotations

from collections import deque
from typing import Final

ENOUGH: Final = 512
"""How much the first count must have grown before the time that is left is estimated: a ChunkBatch of the usual size.
A worker embeds the longest texts of a ChunkBatch first, so until then a job would seem to take several times as long as
it does."""
ENOUGH_SECONDS: Final = 60.0
"""After this long the time that is left is estimated from whatever there is."""


class Pace:
    """Readings of one or more counts, of which those of the last ``window_seconds`` are kept."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._readings: deque[tuple[float, tuple[float, ...]]] = deque()
        self._first = (0.0, 0.0)
        self._rate = 0.0
        self._is_enough = False

    def add(self, at: float, *counts: float) -> tuple[float, ...]:
        """Keep a reading, and return how much each count grew per second since the oldest reading in the window.

        Every rate is 0 as long as there is only one reading in the window.
        """
        if not self._readings:
            self._first = (at, counts[0])
        began, first = self._first
        self._is_enough = self._is_enough or counts[0] - first >= ENOUGH or at - began >= ENOUGH_SECONDS
        self._readings.append((at, counts))
        while at - self._readings[0][0] > self._window_seconds:
            self._readings.popleft()
        then, before = self._readings[0]
        if at <= then:
            self._rate = 0.0
            return (0.0,) * len(counts)
        rates = tuple((count - old) / (at - then) for count, old in zip(counts, before, strict=True))
        self._rate = rates[0]
        return rates

    def seconds_left(self, left: float) -> float | None:
        """How many seconds it takes until the first count has grown by ``left``, or None if nobody can tell yet."""
        return left / self._rate if self._is_enough and self._rate > 0 else None
