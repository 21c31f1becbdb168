"""How searches went in each space of a collection, and what was said about their hits. There are no texts here.

A row counts the searches of a minute in one bucket of the latency histogram, so that any number of processes add to it.
The rows of a minute become those of an hour later. No row refers to a collection or a space by a foreign key, because
that would lock the row of a collection that is about to flip. A poller deletes rows whose collection is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from chunkmill.domain.latencies import quantile

FAILED = -1
"""The bucket of searches that no worker could answer."""
FINE_S = 2 * 3600
"""How many seconds the counts of minutes are kept. Then those of an hour are."""
KEPT_DAYS = 90


class Key(NamedTuple):
    """What is counted together."""

    collection_id: int
    space_id: int
    at: int
    """The beginning of the minute, as Unix time in seconds."""
    bucket: int


@dataclass(frozen=True, slots=True)
class CountedSearches:
    """The searches of a space since some moment."""

    space_id: int
    latencies: Mapping[int, int] = field(default_factory=dict)
    """Bucket → searches that were answered."""
    errors: int = 0
    feedback: int = 0

    @property
    def answered(self) -> int:
        return sum(self.latencies.values())

    @property
    def searches(self) -> int:
        return self.answered + self.errors

    def milliseconds(self, share: float) -> float | None:
        """The latency that this share of the answered searches is not slower than; None if there are none."""
        return quantile(self.latencies, share)


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    query = "SELECT to_regclass(quote_ident(current_schema()) || '.search_counts') IS NOT NULL"
    return bool(conn.execute(sa.text(query)).scalar_one())


def add(conn: sa.Connection, counts: Mapping[Key, int]) -> None:
    """Add to the counts. On the schema of an earlier release they are dropped."""
    if not are_kept(conn):
        return
    # Sorted, so that two processes take the rows in the same order and neither waits for the other for ever.
    keys = sorted(counts)
    insert = """
        INSERT INTO search_counts (collection_id, space_id, since, bucket, n)
        SELECT collection_id, space_id, to_timestamp(since), bucket, n
        FROM unnest(
            CAST(:collections AS integer[]), CAST(:spaces AS integer[]), CAST(:moments AS float8[]),
            CAST(:buckets AS smallint[]), CAST(:numbers AS bigint[])
        ) WITH ORDINALITY AS c (collection_id, space_id, since, bucket, n, place)
        ORDER BY place
        ON CONFLICT (collection_id, space_id, since, bucket) DO UPDATE SET n = search_counts.n + excluded.n
    """
    parameters = {
        "collections": [key.collection_id for key in keys],
        "spaces": [key.space_id for key in keys],
        "moments": [float(key.at) for key in keys],
        "buckets": [key.bucket for key in keys],
        "numbers": [counts[key] for key in keys],
    }
    conn.execute(sa.text(insert), parameters)


def read(conn: sa.Connection, collection_id: int, *, since: datetime) -> dict[int, CountedSearches]:
    """``space id → searches`` of a collection since the minute of ``since``. Processes write every few seconds.

    Counts that are older than two hours exist for whole hours only.
    """
    if not are_kept(conn):
        return {}
    counts = """
        SELECT space_id, bucket, sum(n)::bigint AS n
        FROM search_counts
        WHERE collection_id = :collection AND since >= date_trunc('minute', CAST(:since AS timestamptz))
        GROUP BY space_id, bucket
    """
    clicks = """
        SELECT space_id, count(*) AS n
        FROM search_feedback
        WHERE collection_id = :collection AND created_at >= :since
        GROUP BY space_id
    """
    parameters = {"collection": collection_id, "since": since}
    latencies: dict[int, dict[int, int]] = {}
    errors: dict[int, int] = {}
    for row in conn.execute(sa.text(counts), parameters):
        if row.bucket == FAILED:
            errors[row.space_id] = row.n
        else:
            latencies.setdefault(row.space_id, {})[row.bucket] = row.n
    feedback = {row.space_id: row.n for row in conn.execute(sa.text(clicks), parameters)}
    return {
        space_id: CountedSearches(
            space_id, latencies.get(space_id, {}), errors.get(space_id, 0), feedback.get(space_id, 0)
        )
        for space_id in sorted(latencies.keys() | errors.keys() | feedback.keys())
    }


def add_feedback(
    conn: sa.Connection, *, collection_id: int, space_id: int, number: bytes, chunk_id: str
) -> bool | None:
    """Note that a hit of a search was what somebody wanted. Returns False if the same was noted before; None if the
    collection does not have the chunk any more."""
    insert = """
        WITH meant AS (
            SELECT FROM chunks WHERE collection_id = :collection AND chunk_id = :chunk
        ),
        noted AS (
            INSERT INTO search_feedback (search_number, chunk_id, collection_id, space_id)
            SELECT :number, :chunk, :collection, :space FROM meant
            ON CONFLICT DO NOTHING
            RETURNING 1
        )
        SELECT EXISTS (SELECT FROM meant) AS is_there, EXISTS (SELECT FROM noted) AS is_new
    """
    parameters = {"collection": collection_id, "space": space_id, "number": number, "chunk": chunk_id}
    row = conn.execute(sa.text(insert), parameters).one()
    return bool(row.is_new) if row.is_there else None


def tidy(conn: sa.Connection) -> None:
    """Sum the counts of old minutes by the hour, and delete counts that are too old or whose collection is gone."""
    if not are_kept(conn):
        return
    hours = """
        WITH fine AS (
            DELETE FROM search_counts
            WHERE since < now() - make_interval(secs => :fine) AND since <> date_trunc('hour', since, 'UTC')
            RETURNING *
        )
        INSERT INTO search_counts (collection_id, space_id, since, bucket, n)
        SELECT collection_id, space_id, date_trunc('hour', since, 'UTC') AS hour, bucket, sum(n)
        FROM fine
        GROUP BY collection_id, space_id, hour, bucket
        ORDER BY collection_id, space_id, hour, bucket
        ON CONFLICT (collection_id, space_id, since, bucket) DO UPDATE SET n = search_counts.n + excluded.n
    """
    conn.execute(sa.text(hours), {"fine": float(FINE_S)})
    counts = """
        DELETE FROM search_counts t
        WHERE t.since < now() - make_interval(days => :days)
           OR NOT EXISTS (
               SELECT FROM collections k
               WHERE k.id = t.collection_id AND to_jsonb(k) ->> 'dropped_at' IS NULL)
    """
    feedback = """
        DELETE FROM search_feedback t
        WHERE t.created_at < now() - make_interval(days => :days)
           OR NOT EXISTS (
               SELECT FROM collections k
               WHERE k.id = t.collection_id AND to_jsonb(k) ->> 'dropped_at' IS NULL)
    """
    for old in (counts, feedback):
        conn.execute(sa.text(old), {"days": KEPT_DAYS})
