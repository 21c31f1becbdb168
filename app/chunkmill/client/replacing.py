"""Deletes from a collection what the source of an enqueue does not have any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.db.temporary import dropping
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.filters import Filter
from chunkmill.errors import InvalidChunk
from chunkmill.ledger.jobs import jobs, streams
from chunkmill.spaces import collections
from chunkmill.store import replacing as store

NOTE_STEP = 5_000
"""How many ids are noted at a time."""
DELETE_STEP = 5_000
"""How many chunks one transaction deletes. Enqueues wait while it runs."""
ANY_JOB = NO_FENCE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Replacement:
    """What is going to be deleted: the chunks that pass ``chosen``, and that were in the collection when the
    replacement began, and that neither the source nor any other enqueue has named since.

    Memory is constant: the ids of the source are in a temporary table of ``conn``.
    """

    conn: sa.Connection
    chosen: Filter
    collection_id: int | None
    """None if there was no collection: then there is nothing to delete."""
    fence: int

    def noting(self, items: Iterable[PreparedChunk | InvalidChunk]) -> Iterator[PreparedChunk | InvalidChunk]:
        """The items of the source, whose ids are noted on the way, also those of what was refused.

        An id is noted before its item is used, or with the last ones. Use them when ``conn`` is in no transaction.
        """
        ids: list[str] = []
        refused: list[str] = []
        for item in items:
            if isinstance(item, PreparedChunk):
                ids.append(item.id)
            elif item.known_id is not None:
                refused.append(item.known_id)
            if len(ids) + len(refused) == NOTE_STEP:
                self._note(ids, refused)
                ids, refused = [], []
            yield item
        self._note(ids, refused)

    def missing(self) -> int:
        """How many chunks :meth:`delete` would delete now."""
        return sum(map(len, self._windows(ANY_JOB)))

    def delete(self, job_id: int) -> None:
        """Delete the chunks, a slice at a time, and note with the job how many they were.

        Before this call, the source was read to its end, and the job with its chunks was sealed. If the call continues
        the deletions of an earlier call with the same idempotency key, it uses the fence of that call. Chunks that a
        later job has written stay in any case.
        """
        n = 0
        with self.conn.begin():
            # The name may belong to another collection by now, of which nothing is known here.
            is_same = jobs.collection_id(self.conn, job_id) == self.collection_id
        for ids in self._windows(job_id) if is_same else ():
            for first in range(0, len(ids), DELETE_STEP):
                assert self.collection_id is not None  # noqa: S101 - there was a window
                with self.conn.begin():
                    n += store.delete_missing(
                        self.conn,
                        collection_id=self.collection_id,
                        fence=self.fence,
                        ids=ids[first : first + DELETE_STEP],
                    )
        with self.conn.begin():
            streams.add_deleted(self.conn, job_id, n)

    def _note(self, ids: list[str], refused: list[str]) -> None:
        if ids or refused:
            with self.conn.begin():
                store.add_source_ids(self.conn, ids)
                store.add_refused_ids(self.conn, refused)

    def _windows(self, job_id: int) -> Iterator[list[str]]:
        after: str | None = None if self.collection_id is None else ""
        while after is not None:
            assert self.collection_id is not None  # noqa: S101 - else there is no window
            with self.conn.begin():
                ids, after = store.pick_missing(
                    self.conn,
                    collection_id=self.collection_id,
                    chosen=self.chosen,
                    fence=self.fence,
                    job_id=job_id,
                    after=after,
                )
            if ids:
                yield ids


@contextlib.contextmanager
def rehearse(conn: sa.Connection, collection: str, chosen: Filter) -> Iterator[Replacement]:
    """Only count what would be deleted. The ids of the source are noted, and no other enqueue has to wait."""
    with dropping(conn, store.SOURCE_IDS, store.REFUSED_IDS):
        with conn.begin():
            store.create_source_ids(conn)
            named = collections.resolve(conn, collection)
        yield Replacement(conn, chosen, None if named is None else named.id, NO_FENCE)


@contextlib.contextmanager
def begin(conn: sa.Connection, collection: str, chosen: Filter) -> Iterator[Replacement]:
    """Begin to replace, before the source is read. ``conn`` serves the whole enqueue, and watches the collection."""
    with dropping(conn, store.SOURCE_IDS, store.REFUSED_IDS):
        with conn.begin():
            streams.require_deletions(conn)
            store.create_source_ids(conn)
            named = collections.resolve(conn, collection)
        if named is None:
            yield Replacement(conn, chosen, None, 0)
            return
        try:
            with conn.begin():
                fence = store.watch(conn, named.id)
            yield Replacement(conn, chosen, None if fence is None else named.id, fence or 0)
        finally:
            _unwatch(conn, named.id)


def _unwatch(conn: sa.Connection, collection_id: int) -> None:
    try:
        conn.rollback()
        with conn.begin():
            store.unwatch(conn, collection_id)
    except sa.exc.SQLAlchemyError:
        # The lock ends with its connection, so the pool must not keep this one.
        conn.invalidate()
