"""One embed request, asked and answered by the statements with which callers ask for many."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.db.connect import raw
from chunkmill.ledger import embed_requests
from chunkmill.ledger.embed_requests import Answer

LONG_S = 3_600.0


def ask(
    conn: sa.Connection,
    *,
    space_id: int,
    kind: str,
    texts: Sequence[str],
    urgency: int = 0,
    caller: str = "",
    timeout_s: float = LONG_S,
) -> int:
    """The id of a new request."""
    fingerprint = conn.execute(sa.text("SELECT fingerprint FROM spaces WHERE id = :id"), {"id": space_id}).scalar_one()
    (request_id,) = embed_requests.ask_all(
        conn,
        space_id=space_id,
        fingerprint=fingerprint,
        kind=kind,
        parts=[texts],
        urgency=urgency,
        caller=caller,
        timeout_s=timeout_s,
    )
    return request_id


def take_answer(conn: sa.Connection, request_id: int, *, dimensions: int) -> Answer | None:
    """The answer to a request, which is deleted; None while there is none."""
    rows = embed_requests.take_answers(raw(conn), [request_id], with_counts=embed_requests.has_columns(conn, "tokens"))
    return rows[0].answer(dimensions) if rows else None


def withdraw(conn: sa.Connection, request_id: int) -> None:
    embed_requests.withdraw_all(conn, [request_id])
