"""Steps that may hang, for a watchdog that looks from another thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Hashable, Iterator


class UnderWay:
    """When each step under way began, and when the last one ended."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._since: dict[Hashable, float] = {}
        self._ended = time.monotonic()

    def begin(self, key: Hashable) -> None:
        with self._mutex:
            self._since[key] = time.monotonic()

    def end(self, key: Hashable) -> None:
        with self._mutex:
            del self._since[key]
            self._ended = time.monotonic()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        key = object()
        self.begin(key)
        try:
            yield
        finally:
            self.end(key)

    def longest(self) -> float:
        """Seconds since the start of the one that has been under way longest; 0.0 for none."""
        with self._mutex:
            return time.monotonic() - min(self._since.values()) if self._since else 0.0

    def quiet(self) -> float:
        """Seconds since the last one ended; 0.0 while one is under way."""
        with self._mutex:
            return 0.0 if self._since else time.monotonic() - self._ended
