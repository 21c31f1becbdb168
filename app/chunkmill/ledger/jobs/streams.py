"""What a job's producer handed in: how it met the collection, and a digest to compare the next stream of its key with.

The schema of the last release has no table for this: there nothing is kept, and nothing compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.domain.planning import MergeCounts
from chunkmill.errors import StoreUnavailable

DIGEST_BYTES = 32

_ADD = sa.text("""
INSERT INTO job_streams (job_id, n_new, n_replaced, n_unchanged, n_repeated, n_refused)
VALUES (:job_id, :new, :replaced, :unchanged, :repeated, :refused)
ON CONFLICT (job_id) DO UPDATE
SET n_new = job_streams.n_new + excluded.n_new,
    n_replaced = job_streams.n_replaced + excluded.n_replaced,
    n_unchanged = job_streams.n_unchanged + excluded.n_unchanged,
    n_repeated = job_streams.n_repeated + excluded.n_repeated,
    n_refused = job_streams.n_refused + excluded.n_refused
""")
_ADD_WITHOUT_REFUSED = sa.text("""
INSERT INTO job_streams (job_id, n_new, n_replaced, n_unchanged, n_repeated)
VALUES (:job_id, :new, :replaced, :unchanged, :repeated)
ON CONFLICT (job_id) DO UPDATE
SET n_new = job_streams.n_new + excluded.n_new,
    n_replaced = job_streams.n_replaced + excluded.n_replaced,
    n_unchanged = job_streams.n_unchanged + excluded.n_unchanged,
    n_repeated = job_streams.n_repeated + excluded.n_repeated
""")
# While a replacing job still has chunks to delete, its fence and the number of this transaction are appended to the
# digest. Code that does not know this sees a digest that differs, and refuses to go on.
_SEAL = sa.text("""
INSERT INTO job_streams (job_id, digest)
VALUES (
    :job_id,
    CAST(:digest AS bytea) || coalesce(
        int8send(CAST(:fence AS bigint)) || int8send(CAST(CAST(pg_current_xact_id() AS text) AS bigint)), ''
    )
)
ON CONFLICT (job_id) DO UPDATE SET digest = excluded.digest
""")
_ADD_DELETED = sa.text("""
INSERT INTO job_streams (job_id, n_deleted)
VALUES (:job_id, :deleted)
ON CONFLICT (job_id) DO UPDATE
SET n_deleted = coalesce(job_streams.n_deleted, 0) + excluded.n_deleted,
    digest = substr(job_streams.digest, 1, :digest_bytes)
""")
# In a restored database another transaction has written the row, and the fence means nothing.
_DELETIONS = sa.text("""
SELECT n_deleted IS NOT NULL AS are_done,
       substr(digest, :digest_bytes + 1) AS behind,
       CAST(CAST(xmin AS text) AS bigint) AS written_by
FROM job_streams
WHERE job_id = :id
""")
_NAMED_SINCE = sa.text("""
SELECT EXISTS (
    SELECT FROM jobs o
    JOIN jobs mine ON mine.id = :id AND mine.collection_id = o.collection_id AND mine.id <> o.id
    LEFT JOIN job_streams s ON s.job_id = o.id
    WHERE coalesce(o.sealed_at, o.finished_at, 'infinity') >= mine.sealed_at
      AND coalesce(s.n_unchanged, o.n_chunks) > 0
)
""")
# Migration 0028 added two of the counts, so they are read in this way.
_COUNTS = sa.text("""
SELECT s.job_id, s.n_new, s.n_replaced, s.n_unchanged, s.n_repeated,
       coalesce(CAST(to_jsonb(s) ->> 'n_refused' AS bigint), 0) AS n_refused,
       CAST(to_jsonb(s) ->> 'n_deleted' AS bigint) AS n_deleted
FROM job_streams s
WHERE s.job_id = ANY(:ids)
""")
_KEPT = sa.text("""
SELECT to_regclass('job_streams') IS NOT NULL AS counts,
       EXISTS (
           SELECT FROM pg_attribute
           WHERE attrelid = to_regclass('job_streams') AND attname = 'n_refused' AND NOT attisdropped
       ) AS refused
""")


@dataclass(frozen=True, slots=True)
class StreamColumns:
    """What the schema can keep of a stream."""

    counts: bool
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    refused: bool
    """Also how many chunks were refused, and how many were deleted."""


def kept(conn: sa.Connection) -> StreamColumns:
    """What the schema of this database can keep."""
    row = conn.execute(_KEPT).one()
    return StreamColumns(row.counts, row.refused)


def is_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('job_streams') IS NOT NULL")).scalar_one())


def require_deletions(conn: sa.Connection) -> None:
    """Raise :class:`StoreUnavailable` if the schema cannot keep how many chunks an enqueue deleted."""
    if not kept(conn).refused:
        raise StoreUnavailable(
            "the database cannot keep a collection in step with its source yet. Run: chunkmill migrate"
        )


def add(conn: sa.Connection, job_id: int, merged: MergeCounts, kept: StreamColumns) -> None:
    """Count the chunks of a window, as far as the schema can keep it."""
    if not kept.counts:
        return
    parameters = {
        "job_id": job_id,
        "new": merged.new,
        "replaced": merged.replaced,
        "unchanged": merged.unchanged,
        "repeated": merged.repeated,
    }
    if kept.refused:
        conn.execute(_ADD, parameters | {"refused": merged.refused})
    else:
        conn.execute(_ADD_WITHOUT_REFUSED, parameters)


def add_deleted(conn: sa.Connection, job_id: int, n: int) -> None:
    """Note that all was deleted that the source does not have, and how many chunks that were."""
    conn.execute(_ADD_DELETED, {"job_id": job_id, "deleted": n, "digest_bytes": DIGEST_BYTES})


def seal(conn: sa.Connection, job_id: int, digest: bytes | None, fence: int | None = None) -> None:
    """Keep the digest of the stream that has ended; None without a key, by which nobody would compare it. With it comes
    the fence of what the job is going to delete (:mod:`chunkmill.store.replacing`).
    """
    conn.execute(_SEAL, {"job_id": job_id, "digest": digest, "fence": fence})


@dataclass(frozen=True, slots=True)
class Deletions:
    """How far the deletions of a sealed job are. Without a ``fence`` it is not known any more which chunks were there
    before the job.
    """

    are_done: bool
    fence: int | None


def deletions_of(conn: sa.Connection, job_id: int) -> Deletions:
    """How far a job has come with deleting what its source does not have."""
    row = conn.execute(_DELETIONS, {"id": job_id, "digest_bytes": DIGEST_BYTES}).one_or_none()
    if row is None or row.are_done or not row.behind:
        return Deletions(row is not None and row.are_done, None)
    fence, sealed_by = (int.from_bytes(row.behind[n : n + 8]) for n in (0, 8))
    return Deletions(False, fence if sealed_by % 2**32 == row.written_by else None)


def were_named_since(conn: sa.Connection, job_id: int) -> bool:
    """Whether another job may have found chunks of the collection unchanged since this job was sealed. Nothing in the
    chunks tells that, because then nobody watched the collection.
    """
    return bool(conn.execute(_NAMED_SINCE, {"id": job_id}).scalar_one())


def forget(conn: sa.Connection, job_id: int) -> None:
    """Forget the stream of a producer that died, because the next one begins anew."""
    if is_kept(conn):
        conn.execute(sa.text("DELETE FROM job_streams WHERE job_id = :id"), {"id": job_id})


def digest_of(conn: sa.Connection, job_id: int) -> bytes | None:
    """The digest of the stream that sealed the job; None if it is not known."""
    if not is_kept(conn):
        return None
    query = "SELECT substr(digest, 1, :digest_bytes) FROM job_streams WHERE job_id = :id"
    parameters = {"id": job_id, "digest_bytes": DIGEST_BYTES}
    digest: bytes | None = conn.execute(sa.text(query), parameters).scalar_one_or_none()
    return digest


def counts_of(conn: sa.Connection, job_ids: Sequence[int]) -> Mapping[int, MergeCounts]:
    """How the chunks of these jobs met their collections; without the jobs for which that is not known.

    On the schema of the last release there is no table to ask.
    """
    rows = conn.execute(_COUNTS, {"ids": list(job_ids)})
    return {
        row.job_id: MergeCounts(
            row.n_new, row.n_replaced, row.n_unchanged, row.n_repeated, row.n_refused, row.n_deleted
        )
        for row in rows
    }
