"""Texts that someone waits for: a search's query, or ``client.embed``. Any worker answers them, in Postgres.

They do not pass through Redis: a query must not wait behind a window of doorbells, search must work while Redis is
down, and texts stay out of it. ``NOTIFY`` wakes the workers when the transaction commits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import psycopg
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.db.schema import EmbedRequestRow
from chunkmill.domain.reasons import storable
from chunkmill.domain.states import Route

CHANNEL = "chunkmill_embed_requests"
LEASE_SECONDS = 30
MAX_ATTEMPTS = 2
"""A request that takes its worker down must not take down all of them."""
TELL_AFTER_SECONDS = 10.0
"""How long a request waits for a worker that serves its space, before a worker that does not may refuse it. A worker
that does takes it in a second, and a caller waits for 30 s by default."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A request, and the right to answer it: ``lease_until`` tells this claim from every other.

    ``attempt`` counts the claims, from 1.
    """

    id: int
    space_id: int
    kind: str
    texts: tuple[str, ...]
    lease_until: datetime
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """``vectors`` is ``(n, d)`` float32 in input order, or None if there is an ``error``."""

    vectors: NDArray[np.float32] | None
    error: str | None
    tokens: NDArray[np.int32] | None = None
    """``(n,)`` int32. None if the worker is of a release that does not say it."""
    truncated: NDArray[np.bool_] | None = None
    """``(n,)`` bool."""


def ask(
    conn: sa.Connection,
    *,
    space_id: int,
    kind: str,
    texts: Sequence[str],
    urgency: int = 0,
    caller: str = "",
    timeout_s: float | None = None,
) -> int:
    """Insert a request and return its id. Workers hear of it when the transaction commits.

    ``urgency`` is 0 for a few short texts and 1 for larger requests. After ``timeout_s`` seconds nobody waits for it.
    """
    values: dict[str, object] = {"space_id": space_id, "kind": kind, "texts": list(texts)}
    if has_columns(conn, "urgency"):
        values |= {"urgency": urgency, "caller": caller}
        if timeout_s is not None:
            values["deadline"] = sa.text("clock_timestamp() + make_interval(secs => :timeout)").bindparams(
                timeout=timeout_s
            )
    request_id = conn.execute(sa.insert(EmbedRequestRow).values(values).returning(EmbedRequestRow.id)).scalar_one()
    conn.execute(sa.text(f"NOTIFY {CHANNEL}"))
    return int(request_id)


# Without :spaces, those that only a provider serves are left to workers on its queue. The age is taken from
# clock_timestamp(), because now() is when the transaction began.
_CLAIM_NEXT = sa.text("""
UPDATE embed_requests
SET attempts = attempts + 1, lease_until = now() + make_interval(secs => :lease)
WHERE id = (
    SELECT id
    FROM embed_requests
    WHERE vectors IS NULL AND error IS NULL
      AND (lease_until IS NULL OR lease_until < now())
      AND attempts < :max_attempts
      AND space_id <> ALL(CAST(:not_spaces AS int[]))
      AND CASE WHEN CAST(:spaces AS int[]) IS NULL
               THEN (SELECT s.spec ->> 'provider' FROM spaces s WHERE s.id = space_id) <> 'openai'
               ELSE space_id = ANY(CAST(:spaces AS int[])) END
      AND created_at <= clock_timestamp() - make_interval(secs => :age)
    ORDER BY id
    LIMIT 1
    FOR UPDATE SKIP LOCKED)
RETURNING id, space_id, kind, texts, lease_until, attempts
""")


def claim_next(
    conn: sa.Connection,
    *,
    not_spaces: Sequence[int] = (),
    spaces: Sequence[int] | None = None,
    min_age_s: float = 0.0,
    lease_seconds: float = LEASE_SECONDS,
) -> EmbedRequest | None:
    """Lease the oldest open request and return it. Each of several workers gets another one (SKIP LOCKED).

    Without ``spaces``, requests that only a provider can answer are left to workers on its queue. With ``spaces``, only
    requests of these are taken, and only once they are ``min_age_s`` seconds old. A request is tried
    ``MAX_ATTEMPTS`` times.
    """
    row = conn.execute(
        _CLAIM_NEXT,
        {
            "lease": lease_seconds,
            "max_attempts": MAX_ATTEMPTS,
            "not_spaces": list(not_spaces),
            "spaces": None if spaces is None else list(spaces),
            "age": min_age_s,
        },
    ).one_or_none()
    if row is None:
        return None
    return EmbedRequest(row.id, row.space_id, row.kind, tuple(row.texts), row.lease_until, row.attempts)


_RENEW = sa.text("""
UPDATE embed_requests
SET lease_until = clock_timestamp() + make_interval(secs => :lease)
WHERE id = :id AND lease_until = :lease_until AND vectors IS NULL AND error IS NULL
RETURNING lease_until
""")


def renew(conn: sa.Connection, request: EmbedRequest, *, lease_seconds: float) -> EmbedRequest | None:
    """The request with a lease from now on. None if nobody waits for it any more, or another worker has it."""
    parameters = {"id": request.id, "lease_until": request.lease_until, "lease": lease_seconds}
    until = conn.execute(_RENEW, parameters).scalar_one_or_none()
    return None if until is None else replace(request, lease_until=until)


def commit_tokens(conn: sa.Connection, request: EmbedRequest, tokens: int) -> None:
    """Note how many tokens of a request are about to be sent to a provider and not charged yet, for the budget.

    They count until the request has an answer or is gone. If the lease was lost, nothing is changed.
    """
    if has_columns(conn, "committed_tokens"):
        conn.execute(
            sa.text("UPDATE embed_requests SET committed_tokens = :n WHERE id = :id AND lease_until = :lease_until"),
            {"id": request.id, "lease_until": request.lease_until, "n": tokens},
        )


def committed(conn: sa.Connection) -> Sequence[sa.Row[Any]]:
    """The tokens that are committed for requests without an answer: ``(space_id, route, tokens)`` of each space."""
    if not has_columns(conn, "committed_tokens"):
        return ()
    return conn.execute(
        sa.text("""
            SELECT space_id, CAST(:route AS text) AS route, sum(committed_tokens) AS tokens
            FROM embed_requests
            WHERE committed_tokens > 0 AND vectors IS NULL AND error IS NULL
            GROUP BY space_id
        """),
        {"route": Route.OPENAI_SYNC},
    ).all()


_COLUMNS = """
SELECT FROM pg_attribute WHERE attrelid = to_regclass('embed_requests') AND attname = :name AND NOT attisdropped
"""
_SEEN: WeakKeyDictionary[sa.Engine, set[str]] = WeakKeyDictionary()


def has_columns(conn: sa.Connection, name: str) -> bool:
    """Whether the table has the column ``name``, and those that came with it.

    An older schema has not, on which this code runs too during an upgrade. Once it was seen it is not asked again.
    """
    seen = _SEEN.setdefault(conn.engine, set())
    if name not in seen and conn.execute(sa.text(_COLUMNS), {"name": name}).one_or_none() is not None:
        seen.add(name)
    return name in seen


def answer(
    conn: sa.Connection,
    request_id: int,
    vectors: NDArray[np.float32],
    tokens: NDArray[np.int32] | None = None,
    truncated: NDArray[np.bool_] | None = None,
) -> None:
    """Store the vectors of a request, for its caller to take. They count even if the lease was lost."""
    payload = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
    conn.execute(
        sa.text("UPDATE embed_requests SET vectors = :vectors, error = NULL WHERE id = :id"),
        {"id": request_id, "vectors": payload},
    )
    if tokens is not None and truncated is not None and has_columns(conn, "tokens"):
        conn.execute(
            sa.text("UPDATE embed_requests SET tokens = :tokens, truncated = :truncated WHERE id = :id"),
            {"id": request_id, "tokens": tokens.tolist(), "truncated": truncated.tolist()},
        )


# The guard of this statement and the next: still unanswered, and still in the hands of this claim.
_REFUSE = sa.text("""
UPDATE embed_requests
SET error = :error
WHERE id = :id AND lease_until = :lease_until AND vectors IS NULL AND error IS NULL
""")


def refuse(conn: sa.Connection, request: EmbedRequest, error: str) -> None:
    """Store why a request has no vectors, for its caller to take. If the lease was lost, nothing is changed."""
    conn.execute(_REFUSE, {"id": request.id, "lease_until": request.lease_until, "error": storable(error)})


_RELEASE = sa.text("""
UPDATE embed_requests
SET attempts = attempts - 1, lease_until = NULL
WHERE id = :id AND lease_until = :lease_until AND vectors IS NULL AND error IS NULL
""")


def release(conn: sa.Connection, request: EmbedRequest) -> None:
    """Leave a request to other workers, uncharged, and wake them. If the lease was lost, nothing is changed."""
    conn.execute(_RELEASE, {"id": request.id, "lease_until": request.lease_until})
    conn.execute(sa.text(f"NOTIFY {CHANNEL}"))


# While a request of the space is leased, somebody serves it and may only be busy.
_REFUSE_UNANSWERED = sa.text("""
UPDATE embed_requests r
SET error = :error
WHERE r.space_id = :space AND r.vectors IS NULL AND r.error IS NULL
  AND (r.lease_until IS NULL OR r.lease_until < now())
  AND r.created_at <= clock_timestamp() - make_interval(secs => :age)
  AND NOT EXISTS (
      SELECT FROM embed_requests o
      WHERE o.space_id = :space AND o.vectors IS NULL AND o.error IS NULL AND o.lease_until >= now())
""")


def refuse_unanswered(conn: sa.Connection, unserved: Mapping[int, str]) -> int:
    """Refuse what nobody has answered for ``TELL_AFTER_SECONDS``; returns how many requests.

    ``unserved`` are the spaces that this worker cannot serve, with the reasons, of which the callers are told.
    """
    refused = 0
    for space_id, reason in unserved.items():
        parameters = {"space": space_id, "error": storable(reason), "age": TELL_AFTER_SECONDS}
        refused += conn.execute(_REFUSE_UNANSWERED, parameters).rowcount
    return refused


# All columns: an older schema has no tokens.
_TAKE_ANSWER = sa.text("""
DELETE FROM embed_requests
WHERE id = :id AND (vectors IS NOT NULL OR error IS NOT NULL)
RETURNING embed_requests.*
""")


def take_answer(conn: sa.Connection, request_id: int, *, dimensions: int) -> Answer | None:
    """Delete an answered request and return its answer; None while there is no answer."""
    row = conn.execute(_TAKE_ANSWER, {"id": request_id}).mappings().one_or_none()
    if row is None:
        return None
    if row["error"] is not None:
        return Answer(None, row["error"])
    vectors = np.frombuffer(row["vectors"], dtype="<f4").reshape(-1, dimensions)
    if row.get("tokens") is None:
        return Answer(vectors, None)
    return Answer(vectors, None, np.array(row["tokens"], np.int32), np.array(row["truncated"], np.bool_))


def withdraw(conn: sa.Connection, request_id: int) -> None:
    """Delete a request that nobody waits for any more."""
    conn.execute(sa.text("DELETE FROM embed_requests WHERE id = :id"), {"id": request_id})


# What the caller's side needs: many requests at a time, and the answers to many calls.

ANSWERS_CHANNEL = "chunkmill_answers"
"""Workers notify it when they have answered. The payload is ids of requests, with commas between them."""


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """An answer as the worker wrote it. ``vectors`` is None if there is an ``error``."""

    id: int
    vectors: bytes | None
    error: str | None
    tokens: list[int] | None
    truncated: list[bool] | None

    def answer(self, dimensions: int) -> Answer:
        """The answer in a space of so many dimensions."""
        if self.vectors is None:
            return Answer(None, self.error)
        vectors = np.frombuffer(self.vectors, dtype="<f4").reshape(-1, dimensions)
        if self.tokens is None or self.truncated is None:
            return Answer(vectors, None)
        return Answer(vectors, None, np.array(self.tokens, np.int32), np.array(self.truncated, np.bool_))


_NEW_COLUMNS = ", urgency, caller, deadline"
_NEW_VALUES = ", :urgency, :caller, clock_timestamp() + make_interval(secs => :timeout)"


def ask_all(
    conn: sa.Connection,
    *,
    space_id: int,
    fingerprint: str,
    kind: str,
    parts: Sequence[Sequence[str]],
    urgency: int,
    caller: str,
    timeout_s: float,
) -> list[int]:
    """Insert a request for each part, in one statement; returns their ids in the order of the parts.

    It returns no id if the space is gone, or if another one has its id now. The arguments are those of :func:`ask`.
    """
    is_new = has_columns(conn, "urgency")
    # An INSERT of sorted rows numbers them in that order.
    insert = f"""
        WITH asked AS (
            INSERT INTO embed_requests (space_id, kind, texts{_NEW_COLUMNS if is_new else ""})
            SELECT s.id, :kind, (CAST(:texts AS text[]))[part.first : part.last]{_NEW_VALUES if is_new else ""}
            FROM spaces s
            CROSS JOIN unnest(CAST(:firsts AS int[]), CAST(:lasts AS int[])) AS part (first, last)
            WHERE s.id = :space AND s.fingerprint = :fingerprint
            ORDER BY part.first
            RETURNING id
        )
        SELECT id, pg_notify('{CHANNEL}', '')
        FROM asked
    """
    firsts = list(accumulate((len(part) for part in parts), initial=1))
    parameters: dict[str, object] = {
        "space": space_id,
        "fingerprint": fingerprint,
        "kind": kind,
        "texts": [text for part in parts for text in part],
        "firsts": firsts[:-1],
        "lasts": [first - 1 for first in firsts[1:]],
    }
    if is_new:
        parameters |= {"urgency": urgency, "caller": caller, "timeout": timeout_s}
    return sorted(row.id for row in conn.execute(sa.text(insert), parameters))


_TAKE_ANSWERS = """
DELETE FROM embed_requests
WHERE id = ANY(%(ids)s) AND (vectors IS NOT NULL OR error IS NOT NULL)
RETURNING id, vectors, error, tokens, truncated
"""
_TAKE_ANSWERS_WITHOUT_COUNTS = """
DELETE FROM embed_requests
WHERE id = ANY(%(ids)s) AND (vectors IS NOT NULL OR error IS NOT NULL)
RETURNING id, vectors, error, NULL, NULL
"""


def take_answers(
    connection: psycopg.Connection[Any], request_ids: Sequence[int], *, with_counts: bool
) -> list[AnswerRow]:
    """Delete those of the requests that have an answer, and return the answers.

    ``with_counts`` says whether the table has the columns of :func:`has_columns` ``tokens``.
    """
    statement = _TAKE_ANSWERS if with_counts else _TAKE_ANSWERS_WITHOUT_COUNTS
    with connection.cursor(binary=True) as cursor:
        cursor.execute(statement, {"ids": list(request_ids)}, prepare=False)
        return [AnswerRow(*row) for row in cursor.fetchall()]


def withdraw_all(conn: sa.Connection, request_ids: Sequence[int]) -> None:
    """Delete requests that nobody waits for any more."""
    conn.execute(sa.text("DELETE FROM embed_requests WHERE id = ANY(:ids)"), {"ids": list(request_ids)})
