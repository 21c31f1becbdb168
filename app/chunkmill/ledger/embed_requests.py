"""Texts that someone waits for: a search's query, or ``client.embed``. Answered by any worker, in Postgres.

They do not pass through Redis: a query must not wait behind a window of doorbells, search must work while
Redis is down, and texts stay out of it. ``NOTIFY`` wakes the workers at the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.db.schema import EmbedRequestRow

CHANNEL = "chunkmill_embed_requests"
LEASE_SECONDS = 30


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    id: int
    space_id: int
    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """``vectors``: ``(n, d)`` float32 in input order; None with an ``error``."""

    vectors: NDArray[np.float32] | None
    error: str | None


def ask(conn: sa.Connection, *, space_id: int, kind: str, texts: Sequence[str]) -> int:
    """Leave a request; workers hear of it when the transaction commits."""
    request_id = conn.execute(
        sa.insert(EmbedRequestRow).values(space_id=space_id, kind=kind, texts=list(texts)).returning(EmbedRequestRow.id)
    ).scalar_one()
    conn.execute(sa.text(f"NOTIFY {CHANNEL}"))
    return int(request_id)


def claim_next(
    conn: sa.Connection, *, not_spaces: Sequence[int] = (), spaces: Sequence[int] | None = None, min_age_s: float = 0.0
) -> EmbedRequest | None:
    """Lease the oldest open request. SKIP LOCKED: of many workers each takes another.

    Without ``spaces`` those that only a provider serves are left to workers on its queue; with it only those are
    taken, once they are ``min_age_s`` old.

    A request is tried twice at most: one that takes its worker down must not take down all of them.
    """
    row = conn.execute(
        sa.text(
            "UPDATE embed_requests SET attempts = attempts + 1, "
            "lease_until = now() + make_interval(secs => :lease) WHERE id = ("
            "SELECT id FROM embed_requests WHERE vectors IS NULL AND error IS NULL "
            "AND (lease_until IS NULL OR lease_until < now()) AND attempts < 2 "
            "AND space_id <> ALL(CAST(:not_spaces AS int[])) "
            "AND CASE WHEN CAST(:spaces AS int[]) IS NULL "
            "    THEN (SELECT s.spec ->> 'provider' FROM spaces s WHERE s.id = space_id) <> 'openai' "
            "    ELSE space_id = ANY(CAST(:spaces AS int[])) END "
            "AND created_at <= clock_timestamp() - make_interval(secs => :age) "
            "ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) "
            "RETURNING id, space_id, kind, texts"
        ),
        {
            "lease": LEASE_SECONDS,
            "not_spaces": list(not_spaces),
            "spaces": None if spaces is None else list(spaces),
            "age": min_age_s,
        },
    ).one_or_none()
    return EmbedRequest(row.id, row.space_id, row.kind, tuple(row.texts)) if row else None


def answer(conn: sa.Connection, request_id: int, vectors: NDArray[np.float32]) -> None:
    payload = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    conn.execute(
        sa.text("UPDATE embed_requests SET vectors = :vectors WHERE id = :id"),
        {"id": request_id, "vectors": payload},
    )


def refuse(conn: sa.Connection, request_id: int, error: str) -> None:
    conn.execute(sa.text("UPDATE embed_requests SET error = :error WHERE id = :id"), {"id": request_id, "error": error})


def take_answer(conn: sa.Connection, request_id: int, *, dimensions: int) -> Answer | None:
    """Fetch and forget the answer; None while there is none."""
    row = conn.execute(
        sa.text(
            "DELETE FROM embed_requests WHERE id = :id AND (vectors IS NOT NULL OR error IS NOT NULL) "
            "RETURNING vectors, error"
        ),
        {"id": request_id},
    ).one_or_none()
    if row is None:
        return None
    if row.error is not None:
        return Answer(None, row.error)
    return Answer(np.frombuffer(row.vectors, dtype="<f4").reshape(-1, dimensions), None)


def withdraw(conn: sa.Connection, request_id: int) -> None:
    """Nobody waits any more."""
    conn.execute(sa.text("DELETE FROM embed_requests WHERE id = :id"), {"id": request_id})
