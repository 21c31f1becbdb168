"""Looks at the ledger all the time, so that a fault's end and the next progress can be told apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from tests.support.waiting import PATIENCE

LOOK_SECONDS = 0.1

Held = frozenset[tuple[int, int]]
"""``(ChunkBatch, attempt)`` pairs."""


@dataclass(frozen=True, slots=True)
class Look:
    """The ledger at one moment. Times are ``time.monotonic``'s."""

    asked: float
    at: float
    vectors: int
    attempts: int
    open: int
    running: dict[str, Held]
    """By the worker that holds them."""

    @property
    def held(self) -> Held:
        return frozenset().union(*self.running.values())


class Watcher(threading.Thread):
    """``db``: an engine in autocommit. While Postgres is away there is no look, and whoever waits goes on waiting."""

    def __init__(self, db: sa.Engine, table: str) -> None:
        super().__init__(name="watcher", daemon=True)
        self._db = db
        self._query = sa.text(
            f"SELECT (SELECT count(*) FROM {table}) AS vectors, coalesce(sum(attempt), 0) AS attempts, "
            "count(*) FILTER (WHERE state IN ('available', 'running')) AS open, "
            "coalesce(jsonb_agg(jsonb_build_array(lease_owner, id, attempt)) FILTER (WHERE state = 'running'), '[]') "
            "AS running FROM chunk_batches"
        )
        self._changed = threading.Condition()
        self._looks: list[Look] = []
        self._ended = threading.Event()

    def end(self) -> None:
        self._ended.set()
        self.join(PATIENCE)

    @property
    def latest(self) -> Look | None:
        with self._changed:
            return self._looks[-1] if self._looks else None

    def since(self, moment: float, timeout: float) -> Iterator[Look]:
        """Every look that was begun after ``moment``, in order, as they come; ends when ``timeout`` has passed."""
        deadline = time.monotonic() + timeout
        seen = 0
        while True:
            with self._changed:
                while seen == len(self._looks):
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        return
                new = self._looks[seen:]
            seen += len(new)
            yield from (look for look in new if look.asked > moment)

    def after(self, moment: float, timeout: float) -> Look | None:
        """The first look that was begun after ``moment``; None when none came in time."""
        return next(self.since(moment, timeout), None)

    def run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            asked = time.monotonic()
            try:
                with self._db.connect() as conn:
                    row = conn.execute(self._query).one()
            except sa.exc.DBAPIError:
                continue  # away: that is what happens here
            running: dict[str, set[tuple[int, int]]] = {}
            for owner, chunk_batch_id, attempt in row.running:
                running.setdefault(owner, set()).add((chunk_batch_id, attempt))
            look = Look(
                asked, time.monotonic(), row.vectors, int(row.attempts), row.open,
                {owner: frozenset(pairs) for owner, pairs in running.items()},
            )  # fmt: skip
            with self._changed:
                self._looks.append(look)
                self._changed.notify_all()
