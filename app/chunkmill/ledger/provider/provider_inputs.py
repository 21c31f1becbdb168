"""Contents in flight: at a provider now, or about to be sent. The table's key keeps each from being in flight twice.

A row is added before its content is sent, and removed in the transaction that writes its vector, books its charge, or
gives up on it. So the rows that are left after a crash are exactly the contents that may have been sent and are not
accounted for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from chunkmill.db.copy import copy_in
from chunkmill.domain.states import ChunkBatchState
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.inputs import ProviderInput
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.answers import SentRequest


class InFlight(NamedTuple):
    """One content in flight, for the attempt at a ChunkBatch that brought it."""

    packed: PackedInput
    chunk_batch_id: int
    attempt: int
    job_id: int

    @property
    def content_hash(self) -> bytes:
        return self.packed.content_hash


class UnansweredRequests(NamedTuple):
    """What was in plain requests that were sent and not answered: they may have been charged."""

    job_id: int
    contents: int
    tokens: int


def add(conn: sa.Connection, *, space_id: int, provider_batch_id: int, inputs: Iterable[InFlight]) -> None:
    """Put contents in flight in a ProviderBatch. Raises SQLAlchemy's IntegrityError if one is in flight already."""
    target = """
        provider_inputs (space_id, provider_batch_id, content_hash, chunk_batch_id, attempt, job_id, request_no,
                         position, n_tokens, sent_tokens, truncated, weights)
    """
    types = "int4 int8 bytea int8 int4 int8 int4 int4 int4 int4 bool int4[]"
    with copy_in(conn, target) as copy:
        copy.set_types(types.split())
        for content in inputs:
            row = content.packed
            copy.write_row(
                (
                    space_id,
                    provider_batch_id,
                    row.content_hash,
                    content.chunk_batch_id,
                    content.attempt,
                    content.job_id,
                    row.request_no,
                    row.position,
                    row.n_tokens,
                    row.sent_tokens,
                    row.truncated,
                    list(row.weights) or None,
                )
            )


def add_own(conn: sa.Connection, lease: Lease, inputs: Sequence[ProviderInput]) -> set[bytes]:
    """Put contents in flight in plain requests of one attempt; returns the hashes that no one else has in flight.

    Contents that a killed worker left in flight are taken over, because the answer to its request is lost.
    """
    if not inputs:
        return set()
    rows = conn.execute(
        sa.text("""
            INSERT INTO provider_inputs AS i (
                space_id, content_hash, chunk_batch_id, attempt, job_id, n_tokens, sent_tokens, truncated
            )
            SELECT :space, h.content_hash, :id, :attempt, :job, h.n_tokens, h.sent_tokens, h.truncated
            FROM unnest(
                CAST(:hashes AS bytea[]), CAST(:tokens AS int[]), CAST(:sent AS int[]), CAST(:truncated AS bool[])
            ) AS h(content_hash, n_tokens, sent_tokens, truncated)
            ORDER BY h.content_hash
            ON CONFLICT (space_id, content_hash) DO UPDATE
            SET chunk_batch_id = excluded.chunk_batch_id, attempt = excluded.attempt, job_id = excluded.job_id
            WHERE i.provider_batch_id IS NULL
              AND NOT EXISTS (
                  SELECT FROM chunk_batches b
                  WHERE b.id = i.chunk_batch_id AND b.attempt = i.attempt AND b.state = :running
                    AND (b.id, b.attempt) <> (:id, :attempt)
              )
            RETURNING i.content_hash
        """),
        {
            "space": lease.space_id,
            "id": lease.chunk_batch_id,
            "attempt": lease.attempt,
            "job": lease.job_id,
            "hashes": [item.content_hash for item in inputs],
            "tokens": [item.n_tokens for item in inputs],
            "sent": [item.sent_tokens for item in inputs],
            "truncated": [item.truncated for item in inputs],
            "running": ChunkBatchState.RUNNING,
        },
    )
    return set(rows.scalars())


def drop_left_behind(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> list[UnansweredRequests]:
    """Take contents out of flight that plain requests of a killed worker left there; returns what was sent of them.

    The answers are lost.
    """
    rows = conn.execute(
        sa.text("""
            WITH left_behind AS (
                DELETE FROM provider_inputs i
                WHERE space_id = :space AND content_hash = ANY(:hashes)
                  AND provider_batch_id IS NULL
                  AND NOT EXISTS (
                      SELECT FROM chunk_batches b
                      WHERE b.id = i.chunk_batch_id AND b.attempt = i.attempt AND b.state = :running
                  )
                RETURNING job_id, sent_tokens, request_no
            )
            SELECT job_id, count(*) AS contents, sum(sent_tokens) AS tokens
            FROM left_behind
            WHERE request_no = 1
            GROUP BY job_id
            ORDER BY job_id
        """),
        {"space": space_id, "hashes": list(hashes), "running": ChunkBatchState.RUNNING},
    )
    return [UnansweredRequests(row.job_id, row.contents, int(row.tokens)) for row in rows]


def carriers(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> dict[bytes, int | None]:
    """``content_hash → id`` of the ProviderBatch that has it in flight, or None if a plain request has.

    A content that is not in flight is left out.
    """
    rows = conn.execute(
        sa.text("""
            SELECT content_hash, provider_batch_id
            FROM provider_inputs
            WHERE space_id = :space AND content_hash = ANY(:hashes)
        """),
        {"space": space_id, "hashes": list(hashes)},
    )
    return {row.content_hash: row.provider_batch_id for row in rows}


def of_requests(conn: sa.Connection, provider_batch_id: int, request_nos: Sequence[int]) -> dict[int, list[InFlight]]:
    """``request_no → contents`` in flight, in the order of the request's inputs; an empty request is left out."""
    rows = conn.execute(
        sa.text("""
            SELECT content_hash, chunk_batch_id, attempt, job_id, request_no, position, n_tokens, sent_tokens,
                   truncated, weights
            FROM provider_inputs
            WHERE provider_batch_id = :id AND request_no = ANY(:requests)
            ORDER BY request_no, position
        """),
        {"id": provider_batch_id, "requests": list(request_nos)},
    )
    by_request: dict[int, list[InFlight]] = defaultdict(list)
    for row in rows:
        by_request[row.request_no].append(_in_flight(row))
    return dict(by_request)


def slice_of(conn: sa.Connection, provider_batch_id: int, *, after: int, limit: int) -> list[InFlight]:
    """The contents in flight in the next requests, at most ``limit`` of them, after request ``after``."""
    rows = conn.execute(
        sa.text("""
            SELECT content_hash, chunk_batch_id, attempt, job_id, request_no, position, n_tokens, sent_tokens,
                   truncated, weights
            FROM provider_inputs
            WHERE provider_batch_id = :id AND request_no > :after AND request_no <= :last
            ORDER BY request_no, position
        """),
        # The sum is made here and not in Postgres, because psycopg sends small numbers as smallints, and their sum
        # could overflow.
        {"id": provider_batch_id, "after": after, "last": after + limit},
    )
    return [_in_flight(row) for row in rows]


def sent(conn: sa.Connection, provider_batch_id: int) -> dict[int, SentRequest]:
    """``request_no → what was sent``, of the requests that have something in flight. Each window is one input."""
    rows = conn.execute(
        sa.text("""
            SELECT request_no, sum(coalesce(cardinality(weights), 1)) AS n_inputs, sum(sent_tokens) AS n_tokens
            FROM provider_inputs
            WHERE provider_batch_id = :id
            GROUP BY request_no
        """),
        {"id": provider_batch_id},
    )
    return {row.request_no: SentRequest(int(row.n_inputs), int(row.n_tokens)) for row in rows}


def remove(conn: sa.Connection, *, space_id: int, hashes: Sequence[bytes], provider_batch_id: int | None) -> int:
    """Take contents out of flight that are accounted for; returns how many this carrier had in flight.

    ``provider_batch_id`` is None for plain requests.
    """
    if not hashes:
        return 0
    result = conn.execute(
        sa.text("""
            DELETE FROM provider_inputs
            WHERE space_id = :space AND content_hash = ANY(:hashes)
              AND provider_batch_id IS NOT DISTINCT FROM :id
        """),
        {"space": space_id, "hashes": list(hashes), "id": provider_batch_id},
    )
    return int(result.rowcount)


def remove_all(conn: sa.Connection, provider_batch_id: int) -> list[InFlight]:
    """Take everything of a ProviderBatch out of flight; returns what was in flight."""
    rows = conn.execute(
        sa.text("""
            DELETE FROM provider_inputs
            WHERE provider_batch_id = :id
            RETURNING content_hash, chunk_batch_id, attempt, job_id, request_no, position, n_tokens, sent_tokens,
                      truncated, weights
        """),
        {"id": provider_batch_id},
    )
    return [_in_flight(row) for row in rows]


def texts(conn: sa.Connection, hashes: Sequence[bytes]) -> dict[bytes, str]:
    """``content_hash → text``; deleted contents are left out."""
    rows = conn.execute(
        sa.text("SELECT content_hash, text FROM contents WHERE content_hash = ANY(:hashes)"), {"hashes": list(hashes)}
    )
    return {row.content_hash: row.text for row in rows}


def mark_sent(conn: sa.Connection, lease: Lease, hashes: Sequence[bytes]) -> None:
    """Note which contents are in the plain request that an attempt is about to send. It sends one request at a time.

    For its contents, ``request_no`` is 1 if they were sent and are not accounted for, and otherwise 0.
    """
    conn.execute(
        sa.text("""
            UPDATE provider_inputs
            SET request_no = CASE WHEN content_hash = ANY(:hashes) THEN 1 ELSE 0 END
            WHERE chunk_batch_id = :id AND attempt = :attempt AND provider_batch_id IS NULL
              AND (request_no = 1 OR content_hash = ANY(:hashes))
        """),
        {"id": lease.chunk_batch_id, "attempt": lease.attempt, "hashes": list(hashes)},
    )


def take_sent(conn: sa.Connection, lease: Lease) -> list[UnansweredRequests]:
    """Return what an attempt has sent without an answer, once: after that it does not count as sent any more."""
    rows = conn.execute(
        sa.text("""
            WITH sent AS (
                UPDATE provider_inputs
                SET request_no = 0
                WHERE chunk_batch_id = :id AND attempt = :attempt AND provider_batch_id IS NULL AND request_no = 1
                RETURNING job_id, sent_tokens
            )
            SELECT job_id, count(*) AS contents, sum(sent_tokens) AS tokens
            FROM sent
            GROUP BY job_id
        """),
        {"id": lease.chunk_batch_id, "attempt": lease.attempt},
    )
    return [UnansweredRequests(row.job_id, row.contents, int(row.tokens)) for row in rows]


def take_sent_by(conn: sa.Connection, owner: str) -> list[tuple[int, UnansweredRequests]]:
    """As `take_sent`, for all attempts of a worker, each with the id of its space."""
    rows = conn.execute(
        sa.text("""
            WITH sent AS (
                UPDATE provider_inputs i
                SET request_no = 0
                FROM chunk_batches b
                WHERE b.lease_owner = :owner AND b.state = :running
                  AND i.chunk_batch_id = b.id AND i.attempt = b.attempt
                  AND i.provider_batch_id IS NULL AND i.request_no = 1
                RETURNING i.space_id, i.job_id, i.sent_tokens
            )
            SELECT space_id, job_id, count(*) AS contents, sum(sent_tokens) AS tokens
            FROM sent
            GROUP BY space_id, job_id
            ORDER BY space_id, job_id
        """),
        {"owner": owner, "running": ChunkBatchState.RUNNING},
    )
    return [(row.space_id, UnansweredRequests(row.job_id, row.contents, int(row.tokens))) for row in rows]


def remove_answered(conn: sa.Connection, lease: Lease, hashes: Sequence[bytes]) -> int:
    """Take out of flight what a plain request of an attempt was answered; returns how many contents those are.

    It leaves contents that another attempt has taken over, because they get an answer of their own.
    """
    result = conn.execute(
        sa.text("""
            DELETE FROM provider_inputs
            WHERE space_id = :space AND content_hash = ANY(:hashes)
              AND chunk_batch_id = :id AND attempt = :attempt AND provider_batch_id IS NULL
        """),
        {
            "space": lease.space_id,
            "hashes": list(hashes),
            "id": lease.chunk_batch_id,
            "attempt": lease.attempt,
        },
    )
    return int(result.rowcount)


def remove_own(conn: sa.Connection, lease: Lease) -> list[UnansweredRequests]:
    """Take out of flight what an attempt with plain requests, or one before it, did not send or got no answer for.

    Returns what was sent of it.
    """
    rows = conn.execute(
        sa.text("""
            WITH own AS (
                DELETE FROM provider_inputs
                WHERE chunk_batch_id = :id AND attempt <= :attempt AND provider_batch_id IS NULL
                RETURNING job_id, sent_tokens, request_no
            )
            SELECT job_id, count(*) AS contents, sum(sent_tokens) AS tokens
            FROM own
            WHERE request_no = 1
            GROUP BY job_id
        """),
        {"id": lease.chunk_batch_id, "attempt": lease.attempt},
    )
    return [UnansweredRequests(row.job_id, row.contents, int(row.tokens)) for row in rows]


def remove_deleted(conn: sa.Connection, provider_batch_id: int) -> int:
    """Take out of flight what was deleted before it was sent; returns how many contents that were.

    The contents after them in their requests move up.
    """
    result = conn.execute(
        sa.text("""
            DELETE FROM provider_inputs i
            WHERE provider_batch_id = :id
              AND NOT EXISTS (SELECT FROM contents c WHERE c.content_hash = i.content_hash)
        """),
        {"id": provider_batch_id},
    )
    if result.rowcount:
        _move_up(conn, provider_batch_id)
    return int(result.rowcount)


def count(conn: sa.Connection, provider_batch_id: int) -> int:
    query = sa.text("SELECT count(*) FROM provider_inputs WHERE provider_batch_id = :id")
    return int(conn.execute(query, {"id": provider_batch_id}).scalar_one())


def move_half(conn: sa.Connection, provider_batch_id: int, to: int) -> None:
    """Move the latter half of a ProviderBatch's contents to the ProviderBatch ``to``, whose requests count from 0."""
    conn.execute(
        sa.text("""
            WITH numbered AS (
                SELECT space_id, content_hash, request_no,
                       row_number() OVER (ORDER BY request_no, position) AS number,
                       count(*) OVER () AS n_contents
                FROM provider_inputs
                WHERE provider_batch_id = :id
            ),
            latter_half AS (
                SELECT space_id, content_hash, request_no - min(request_no) OVER () AS request_no
                FROM numbered
                WHERE 2 * number > n_contents + 1
            )
            UPDATE provider_inputs i
            SET provider_batch_id = :to, request_no = h.request_no
            FROM latter_half h
            WHERE (i.space_id, i.content_hash) = (h.space_id, h.content_hash)
        """),
        {"id": provider_batch_id, "to": to},
    )
    _move_up(conn, to)


def _move_up(conn: sa.Connection, provider_batch_id: int) -> None:
    """Close the gaps in the requests of a ProviderBatch: a content's position is the number of inputs before it."""
    conn.execute(
        sa.text("""
            WITH moved AS (
                SELECT space_id, content_hash,
                       sum(coalesce(cardinality(weights), 1)) OVER (PARTITION BY request_no ORDER BY position)
                           - coalesce(cardinality(weights), 1) AS position
                FROM provider_inputs
                WHERE provider_batch_id = :id
            )
            UPDATE provider_inputs i
            SET position = m.position
            FROM moved m
            WHERE (i.space_id, i.content_hash) = (m.space_id, m.content_hash) AND i.position <> m.position
        """),
        {"id": provider_batch_id},
    )


def suspects(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> set[bytes]:
    """Which of these contents go into a request of their own."""
    rows = conn.execute(
        sa.text("SELECT content_hash FROM provider_suspects WHERE space_id = :space AND content_hash = ANY(:hashes)"),
        {"space": space_id, "hashes": list(hashes)},
    )
    return set(rows.scalars())


def add_suspects(conn: sa.Connection, space_id: int, hashes: Sequence[bytes]) -> None:
    conn.execute(
        sa.text("""
            INSERT INTO provider_suspects (space_id, content_hash)
            SELECT :space, unnest(CAST(:hashes AS bytea[]))
            ON CONFLICT DO NOTHING
        """),
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
