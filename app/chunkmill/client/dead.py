"""The dead list: chunks that got no vector, and what to do with them."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from chunkmill.client.base import Connected
from chunkmill.client.enqueue import MAX_BATCH_BYTES
from chunkmill.domain.results import DeadDetails, DeadEntry, DroppedDead, RetriedDead
from chunkmill.errors import InvalidInput
from chunkmill.ledger.dead import dead_chunks, dead_retry
from chunkmill.ledger.dead.dead_chunks import Which
from chunkmill.ledger.jobs import jobs
from chunkmill.spaces import collections
from chunkmill.store.delete import delete_some


class DeadList(Connected):
    """The part of the client that is about dead chunks."""

    def dead(
        self,
        job_id: int | None = None,
        collection: str | None = None,
        code: str | None = None,
        limit: int = 1000,
    ) -> list[DeadEntry]:
        """The newest ``limit`` entries of the dead list: of a job, of a collection, with a code, or all.

        Raises :class:`NotFound` for a job or a collection that does not exist.
        """
        with self._transaction() as conn:
            return dead_chunks.entries(conn, self._listed(conn, job_id, collection, code), limit=limit)

    def dead_codes(
        self, job_id: int | None = None, collection: str | None = None, code: str | None = None
    ) -> dict[str, int]:
        """``code → entries`` of the dead list, the most frequent first. The arguments are those of :meth:`dead`."""
        with self._transaction() as conn:
            return dead_chunks.count_codes(conn, self._listed(conn, job_id, collection, code))

    def dead_chunk(self, dead_id: int, *, with_text: bool = False) -> DeadDetails:
        """All that is known of one entry of the dead list, its text only if asked for. Raises :class:`NotFound`."""
        with self._transaction() as conn:
            return dead_chunks.details(conn, dead_id, with_text=with_text)

    def retry_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> RetriedDead:
        """Have the texts of dead chunks embedded after all, each in its job: those of ``ids``, or all of a job, with a
        code, or both.

        What killed workers stays a suspect, which workers embed alone. A chunk refused at the door or as too long, one
        that was replaced or deleted since, and one whose job was cancelled cannot be retried: named in ``ids`` it
        raises :class:`InvalidInput`, found by job or code it is passed over, and raises only where nothing else is
        found. Raises :class:`NotFound` for an id that is not on the list. Nothing is changed by a call that raises.
        """
        which = self._meant(ids, job_id, code)
        with self._transaction() as conn:
            retried = dead_retry.retry(
                conn,
                which,
                max_contents=self._settings.chunk_batch_size,
                max_bytes=MAX_BATCH_BYTES,
                max_attempts=self._settings.max_attempts,
            )
        self._take_up(retried.jobs)
        return retried

    def drop_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> DroppedDead:
        """Take chunks off the dead list and out of their collections: those of ``ids``, or all of a job, with a code,
        or both. A job that failed for nothing else completes.

        A chunk that carries another text since, or whose text has a vector since, stays where it is; only its entry
        goes. A text that no chunk refers to any more is deleted. Raises :class:`NotFound` for an id that is not on the
        list; nothing is changed then.
        """
        which = self._meant(ids, job_id, code)
        with self._transaction() as conn:
            dropped, leaving = dead_retry.take_off(conn, which)
            for collection, chunk_ids in leaving.items():
                found = collections.find(conn, collection)
                delete_some(conn, collection_id=found.id, chunk_ids=chunk_ids, limit=len(chunk_ids))
        self._take_up(dropped.jobs)
        return dropped

    @staticmethod
    def _listed(conn: sa.Connection, job_id: int | None, collection: str | None, code: str | None) -> Which:
        if job_id is not None:
            jobs.get(conn, job_id)
        if collection is not None:
            collections.find(conn, collection)
        return Which(job_id=job_id, collection=collection, code=code)

    @staticmethod
    def _meant(ids: Iterable[int] | None, job_id: int | None, code: str | None) -> Which:
        if (ids is None) == (job_id is None and code is None):
            raise InvalidInput("say which dead chunks: either ids, or job_id or code or both.")
        if ids is None:
            return Which(job_id=job_id, code=code)
        chosen = tuple(ids)
        if not all(isinstance(each, int) for each in chosen):
            raise InvalidInput("ids must be whole numbers, as `dead` and `chunkmill dead list` give them.")
        return Which(ids=chosen)
