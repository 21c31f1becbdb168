"""Makes sure that a suspect is embedded alone. If the worker dies then, nothing else can be the cause."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Workroom:
    """Admits many ChunkBatches at a time, or one suspect by itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._suspect = False

    @property
    def inside(self) -> int:
        """How many threads are at work or wait to be alone."""
        with self._changed:
            return self._inside

    @property
    def has_suspect(self) -> bool:
        """Whether a suspect is alone in it or waits to be."""
        with self._changed:
            return self._suspect

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter when no suspect is alone in it or waits to be.

        Claim inside: a lease that waited outside could be lost through the fault of another ChunkBatch.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._suspect)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """From inside :meth:`entered`, wait until all others have left. Yields False if another suspect was first."""
        with self._changed:
            mine = not self._suspect
            if mine:
                self._suspect = True
                self._changed.wait_for(lambda: self._inside == 1)
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._suspect = False
                    self._changed.notify_all()
