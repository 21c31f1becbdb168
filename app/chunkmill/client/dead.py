"""The client's methods for the dead list: show chunks that have no vector, retry them, take them off."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from chunkmill.client.base import ClientPart
from chunkmill.domain import planning
from chunkmill.domain.arguments import as_flag, as_items, as_number, as_text, require_name
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import DeadDetails, DeadEntry, DroppedDead, RetriedDead
from chunkmill.errors import InvalidInput
from chunkmill.ledger.access import spends
from chunkmill.ledger.dead import dead_chunks, dead_retry
from chunkmill.ledger.dead.dead_chunks import DeadFilter
from chunkmill.ledger.jobs import jobs, routing
from chunkmill.spaces import collections
from chunkmill.store.delete import delete_some

DROP_STEP = 2_000
"""How many entries of the dead list one transaction drops. Enqueues and writes wait for it: 40,000 took 3.8 s."""


class DeadList(ClientPart):
    """The part of the client that is about dead chunks."""

    def dead(
        self,
        job_id: int | None = None,
        collection: str | None = None,
        code: str | None = None,
        limit: int = 1000,
    ) -> list[DeadEntry]:
        """The newest ``limit`` entries of the dead list.

        ``job_id``, ``collection`` and ``code`` keep only the entries of a job, of a collection, or with a code. Raises
        :class:`NotFound` for a job or a collection that does not exist.
        """
        limit = as_number("limit", limit, least=0)
        with self._transaction() as conn:
            entries = dead_chunks.entries(conn, self._listed(conn, job_id, collection, code), limit=limit)
            return Rows(entries, DeadEntry)

    def dead_codes(
        self, job_id: int | None = None, collection: str | None = None, code: str | None = None
    ) -> dict[str, int]:
        """``code → entries`` of the dead list, the most frequent first. The arguments are those of :meth:`dead`."""
        with self._transaction() as conn:
            return dead_chunks.count_codes(conn, self._listed(conn, job_id, collection, code))

    def dead_chunk(self, dead_id: int, *, with_text: bool = False) -> DeadDetails:
        """All that is known of one entry of the dead list, with its text if ``with_text``. Raises :class:`NotFound`."""
        dead_id, with_text = as_number("dead_id", dead_id), as_flag("with_text", with_text)
        with self._transaction() as conn:
            return dead_chunks.details(conn, dead_id, with_text=with_text)

    def retry_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> RetriedDead:
        """Embed the texts of dead chunks after all, in the jobs that they belong to.

        ``ids`` names the chunks. Without it, ``job_id`` and ``code`` choose all of a job, all with a code, or both.
        A text that killed workers stays a suspect, which workers embed alone. A chunk cannot be retried if enqueue
        refused it, if it was refused as too long, if it was replaced or deleted since, or if its job was cancelled.
        Such a chunk raises :class:`InvalidInput` if ``ids`` names it. It is ignored if the job or the code chooses it,
        unless they choose no other. Raises :class:`NotFound` for an id that is not on the list. A call that raises
        changes nothing.
        """
        dead_filter = self._meant(ids, job_id, code)
        with self._transaction() as conn:
            retried = dead_retry.retry(
                conn,
                dead_filter,
                max_contents=self._settings.chunk_batch_size,
                max_bytes=planning.MAX_BATCH_BYTES,
                max_attempts=self._settings.max_attempts,
            )
            for job_id in sorted(retried.jobs):
                spends.go_on(conn, job_id, may_cost=routing.job_may_cost(conn, self._settings, job_id))
        self._take_up(retried.jobs)
        return retried

    def drop_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> DroppedDead:
        """Take chunks off the dead list and out of their collections. A job that failed for nothing else completes.

        ``ids`` names the chunks. Without it, ``job_id`` and ``code`` choose all of a job, all with a code, or both.
        If a chunk was given another text since, or if its text has a vector since, only its entry is deleted and the
        chunk stays in its collection. A chunk that is dead in another space of its collection than the active one stays
        too, with its entry. A text that no chunk refers to any more is deleted. Raises :class:`NotFound` for an id that
        is not on the list, and :class:`InvalidInput` for that of a chunk that is dead in another space; nothing is
        changed then. Many chunks are dropped in several transactions. If one of them fails, the earlier ones stay, and
        the same call made again drops the rest.
        """
        dead_filter = self._meant(ids, job_id, code)
        with self._transaction() as conn:
            chosen = dead_retry.selected_ids(conn, dead_filter)
        judged: set[int] = set()
        entries = chunks = 0
        for first in range(0, len(chosen), DROP_STEP):
            with self._transaction() as conn:
                step = chosen[first : first + DROP_STEP]
                # Later steps pass over what somebody else took meanwhile, or an earlier step as another job's entry.
                require_all = first == 0 and dead_filter.ids is not None
                dropped, leaving = dead_retry.take_off(conn, step, require_all=require_all)
                for collection, chunk_ids in leaving.items():
                    if row := collections.resolve(conn, collection):  # it may have been dropped a moment ago
                        delete_some(conn, collection_id=row.id, chunk_ids=chunk_ids, limit=len(chunk_ids))
            judged.update(dropped.jobs)
            entries += dropped.entries
            chunks += dropped.chunks
        self._take_up(sorted(judged))
        return DroppedDead(tuple(sorted(judged)), entries, chunks)

    @staticmethod
    def _listed(conn: sa.Connection, job_id: int | None, collection: str | None, code: str | None) -> DeadFilter:
        if job_id is not None:
            jobs.get(conn, as_number("job_id", job_id))
        if collection is not None:
            require_name("collection", collection)
            collection = collections.find(conn, collection).name
        if code is not None:
            as_text("code", code)
        return DeadFilter(job_id=job_id, collection=collection, code=code)

    @staticmethod
    def _meant(ids: Iterable[int] | None, job_id: int | None, code: str | None) -> DeadFilter:
        if (ids is None) == (job_id is None and code is None):
            raise InvalidInput("give either ids, or job_id or code or both, to say which dead chunks are meant.")
        if job_id is not None:
            as_number("job_id", job_id)
        if code is not None:
            as_text("code", code)
        if ids is None:
            return DeadFilter(job_id=job_id, code=code)
        return DeadFilter(ids=tuple(as_number("an id in ids", dead_id) for dead_id in as_items("ids", ids)))
