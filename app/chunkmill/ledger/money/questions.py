"""What a provider may charge for questions: requests of ``embed_requests`` that a worker of a paid route has.

The row of such a request belongs to its caller, who deletes it before or after the answer, and a crash of Postgres
empties its table. Therefore the possible cost of a question is kept here. Only the worker that asks it deletes its row,
or, if that worker is gone, the one that books what it may have cost. The probes of a worker are questions of its own.

Each change names its guard and is made in the transaction that books. If a row is missing, its cost is booked already:
by an earlier run of the same transaction, or by another worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.states import Route


def add(conn: sa.Connection, key: bytes, *, space_id: int, tokens: int, until: datetime) -> None:
    """Let the budget count the ``tokens`` of a question of which nothing was sent yet.

    After ``until`` its worker is taken for dead. ``key`` is random, because ids of requests begin anew after a crash.
    """
    conn.execute(
        sa.text("""
            INSERT INTO provider_questions (key, space_id, tokens, until)
            VALUES (:key, :space, :tokens, :until)
        """),
        {"key": key, "space": space_id, "tokens": tokens, "until": until},
    )


def add_sent(
    conn: sa.Connection, key: bytes, *, space_id: int, contents: int, tokens: int, lease_seconds: float
) -> None:
    """Let the budget count a request that no caller waits for, such as a probe, and that is about to be sent.

    Its worker is taken for dead ``lease_seconds`` from now.
    """
    conn.execute(
        sa.text("""
            INSERT INTO provider_questions (key, space_id, tokens, sent_contents, sent_tokens, until)
            VALUES (:key, :space, :tokens, :contents, :tokens, clock_timestamp() + make_interval(secs => :seconds))
        """),
        {"key": key, "space": space_id, "contents": contents, "tokens": tokens, "seconds": lease_seconds},
    )


def mark_sent(conn: sa.Connection, key: bytes, *, contents: int, tokens: int, until: datetime) -> bool:
    """Mark a request of a question as about to be sent. Returns False if the question is another worker's to book.

    The last one was booked before, or was refused and so not charged.
    """
    marked = conn.execute(
        sa.text("""
            UPDATE provider_questions
            SET sent_contents = :contents, sent_tokens = :tokens, until = :until
            WHERE key = :key
            RETURNING key
        """),
        {"key": key, "contents": contents, "tokens": tokens, "until": until},
    )
    return marked.one_or_none() is not None


def take_sent(conn: sa.Connection, key: bytes) -> bool:
    """Take the requests that were sent out of flight, so that this transaction books them. Returns False if it is
    booked already.
    """
    taken = conn.execute(
        sa.text("""
            UPDATE provider_questions
            SET tokens = tokens - sent_tokens, sent_contents = 0, sent_tokens = 0
            WHERE key = :key AND sent_contents > 0
            RETURNING key
        """),
        {"key": key},
    )
    return taken.one_or_none() is not None


def end(conn: sa.Connection, key: bytes) -> bool:
    """Take a question out of flight: what was sent of it is booked, in this transaction or before, or was refused.

    Returns False if another worker has booked it and taken it out.
    """
    deleted = conn.execute(sa.text("DELETE FROM provider_questions WHERE key = :key"), {"key": key})
    return deleted.rowcount == 1


def overdue_spaces(conn: sa.Connection) -> Sequence[int]:
    """The spaces of questions whose workers are taken for dead."""
    query = "SELECT DISTINCT space_id FROM provider_questions WHERE until < clock_timestamp() ORDER BY space_id"
    return conn.execute(sa.text(query)).scalars().all()


def take_overdue(conn: sa.Connection, space_id: int) -> Sequence[sa.Row[Any]]:
    """Take the questions of a space out of flight whose workers are taken for dead, to be booked in this transaction.

    Returns ``(contents, tokens)`` of each request that may have been sent. Questions that another transaction has
    locked are left to it.
    """
    return conn.execute(
        sa.text("""
            WITH overdue AS (
                DELETE FROM provider_questions
                WHERE key IN (
                    SELECT key
                    FROM provider_questions
                    WHERE space_id = :space AND until < clock_timestamp()
                    FOR UPDATE SKIP LOCKED)
                RETURNING key, sent_contents, sent_tokens
            )
            SELECT sent_contents AS contents, sent_tokens AS tokens
            FROM overdue
            WHERE sent_contents > 0
            ORDER BY key
        """),
        {"space": space_id},
    ).all()


def committed(conn: sa.Connection) -> Sequence[sa.Row[Any]]:
    """The tokens of questions in flight that are not booked: ``(space_id, route, tokens)`` of each space.

    Paid workers of the last release note their questions in ``embed_requests``, because its schema has no table of
    questions.
    """
    if not conn.execute(sa.text("SELECT to_regclass('provider_questions') IS NOT NULL")).scalar_one():
        return ()
    return conn.execute(
        sa.text("""
            SELECT space_id, CAST(:route AS text) AS route, sum(tokens) AS tokens
            FROM (
                SELECT space_id, tokens
                FROM provider_questions
                UNION ALL
                SELECT space_id, committed_tokens
                FROM embed_requests
                WHERE committed_tokens > 0 AND vectors IS NULL AND error IS NULL
            ) AS questions
            GROUP BY space_id
        """),
        {"route": Route.OPENAI_SYNC},
    ).all()
