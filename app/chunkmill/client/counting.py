"""Counts the searches of each space in this process, and writes them to Postgres now and then.

A search only adds to a number in memory. A thread writes the counts every few seconds, as one statement, and ends when
no more searches come. What was not written when the process ends is lost: these are numbers to compare two spaces by,
and no bill.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from chunkmill.domain.latencies import bucket_of
from chunkmill.store import searches
from chunkmill.store.searches import FAILED, Key

logger = logging.getLogger(__name__)

WRITE_SECONDS = 5.0
"""How long counts stay in memory."""
QUIET_ROUNDS = 6
"""After this many rounds without a search the thread ends. The next search begins another one."""
MOST_KEPT = 10_000
"""How many counts are kept while nothing can be written to Postgres."""


class EngineCounts:
    """The counts of the clients of one engine. It is thread-safe."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._counts: Counter[Key] = Counter()
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        self._was_refused = False

    def answered(self, db: sa.Engine, collection_id: int, space_id: int, seconds: float) -> None:
        """Count a search that was answered after ``seconds``."""
        self._add(db, collection_id, space_id, bucket_of(seconds))

    def failed(self, db: sa.Engine, collection_id: int, space_id: int) -> None:
        """Count a search that no worker could answer."""
        self._add(db, collection_id, space_id, FAILED)

    def write(self, db: sa.Engine) -> None:
        """Write what has come together. If Postgres refuses, it is kept for the next time, which the log says once."""
        with self._mutex:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            with db.begin() as conn:
                searches.add(conn, counts)
        except sa.exc.SQLAlchemyError as error:
            dropped = self._keep(counts)
            if dropped or not self._was_refused:
                logger.warning(
                    "the counts of searches cannot be written (%s): %s of them were dropped, and the others are tried "
                    "again. Searches go on.", type(error).__name__, dropped,
                )  # fmt: skip
            self._was_refused = True
        else:
            self._was_refused = False

    def leave(self, db: sa.Engine) -> None:
        """End the thread and write what is left. A search that comes later begins another thread."""
        with self._mutex:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._is_over.set()
            thread.join()
            self._is_over.clear()
        self.write(db)

    def _keep(self, counts: Counter[Key]) -> int:
        """Take counts back, and drop the oldest if they are too many. Returns how many were dropped."""
        with self._mutex:
            self._counts.update(counts)
            many = len(self._counts) - MOST_KEPT
            for key in sorted(self._counts, key=lambda key: key.at)[: max(0, many)]:
                del self._counts[key]
        return max(0, many)

    def _add(self, db: sa.Engine, collection_id: int, space_id: int, bucket: int) -> None:
        key = Key(collection_id, space_id, int(time.time()) // 60 * 60, bucket)
        with self._mutex:
            self._counts[key] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(db,), name="search-counts", daemon=True)
                self._thread.start()

    def _run(self, db: sa.Engine) -> None:
        quiet = 0
        while not self._is_over.wait(WRITE_SECONDS):
            with self._mutex:
                quiet = 0 if self._counts else quiet + 1
                if quiet == QUIET_ROUNDS:
                    self._thread = None
                    return
            self.write(db)


_counting: WeakKeyDictionary[sa.Engine, EngineCounts] = WeakKeyDictionary()
_mutex = threading.Lock()


def counting_of(db: sa.Engine) -> EngineCounts:
    """The counts of this process for the clients of ``db``."""
    with _mutex:
        return _counting.setdefault(db, EngineCounts())


def _begin_in_child() -> None:
    """A child process has no thread of its parent's, which writes what the parent has counted."""
    global _mutex
    _mutex = threading.Lock()
    _counting.clear()


os.register_at_fork(after_in_child=_begin_in_child)
