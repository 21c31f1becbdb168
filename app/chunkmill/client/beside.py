"""What an enqueue writes for the spaces of its collection other than that of its own job."""

from __future__ import annotations

import sqlalchemy as sa

from chunkmill.client.finish import end_or_leave
from chunkmill.domain import planning
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.states import Priority
from chunkmill.ledger.access import spends
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.jobs.jobs import OpenedJob
from chunkmill.ledger.reembedding.beside import open_beside
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.others import Lives
from chunkmill.spaces.registry import Space, VectorTable
from chunkmill.store import staging

Contents = dict[int, dict[bytes, bytes]]
"""Space → content hash → UTF-8 text of what is to be embedded into it beside the producer's job."""


class JobsBeside:
    """The jobs beside one producer's job: one for each other space that a window had something for.

    A window may be rolled back and written again, so that what it opened counts only after :meth:`committed`.
    """

    def __init__(
        self,
        conn: sa.Connection,
        settings: Settings,
        collection: Collection,
        space: Space,
        priority: Priority,
        job_id: int,
    ) -> None:
        self._conn = conn
        self._settings = settings
        self._collection = collection
        self._space = space
        self._priority = priority
        self._job_id = job_id
        self._jobs: dict[int, OpenedJob | None] = {}
        """Space → its job; None if it was cancelled, or could not be opened. The poller fills that space."""
        self._written: dict[int, OpenedJob | None] = {}
        self._locked: list[int] = []

    def needed(self, lives: Lives, references: tuple[PreparedChunk, ...]) -> Contents:
        """What the staged window has for other spaces: contents that are new to the collection and have no vector.

        What the collection had before is in the other spaces, or a pass of the poller gives it to them: a collection
        that is enqueued again while a space is being filled must not be embedded twice. Call it before the chunks are
        merged.
        """
        self._written = dict(self._jobs)
        others = lives.ids - {self._space.id}
        if not others:
            return {}
        new = staging.new_contents(self._conn, self._collection.id)
        if not new:
            return {}
        texts = {chunk.content_hash: chunk.text for chunk in references if chunk.content_hash in new}
        needed = {}
        for space_id in sorted(others):
            known = staging.known_hashes(self._conn, VectorTable(space_id), list(texts))
            missing = {content_hash: text for content_hash, text in texts.items() if content_hash not in known}
            if missing:
                needed[space_id] = missing
        return needed

    def write(self, lives: Lives, needed: Contents, *, max_bytes: int) -> None:
        """Add ChunkBatches for what is ``needed``, in the transaction of the window."""
        for space_id, missing in needed.items():
            job = self._job(lives, space_id)
            if job is None:
                continue
            if not jobs.add_chunks(self._conn, job.id, len(missing)):
                self._written[space_id] = None  # somebody cancelled it
                continue
            shared = chunk_batches.SharedFields(
                job.id, space_id, job.lane, self._priority.rank, self._settings.max_attempts
            )
            chunk_batches.add(
                self._conn, shared, planning.into_chunk_batches(missing, self._settings.chunk_batch_size, max_bytes)
            )

    def committed(self) -> None:
        """Note that the window was committed, with what was opened in it."""
        self._jobs = self._written

    def seal(self) -> None:
        """Seal the jobs. Each ends by itself: the producer's job does not wait for them."""
        for space_id, job in self._jobs.items():
            if job is not None:
                with self._conn.begin():
                    jobs.seal_if_enqueueing(self._conn, job.id)
                end_or_leave(self._conn, job.id, VectorTable(space_id))

    @property
    def locked(self) -> tuple[int, ...]:
        """The jobs whose producer's lock the connection holds."""
        return tuple(self._locked)

    def _job(self, lives: Lives, space_id: int) -> OpenedJob | None:
        if space_id in self._written:
            return self._written[space_id]
        other = lives.others.get(space_id)
        job = open_beside(
            self._conn,
            self._settings,
            collection=self._collection,
            space_id=space_id,
            on_long=None if other is None else other.on_long,
            priority=self._priority,
            reembedding_id=None if other is None else other.reembedding_id,
        )
        if job is not None:
            spends.add_beside(self._conn, job.id, beside=self._job_id)
            # As with the producer's own job: while the lock is held, the producer lives.
            jobs.hold_producer_lock(self._conn, job.id)
            self._locked.append(job.id)
        self._written[space_id] = job
        return job
