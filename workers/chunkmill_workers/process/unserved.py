"""The spaces that a worker leaves to others for a while, because it lacks something that they need."""

from __future__ import annotations

import threading
import time

from chunkmill.domain.reasons import reason_of
from chunkmill.errors import ChunkmillError

UNSERVED_SECONDS = 60.0
"""How long a worker leaves a space to other workers. A worker that lacks a model fails fast, so without this it would
take most of that model's work, although others could do it."""


class UnservedWork:
    """What a worker could not serve lately, and why. Its threads share it."""

    def __init__(self) -> None:
        self._until: dict[int, tuple[float, str]] = {}
        self._mutex = threading.Lock()

    def leave(self, space_id: int, because: ChunkmillError) -> None:
        """Leave a space to other workers for a while."""
        with self._mutex:
            self._until[space_id] = (time.monotonic() + UNSERVED_SECONDS, reason_of(because))

    def now(self) -> dict[int, str]:
        """The ids of the spaces that are left to other workers for now, each with the reason."""
        now = time.monotonic()
        with self._mutex:
            return {space_id: reason for space_id, (until, reason) in self._until.items() if until > now}

    def clear(self) -> None:
        with self._mutex:
            self._until.clear()
