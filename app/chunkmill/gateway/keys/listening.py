"""Hears the notifications of one channel in a thread, and tells the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import sqlalchemy as sa

from chunkmill.db.connect import raw

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""How often the thread looks whether it is to end."""
AGAIN_SECONDS = 1.0
"""How long it waits before it connects again, if Postgres went away."""


class KeyListener:
    """One connection that listens, from its making on. ``hear`` is called in the loop that made it: with the payload of
    each notification, and with None whenever the connection was made, because what was said before it is not known."""

    def __init__(self, db: sa.Engine, channel: str, hear: Callable[[str | None], None]) -> None:
        self._db = db
        self._channel = channel
        self._hear = hear
        self._loop = asyncio.get_running_loop()
        self._ends = threading.Event()
        self.is_up = threading.Event()
        """Set while the connection listens."""
        self._thread = threading.Thread(target=self._run, name=f"listens to {channel}", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        self._ends.set()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                self._listen()
            except sa.exc.DBAPIError as error:
                logger.warning("cannot listen to %s (%s); trying again", self._channel, type(error.orig).__name__)
            except Exception as error:  # noqa: BLE001 - psycopg's own, when the connection ends under it
                logger.warning("listening to %s ended (%s); trying again", self._channel, type(error).__name__)
            self.is_up.clear()
            self._ends.wait(AGAIN_SECONDS)

    def _listen(self) -> None:
        with self._db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            try:
                conn.execute(sa.text(f"LISTEN {self._channel}"))
                self._tell(None)
                self.is_up.set()
                while not self._ends.is_set():
                    for notice in raw(conn).notifies(timeout=LOOK_SECONDS):
                        self._tell(notice.payload)
            finally:
                conn.invalidate()  # nobody else shall get a connection that listens

    def _tell(self, payload: str | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hear, payload)
