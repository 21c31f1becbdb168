"""Contents in flight: at a provider now, or about to be. The table's key lets none of them be there twice.

A row is made before its content leaves the house and removed in the transaction that writes its vector, books its
charge, or gives up on it. So what is left after a crash is exactly what may have been sent and is not accounted for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from chunkmill.db.connect import raw
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.inputs import ProviderInput
from chunkmill.openai.plan.packing import PackedInput


class InFlight(NamedTuple):
    """One content in flight, for the attempt at a ChunkBatch that brought it."""

    packed: PackedInput
    chunk_batch_id: int
    attempt: int
    job_id: int

    @property
    def content_hash(self) -> bytes:
        return self.packed.content_hash


_COLUMNS = (
    "content_hash, chunk_batch_id, attempt, job_id, request_no, position, n_tokens, sent_tokens, truncated, weights"
)
_TYPES = ("bytea", "int8", "int4", "int8", "int4", "int4", "int4", "int4", "bool", "int4[]")


def add(conn: sa.Connection, *, space_id: int, provider_batch_id: int, inputs: Iterable[InFlight]) -> None:
    """Put contents in flight in a ProviderBatch. Raises psycopg's UniqueViolation where one is in flight already."""
    target = f"COPY provider_inputs (space_id, provider_batch_id, {_COLUMNS}) FROM STDIN (FORMAT BINARY)"
    with raw(conn).cursor() as cursor, cursor.copy(target) as copy:
        copy.set_types(["int4", "int8", *_TYPES])
        for each in inputs:
            row = each.packed
            copy.write_row(
                (
                    space_id,
                    provider_batch_id,
                    row.content_hash,
                    each.chunk_batch_id,
                    each.attempt,
                    each.job_id,
                    row.request_no,
                    row.position,
                    row.n_tokens,
                    row.sent_tokens,
                    row.truncated,
                    list(row.weights) or None,
                )
            )


def add_own(conn: sa.Connection, lease: Lease, inputs: Sequence[ProviderInput]) -> set[bytes]:
    """Put contents in flight in plain requests of one attempt; returns those that nobody else has in flight.

    What an attempt left behind that is over, because its worker was killed, is taken over: its answer is lost.
    """
    if not inputs:
        return set()
    rows = conn.execute(
        sa.text(
            "INSERT INTO provider_inputs AS i (space_id, content_hash, chunk_batch_id, attempt, job_id, n_tokens, "
            "sent_tokens, truncated) SELECT :space, h.content_hash, :id, :attempt, :job, h.n, h.sent, h.truncated "
            "FROM unnest(CAST(:hashes AS bytea[]), CAST(:tokens AS int[]), CAST(:sent AS int[]), "
            "     CAST(:cut AS bool[])) AS h(content_hash, n, sent, truncated) ORDER BY h.content_hash "
            "ON CONFLICT (space_id, content_hash) DO UPDATE SET chunk_batch_id = excluded.chunk_batch_id, "
            "attempt = excluded.attempt, job_id = excluded.job_id WHERE i.provider_batch_id IS NULL "
            "AND NOT EXISTS (SELECT FROM chunk_batches b WHERE b.id = i.chunk_batch_id AND b.attempt = i.attempt "
            "                AND b.state = 'running' AND (b.id, b.attempt) <> (:id, :attempt)) "
            "RETURNING i.content_hash"
        ),
        {
            "space": lease.space_id,
            "id": lease.chunk_batch_id,
            "attempt": lease.attempt,
            "job": lease.job_id,
            "hashes": [each.content_hash for each in inputs],
            "tokens": [each.n_tokens for each in inputs],
            "sent": [each.sent_tokens for each in inputs],
            "cut": [each.truncated for each in inputs],
        },
    )
    return set(rows.scalars())


def drop_left_behind(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> None:
    """What plain requests left in flight whose attempt is over, because its worker was killed: the answer is lost."""
    conn.execute(
        sa.text(
            "DELETE FROM provider_inputs i WHERE space_id = :space AND content_hash = ANY(:hashes) "
            "AND provider_batch_id IS NULL AND NOT EXISTS (SELECT FROM chunk_batches b "
            "WHERE b.id = i.chunk_batch_id AND b.attempt = i.attempt AND b.state = 'running')"
        ),
        {"space": space_id, "hashes": list(hashes)},
    )


def carriers(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> dict[bytes, int | None]:
    """``content_hash → id`` of the ProviderBatch that has it in flight, None for a plain request; others left out."""
    rows = conn.execute(
        sa.text(
            "SELECT content_hash, provider_batch_id FROM provider_inputs "
            "WHERE space_id = :space AND content_hash = ANY(:hashes)"
        ),
        {"space": space_id, "hashes": list(hashes)},
    )
    return {row.content_hash: row.provider_batch_id for row in rows}


def of_requests(conn: sa.Connection, provider_batch_id: int, request_nos: Sequence[int]) -> dict[int, list[InFlight]]:
    """What is in flight in each of these requests, in the order of its inputs; a request with nothing is left out."""
    rows = conn.execute(
        sa.text(
            f"SELECT {_COLUMNS} FROM provider_inputs WHERE provider_batch_id = :id "
            "AND request_no = ANY(:requests) ORDER BY request_no, position"
        ),
        {"id": provider_batch_id, "requests": list(request_nos)},
    )
    found: dict[int, list[InFlight]] = defaultdict(list)
    for row in rows:
        found[row.request_no].append(_in_flight(row))
    return dict(found)


def slice_of(conn: sa.Connection, provider_batch_id: int, *, after: int, limit: int) -> list[InFlight]:
    """The next contents in flight, of whole requests after request ``after``: ``limit`` requests at most."""
    rows = conn.execute(
        sa.text(
            f"SELECT {_COLUMNS} FROM provider_inputs WHERE provider_batch_id = :id "
            "AND request_no > :after AND request_no <= :after + :limit ORDER BY request_no, position"
        ),
        {"id": provider_batch_id, "after": after, "limit": limit},
    )
    return [_in_flight(row) for row in rows]


def widths(conn: sa.Connection, provider_batch_id: int) -> dict[int, int]:
    """``request_no → inputs`` of the requests that have something in flight: windows, as they were sent."""
    rows = conn.execute(
        sa.text(
            "SELECT request_no, sum(coalesce(cardinality(weights), 1)) AS n FROM provider_inputs "
            "WHERE provider_batch_id = :id GROUP BY request_no"
        ),
        {"id": provider_batch_id},
    )
    return {row.request_no: int(row.n) for row in rows}


def remove(conn: sa.Connection, *, space_id: int, hashes: Sequence[bytes], provider_batch_id: int | None) -> int:
    """They are accounted for; returns how many were in flight there."""
    if not hashes:
        return 0
    result = conn.execute(
        sa.text(
            "DELETE FROM provider_inputs WHERE space_id = :space AND content_hash = ANY(:hashes) "
            "AND provider_batch_id IS NOT DISTINCT FROM :id"
        ),
        {"space": space_id, "hashes": list(hashes), "id": provider_batch_id},
    )
    return int(result.rowcount)


def remove_all(conn: sa.Connection, provider_batch_id: int) -> list[InFlight]:
    """Nothing of a ProviderBatch is in flight any more; returns what was."""
    rows = conn.execute(
        sa.text(f"DELETE FROM provider_inputs WHERE provider_batch_id = :id RETURNING {_COLUMNS}"),
        {"id": provider_batch_id},
    )
    return [_in_flight(row) for row in rows]


def texts(conn: sa.Connection, hashes: Sequence[bytes]) -> dict[bytes, str]:
    """``content_hash → text``; deleted contents are left out."""
    rows = conn.execute(
        sa.text("SELECT content_hash, text FROM contents WHERE content_hash = ANY(:hashes)"), {"hashes": list(hashes)}
    )
    return {row.content_hash: row.text for row in rows}


def remove_own(conn: sa.Connection, lease: Lease) -> None:
    """What an attempt with plain requests has in flight and did not send, or got no answer for."""
    conn.execute(
        sa.text(
            "DELETE FROM provider_inputs WHERE chunk_batch_id = :id AND attempt <= :attempt "
            "AND provider_batch_id IS NULL"
        ),
        {"id": lease.chunk_batch_id, "attempt": lease.attempt},
    )


def remove_deleted(conn: sa.Connection, provider_batch_id: int) -> int:
    """Contents that were deleted before they were sent; those after them in their requests move up."""
    result = conn.execute(
        sa.text(
            "DELETE FROM provider_inputs i WHERE provider_batch_id = :id "
            "AND NOT EXISTS (SELECT FROM contents c WHERE c.content_hash = i.content_hash)"
        ),
        {"id": provider_batch_id},
    )
    if result.rowcount:
        _move_up(conn, provider_batch_id)
    return int(result.rowcount)


def count(conn: sa.Connection, provider_batch_id: int) -> int:
    query = sa.text("SELECT count(*) FROM provider_inputs WHERE provider_batch_id = :id")
    return int(conn.execute(query, {"id": provider_batch_id}).scalar_one())


def move_half(conn: sa.Connection, provider_batch_id: int, to: int) -> None:
    """Move the latter half of its contents to another ProviderBatch."""
    conn.execute(
        sa.text(
            "UPDATE provider_inputs i SET provider_batch_id = :to, request_no = n.request_no FROM ("
            "  SELECT space_id, content_hash, request_no - min(request_no) OVER () AS request_no FROM ("
            "    SELECT space_id, content_hash, request_no, "
            "    row_number() OVER (ORDER BY request_no, position) AS at, count(*) OVER () AS n "
            "    FROM provider_inputs WHERE provider_batch_id = :id) o WHERE 2 * at > n + 1) n "
            "WHERE (i.space_id, i.content_hash) = (n.space_id, n.content_hash)"
        ),
        {"id": provider_batch_id, "to": to},
    )
    _move_up(conn, to)


def _move_up(conn: sa.Connection, provider_batch_id: int) -> None:
    """Close the gaps in its requests."""
    conn.execute(
        sa.text(
            "UPDATE provider_inputs i SET position = n.position FROM (SELECT space_id, content_hash, "
            "  sum(coalesce(cardinality(weights), 1)) OVER (PARTITION BY request_no ORDER BY position) "
            "  - coalesce(cardinality(weights), 1) AS position "
            "  FROM provider_inputs WHERE provider_batch_id = :id) n "
            "WHERE (i.space_id, i.content_hash) = (n.space_id, n.content_hash) AND i.position <> n.position"
        ),
        {"id": provider_batch_id},
    )


def suspects(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> set[bytes]:
    """Which of these go in a request of their own."""
    rows = conn.execute(
        sa.text("SELECT content_hash FROM provider_suspects WHERE space_id = :space AND content_hash = ANY(:hashes)"),
        {"space": space_id, "hashes": list(hashes)},
    )
    return set(rows.scalars())


def add_suspects(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO provider_suspects (space_id, content_hash) "
            "SELECT :space, unnest(CAST(:hashes AS bytea[])) ON CONFLICT DO NOTHING"
        ),
        {"space": space_id, "hashes": list(hashes)},
    )


def drop_suspects(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> None:
    if hashes:
        conn.execute(
            sa.text("DELETE FROM provider_suspects WHERE space_id = :space AND content_hash = ANY(:hashes)"),
            {"space": space_id, "hashes": list(hashes)},
        )


def _in_flight(row: sa.Row[Any]) -> InFlight:
    weights = tuple(row.weights or ())
    packed = PackedInput(
        row.content_hash,
        row.request_no,
        row.position,
        len(weights) or 1,
        row.n_tokens,
        row.sent_tokens,
        row.truncated,
        weights,
    )
    return InFlight(packed, row.chunk_batch_id, row.attempt, row.job_id)
