"""What a job's producer handed in: how it met the collection, and a digest to compare the next stream of its key with.

On the schema of the last release there is no table for it. Then nothing is kept, and nothing compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from chunkmill.domain.planning import Merged

_ADD = sa.text("""
INSERT INTO job_streams (job_id, n_new, n_replaced, n_unchanged, n_repeated)
VALUES (:job_id, :new, :replaced, :unchanged, :repeated)
ON CONFLICT (job_id) DO UPDATE
SET n_new = job_streams.n_new + excluded.n_new,
    n_replaced = job_streams.n_replaced + excluded.n_replaced,
    n_unchanged = job_streams.n_unchanged + excluded.n_unchanged,
    n_repeated = job_streams.n_repeated + excluded.n_repeated
""")
_SEAL = sa.text("""
INSERT INTO job_streams (job_id, digest)
VALUES (:job_id, :digest)
ON CONFLICT (job_id) DO UPDATE SET digest = excluded.digest
""")
_COUNTS = sa.text("""
SELECT job_id, n_new, n_replaced, n_unchanged, n_repeated
FROM job_streams
WHERE job_id = ANY(:ids)
""")


def is_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('job_streams') IS NOT NULL")).scalar_one())


def add(conn: sa.Connection, job_id: int, merged: Merged) -> None:
    """Count the chunks of a window."""
    parameters = {
        "job_id": job_id,
        "new": merged.new,
        "replaced": merged.replaced,
        "unchanged": merged.unchanged,
        "repeated": merged.repeated,
    }
    conn.execute(_ADD, parameters)


def seal(conn: sa.Connection, job_id: int, digest: bytes | None) -> None:
    """Keep the digest of the stream that has ended; None without a key, by which nobody would compare it."""
    conn.execute(_SEAL, {"job_id": job_id, "digest": digest})


def forget(conn: sa.Connection, job_id: int) -> None:
    """Forget the stream of a producer that died, because the next one begins anew."""
    if is_kept(conn):
        conn.execute(sa.text("DELETE FROM job_streams WHERE job_id = :id"), {"id": job_id})


def digest_of(conn: sa.Connection, job_id: int) -> bytes | None:
    """The digest of the stream that sealed the job; None if it is not known."""
    if not is_kept(conn):
        return None
    query = "SELECT digest FROM job_streams WHERE job_id = :id"
    digest: bytes | None = conn.execute(sa.text(query), {"id": job_id}).scalar_one_or_none()
    return digest


def counts_of(conn: sa.Connection, job_ids: Sequence[int]) -> Mapping[int, Merged]:
    """How the chunks of these jobs met their collections; without the jobs for which that is not known.

    On the schema of the last release there is no table to ask.
    """
    rows = conn.execute(_COUNTS, {"ids": list(job_ids)})
    return {row.job_id: Merged(row.n_new, row.n_replaced, row.n_unchanged, row.n_repeated) for row in rows}
