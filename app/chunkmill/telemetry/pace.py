"""How fast counts grow, measured over a sliding window."""

from __future__ import annotations

from collections import deque


class Pace:
    """Readings of one or more counts, of which those of the last ``window_seconds`` are kept."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._readings: deque[tuple[float, tuple[float, ...]]] = deque()

    def add(self, at: float, *counts: float) -> tuple[float, ...]:
        """Keep a reading, and return how much each count grew per second since the oldest reading in the window.

        Every rate is 0 as long as there is only one reading in the window.
        """
        self._readings.append((at, counts))
        while at - self._readings[0][0] > self._window_seconds:
            self._readings.popleft()
        then, before = self._readings[0]
        if at <= then:
            return (0.0,) * len(counts)
        return tuple((count - old) / (at - then) for count, old in zip(counts, before, strict=True))
