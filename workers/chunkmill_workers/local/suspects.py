"""Suspects are embedded alone: when a worker dies with one, nothing else can have been the cause."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Room:
    """Many ChunkBatches at a time, or one suspect by itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._suspect = False

    @property
    def inside(self) -> int:
        """Threads at work, or waiting for their turn alone."""
        with self._changed:
            return self._inside

    @property
    def has_suspect(self) -> bool:
        """Whether one is alone here, or waits to be."""
        with self._changed:
            return self._suspect

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Wait until no suspect wants the room or has it. Claim inside: a lease that waits could die for another's
        fault."""
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
        """From inside :meth:`entered`: wait until all others have left. False: another suspect was first."""
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
