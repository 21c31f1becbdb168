"""What follows when a collection is dropped: its jobs are cancelled, and its chunks are deleted slice by slice.

From the commit of ``chunkmill.spaces.names.drop`` on nobody finds the collection, and an enqueue of its name makes a
new one. What is here may be interrupted at any point and done by several processes at once: each step looks for what is
left. The client that dropped the collection does it, and a poller goes on if that client dies.

Jobs and what they cost are history, and stay until they are pruned. The row of the collection stays as long as they do.
What is at a provider is followed to its end by the jobs' ProviderBatches, as after any cancel, and is booked.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from chunkmill.db.locks import FLUSH_LOCK, LIVES_LOCK, MERGE_LOCK, lock_of
from chunkmill.domain.reembedding import ReembeddingState
from chunkmill.domain.serving import BuilderKind, SegmentState
from chunkmill.domain.states import JobState
from chunkmill.ledger.jobs import cancel
from chunkmill.spaces import others
from chunkmill.store import keywords, segments

SLICE = 1_000
"""How many chunks one transaction deletes. It keeps enqueues and writes waiting: 40 ms at 384 dimensions."""
ROWS = 5_000
"""How many rows of dead lists, or keys of jobs, one transaction deletes."""

_OPEN = {"enqueueing": JobState.ENQUEUEING, "running": JobState.RUNNING}


def left_behind(conn: sa.Connection, limit: int | None = None) -> list[int]:
    """The ids of dropped collections of which something can be deleted now: all, or the first ``limit``."""
    of_spaces = ""
    if others.are_kept(conn):
        of_spaces = """
              OR EXISTS (SELECT FROM collection_spaces o WHERE o.collection_id = k.id)
              OR EXISTS (SELECT FROM reembeddings e WHERE e.collection_id = k.id AND e.finished_at IS NULL)
        """
    of_keywords = ""
    if keywords.are_kept(conn):
        of_keywords = """
              OR EXISTS (SELECT FROM keyword_indexes w WHERE w.collection_id = k.id)
              OR EXISTS (SELECT FROM golden_queries g WHERE g.collection_id = k.id)
        """
    query = f"""
        SELECT k.id
        FROM collections k
        WHERE k.dropped_at IS NOT NULL
          AND (
              EXISTS (SELECT FROM chunks c WHERE c.collection_id = k.id)
              OR EXISTS (
                  SELECT FROM jobs j
                  WHERE j.collection_id = k.id
                    AND (j.state IN (:enqueueing, :running) OR j.idempotency_key IS NOT NULL
                         OR EXISTS (SELECT FROM dead_chunks d WHERE d.job_id = j.id)))
              OR EXISTS (SELECT FROM serving_indexes i WHERE i.collection_id = k.id)
              {of_keywords}
              {of_spaces}
              OR EXISTS (
                  SELECT FROM segments g
                  WHERE g.collection_id = k.id
                    AND (g.state <> :retired OR g.retired_at < now() - make_interval(secs => :grace)))
              OR NOT EXISTS (SELECT FROM jobs j WHERE j.collection_id = k.id)
                 AND NOT EXISTS (SELECT FROM segments g WHERE g.collection_id = k.id))
        ORDER BY k.id
        LIMIT :limit
    """
    parameters = {**_OPEN, "retired": SegmentState.RETIRED, "grace": float(segments.GRACE_S), "limit": limit}
    return list(conn.execute(sa.text(query), parameters).scalars())


def go_on(
    db: sa.Engine, collection_id: int, *, slices: int | None = None, on_progress: Callable[[int], None] | None = None
) -> tuple[int, bool]:
    """Delete what is left of a dropped collection. Returns how many chunks this call deleted, and whether none is left.

    With ``slices`` it stops after that number of slices. ``on_progress`` is called after each slice with the number of
    chunks deleted so far.
    """
    _cancel_jobs(db, collection_id)
    with db.begin() as conn:
        _leave_other_spaces(conn, collection_id)
    with db.begin() as conn:
        conn.execute(sa.text("SELECT free_dropped_name(:id)"), {"id": collection_id})
    deleted, beyond, is_clear = 0, "", False
    while slices is None or slices > 0:
        with db.begin() as conn:
            call = "SELECT cleared, last FROM clear_dropped_collection(:id, :beyond, :most)"
            row = conn.execute(sa.text(call), {"id": collection_id, "beyond": beyond, "most": SLICE}).one()
        if row.cleared < 0:
            return deleted, False  # Code of the last release opened a job again. The poller will delete the rest.
        if row.cleared == 0:
            is_clear = True
            break
        deleted, beyond = deleted + row.cleared, row.last
        slices = None if slices is None else slices - 1
        if on_progress:
            on_progress(deleted)
    while _delete_dead(db, collection_id) or _free_keys(db, collection_id):
        pass
    _drop_segments(db, collection_id)
    with db.begin() as conn:
        keywords.forget_dropped(conn, collection_id)
    with db.begin() as conn:
        conn.execute(sa.text("SELECT forget_dropped_collection(:id)"), {"id": collection_id})
    return deleted, is_clear


def _cancel_jobs(db: sa.Engine, collection_id: int) -> None:
    """Cancel the open jobs. A producer sees it in its next window, and writes no more."""
    query = """
        SELECT id FROM jobs WHERE collection_id = :id AND state IN (:enqueueing, :running) ORDER BY id
    """
    with db.begin() as conn:
        job_ids = conn.execute(sa.text(query), {"id": collection_id, **_OPEN}).scalars().all()
    for job_id in job_ids:
        with db.begin() as conn:
            cancel.cancel_if_open(conn, job_id)
        while True:
            with db.begin() as conn:
                if not cancel.cancel_some(conn, job_id):
                    break


def _leave_other_spaces(conn: sa.Connection, collection_id: int) -> None:
    """End the re-embedding of a dropped collection. Its vectors are deleted with its chunks, from every space."""
    if not others.are_kept(conn):
        return
    # The collection's row is not locked, because a poller has no right to lock it. That does no harm: the windows of a
    # dropped collection are of no use.
    lock_of(conn, LIVES_LOCK, collection_id)
    update = """
        UPDATE reembeddings
        SET state = :cancelled, state_since = now(), finished_at = now()
        WHERE collection_id = :id AND finished_at IS NULL
    """
    conn.execute(sa.text(update), {"id": collection_id, "cancelled": ReembeddingState.CANCELLED})
    conn.execute(sa.text("DELETE FROM collection_spaces WHERE collection_id = :id"), {"id": collection_id})


def _delete_dead(db: sa.Engine, collection_id: int) -> int:
    delete = """
        DELETE FROM dead_chunks
        WHERE id IN (
            SELECT d.id
            FROM jobs j
            JOIN dead_chunks d ON d.job_id = j.id
            WHERE j.collection_id = :id
            LIMIT :most)
    """
    with db.begin() as conn:
        return conn.execute(sa.text(delete), {"id": collection_id, "most": ROWS}).rowcount


def _free_keys(db: sa.Engine, collection_id: int) -> int:
    """Take the idempotency keys from the jobs, so that the chunks may be enqueued again under the same keys."""
    update = """
        UPDATE jobs
        SET idempotency_key = NULL
        WHERE id IN (
            SELECT id FROM jobs WHERE collection_id = :id AND idempotency_key IS NOT NULL ORDER BY id LIMIT :most)
    """
    with db.begin() as conn:
        return conn.execute(sa.text(update), {"id": collection_id, "most": ROWS}).rowcount


def _drop_segments(db: sa.Engine, collection_id: int) -> None:
    """Forget the serving indexes, and drop the segments that no search can be reading any more."""
    indexes = """
        SELECT space_id FROM serving_indexes WHERE collection_id = :id
        UNION
        SELECT space_id FROM segments WHERE collection_id = :id AND state = :live
    """
    with db.begin() as conn:
        space_ids = conn.execute(sa.text(indexes), {"id": collection_id, "live": SegmentState.LIVE}).scalars().all()
        for space_id in space_ids:
            segments.forget(conn, collection_id, space_id)
    for key, builder in ((FLUSH_LOCK, BuilderKind.FLUSH), (MERGE_LOCK, BuilderKind.MERGE)):
        with db.begin() as conn:
            take = "SELECT pg_try_advisory_xact_lock(:key, :id)"
            if conn.execute(sa.text(take), {"key": key, "id": collection_id}).scalar_one():
                segments.drop_unread(conn, collection_id, builder)
