"""Keeps the time at which steps that may hang began, for a watchdog in another thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable, Iterator


class StepClock:
    """The start of each step that is running, and the end of the last one. Safe to use from several threads."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._since: dict[Hashable, float] = {}
        self._ended = time.monotonic()

    def begin(self, key: Hashable) -> None:
        """Note that the step ``key`` begins now."""
        with self._mutex:
            self._since[key] = time.monotonic()

    def end(self, key: Hashable) -> None:
        """Note that the step ``key`` ends now. It must have begun."""
        with self._mutex:
            del self._since[key]
            self._ended = time.monotonic()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Count the block as one step, which ends even if the block raises."""
        key = object()
        self.begin(key)
        try:
            yield
        finally:
            self.end(key)

    def longest(self) -> float:
        """Seconds since the start of the running step that began first; 0.0 if no step is running."""
        with self._mutex:
            return time.monotonic() - min(self._since.values()) if self._since else 0.0

    def quiet(self) -> float:
        """Seconds since the last step ended; 0.0 while a step is running."""
        with self._mutex:
            return 0.0 if self._since else time.monotonic() - self._ended
