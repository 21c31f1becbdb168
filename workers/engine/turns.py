"""Whose forward pass is next: one at a time, in order of arrival, interactive callers first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# So many urgent turns may go before a waiting bulk turn; then one bulk turn passes, so that a stream of
# queries slows a job down and never stops it.
_URGENT_RUN = 8


class Turns:
    """A lock that hands itself on by ticket.

    A plain ``threading.Lock`` lets the thread that just released it take it again (barging), and one bulk
    thread in a loop then keeps every other thread out.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent: deque[object] = deque()
        self._bulk: deque[object] = deque()
        self._busy = False
        self._urgent_run = 0

    @contextmanager
    def turn(self, *, urgent: bool = False) -> Iterator[None]:
        """Wait for this caller's turn and hold the device until the block ends."""
        ticket = object()
        queue = self._urgent if urgent else self._bulk
        with self._changed:
            queue.append(ticket)
            try:
                self._changed.wait_for(lambda: not self._busy and self._next() is ticket)
            finally:  # served, or interrupted while waiting
                queue.remove(ticket)
                self._changed.notify_all()
            self._urgent_run = self._urgent_run + 1 if urgent and self._bulk else 0
            self._busy = True
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many callers wait now."""
        with self._changed:
            return len(self._urgent) + len(self._bulk)

    def _next(self) -> object:
        if self._urgent and not (self._bulk and self._urgent_run >= _URGENT_RUN):
            return self._urgent[0]
        return self._bulk[0]
