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

import psycopg
import sqlalchemy as sa

from chunkmill.domain.providers import OPENAI
from chunkmill.domain.reasons import storable
from chunkmill.system.numbers import NDArray, np
from chunkmill.telemetry import tracing

CHANNEL = "chunkmill_embed_requests"
ANSWERS_CHANNEL = "chunkmill_answers"
"""Its payload is the ids of requests that have an answer now, joined by commas."""
MOST_PAYLOAD = 7_900
"""Bytes of one notification. Postgres takes 7,999."""
IDS_EACH = MOST_PAYLOAD // 20
"""The most ids in one notification. An id has up to 19 digits."""
LEASE_SECONDS = 4.0
"""How many seconds a lease lasts, which the worker renews three times in that time. If a worker is killed, its callers
wait this long, and until the next check, for another worker."""
MAX_ATTEMPTS = 2
"""A request that takes its worker down must not take down all of them."""
SHORT_BYTES = 4_096
"""The most bytes of the texts of an urgent request, as Postgres stores them."""
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
    urgency: int = 0
    caller: str = ""
    seconds_left: float | None = None
    """How many seconds after the claim somebody still waits for the answer. None if that is not known."""
    traceparent: str | None = None
    """The caller's span; None if it has none, or this process sends no traces."""


@dataclass(frozen=True, slots=True)
class ClaimedRequests:
    """``is_all`` says whether nothing was left that the claim was allowed to take. ``requests`` are in the order in
    which they should be answered."""

    requests: tuple[EmbedRequest, ...]
    is_all: bool


@dataclass(frozen=True, slots=True)
class EmbedAnswer:
    """The vectors of a request: ``vectors`` is ``(n, d)`` float32 in the order of its texts."""

    request_id: int
    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32] | None = None
    """``(n,)`` int32."""
    truncated: NDArray[np.bool_] | None = None
    """``(n,)`` bool."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``vectors`` is ``(n, d)`` float32 in input order, or None if there is an ``error``."""

    vectors: NDArray[np.float32] | None
    error: str | None
    tokens: NDArray[np.int32] | None = None
    """``(n,)`` int32. None if the worker's release does not report it."""
    truncated: NDArray[np.bool_] | None = None
    """``(n,)`` bool."""


# A request that its caller calls urgent is treated as urgent only if it is short. The callers of one urgency take
# turns: first the oldest of each, then the second of each. A request that was in the hands of a worker before may have
# killed it, so it is taken alone. Rows are locked before it is known which of them fit. Those that do not are free
# again when this transaction ends, and other workers are woken then. Without :spaces, requests in spaces that only a
# provider serves are left to workers on the provider's queue. The age is taken from clock_timestamp(), because now() is
# when the transaction began. The tokens are those of `chunkmill.domain.embedded.estimated_tokens`.
_CLAIM_SOME = """
WITH waiting AS MATERIALIZED (
    SELECT id, c.urgency, row_number() OVER (PARTITION BY c.urgency, caller ORDER BY id) AS turn
    FROM embed_requests r
    CROSS JOIN LATERAL (
        SELECT CASE WHEN r.urgency = 0 AND pg_column_size(r.texts) <= :short_bytes THEN 0 ELSE 1 END AS urgency) AS c
    WHERE vectors IS NULL AND error IS NULL
      AND (lease_until IS NULL OR lease_until < now())
      AND attempts < :max_attempts
      AND (deadline IS NULL OR deadline > clock_timestamp())
      AND (c.urgency = 0 OR CAST(:synchronous AS boolean) AND caller <> ALL(CAST(:not_callers AS text[])))
      AND space_id <> ALL(CAST(:not_spaces AS int[]))
      AND CASE WHEN CAST(:spaces AS int[]) IS NULL
               THEN space_id NOT IN (SELECT s.id FROM spaces s WHERE s.spec ->> 'provider' = :openai)
               ELSE space_id = ANY(CAST(:spaces AS int[])) END
      AND created_at <= clock_timestamp() - make_interval(secs => :age)
), locked AS MATERIALIZED (
    SELECT r.id, w.urgency, w.turn, r.attempts > 0 AS is_suspect, cardinality(r.texts) AS texts,
        (SELECT coalesce(sum(length(t) / 4 + 2), 0) FROM unnest(r.texts) AS t) AS tokens
    FROM waiting w JOIN embed_requests r ON r.id = w.id
    WHERE r.vectors IS NULL AND r.error IS NULL AND (r.lease_until IS NULL OR r.lease_until < now())
    ORDER BY w.urgency, w.turn, w.id
    LIMIT CAST(:most_locked AS int)
    FOR UPDATE OF r SKIP LOCKED
), counted AS (
    SELECT id, urgency, row_number() OVER o AS place, sum(texts) OVER o AS texts, sum(tokens) OVER o AS tokens,
        bool_or(is_suspect) OVER o AS has_suspect, count(*) OVER () AS found
    FROM locked
    WINDOW o AS (ORDER BY urgency, turn, id)
)
UPDATE embed_requests r
SET attempts = attempts + 1, lease_until = now() + make_interval(secs => :lease)
FROM counted c
WHERE r.id = c.id
  AND (c.place = 1
       OR c.place <= :most_requests AND c.texts <= :most_texts AND c.tokens <= :most_tokens AND NOT c.has_suspect)
RETURNING r.id, space_id, kind, r.texts, lease_until, attempts, c.urgency, caller,
    CAST(extract(epoch FROM deadline - clock_timestamp()) AS float) AS seconds_left, c.place, c.found
"""
"""All of the statement but its last column, which the schema of an older release does not have. Two statements of this
length would not stay equal."""
_CLAIM_TRACED = sa.text(f"{_CLAIM_SOME}, r.traceparent")
_CLAIM_UNTRACED = sa.text(f"{_CLAIM_SOME}, NULL AS traceparent")

# For the schema of an older release.
_CLAIM_NEXT = sa.text("""
UPDATE embed_requests
SET attempts = attempts + 1, lease_until = now() + make_interval(secs => :lease)
WHERE id = (
    SELECT id
    FROM embed_requests
    WHERE vectors IS NULL AND error IS NULL AND (lease_until IS NULL OR lease_until < now())
      AND attempts < CAST(:max_attempts AS int)
      AND space_id <> ALL(CAST(:not_spaces AS int[]))
      AND CASE WHEN CAST(:spaces AS int[]) IS NULL
               THEN (SELECT s.spec ->> 'provider' FROM spaces s WHERE s.id = space_id) <> :openai
               ELSE space_id = ANY(CAST(:spaces AS int[])) END
      AND created_at <= clock_timestamp() - make_interval(secs => :age)
    ORDER BY id
    LIMIT 1
    FOR UPDATE SKIP LOCKED)
RETURNING id, space_id, kind, texts, lease_until, attempts
""")


def claim_some(
    conn: sa.Connection,
    *,
    most_requests: int,
    most_texts: int,
    most_tokens: int,
    synchronous: bool = True,
    not_callers: Sequence[str] = (),
    not_spaces: Sequence[int] = (),
    spaces: Sequence[int] | None = None,
    min_age_s: float = 0.0,
    lease_seconds: float = LEASE_SECONDS,
) -> ClaimedRequests:
    """Lease the most urgent open requests, and return them. Each of several workers gets others (SKIP LOCKED).

    Together they have at most ``most_texts`` texts and ``most_tokens`` tokens, as estimated from their characters; the
    first one is taken however large it is. Larger requests (urgency 1) are taken only if ``synchronous``, and not those
    of ``not_callers``. Nothing is taken after its deadline. A request is tried ``MAX_ATTEMPTS`` times, and the second
    time it is taken alone.

    Without ``spaces``, requests that only a provider can answer are left to workers on its queue. With ``spaces``, only
    requests of these are taken, and only once they are ``min_age_s`` seconds old. If some did not fit, the other
    workers are woken, because they did not see those that this transaction had locked.

    The schema of an older release knows no urgency. There it takes the oldest request alone.
    """
    parameters: dict[str, object] = {
        "lease": lease_seconds,
        "max_attempts": MAX_ATTEMPTS,
        "not_spaces": list(not_spaces),
        "spaces": None if spaces is None else list(spaces),
        "age": min_age_s,
        "openai": OPENAI,
    }
    if not has_columns(conn, "urgency"):
        row = conn.execute(_CLAIM_NEXT, parameters).one_or_none()
        if row is None:
            return ClaimedRequests((), is_all=True)
        return ClaimedRequests(
            (EmbedRequest(row.id, row.space_id, row.kind, tuple(row.texts), row.lease_until, row.attempts),),
            is_all=False,
        )
    parameters |= {
        "short_bytes": SHORT_BYTES,
        "most_requests": most_requests,
        # One request more than the limit is locked, to find out whether there are more. A caller that wants a single
        # one locks no other.
        "most_locked": most_requests if most_requests == 1 else most_requests + 1,
        "most_texts": most_texts,
        "most_tokens": most_tokens,
        "synchronous": synchronous,
        "not_callers": list(not_callers),
    }
    statement = _CLAIM_TRACED if tracing.is_on() and has_columns(conn, "traceparent") else _CLAIM_UNTRACED
    rows = sorted(conn.execute(statement, parameters).all(), key=lambda row: int(row.place))
    is_all = not rows or len(rows) == rows[0].found
    if not is_all:
        conn.execute(sa.text(f"NOTIFY {CHANNEL}"))
    return ClaimedRequests(
        tuple(
            EmbedRequest(
                row.id,
                row.space_id,
                row.kind,
                tuple(row.texts),
                row.lease_until,
                row.attempts,
                row.urgency,
                row.caller,
                row.seconds_left,
                row.traceparent,
            )
            for row in rows
        ),
        is_all,
    )


def claim_next(
    conn: sa.Connection,
    *,
    not_spaces: Sequence[int] = (),
    spaces: Sequence[int] | None = None,
    min_age_s: float = 0.0,
    lease_seconds: float = LEASE_SECONDS,
) -> EmbedRequest | None:
    """Lease the most urgent open request and return it, as :func:`claim_some` does."""
    claimed = claim_some(
        conn,
        most_requests=1,
        most_texts=1,
        most_tokens=1,
        not_spaces=not_spaces,
        spaces=spaces,
        min_age_s=min_age_s,
        lease_seconds=lease_seconds,
    )
    return claimed.requests[0] if claimed.requests else None


_RENEW = sa.text("""
UPDATE embed_requests
SET lease_until = clock_timestamp() + make_interval(secs => :lease)
WHERE id = :id AND lease_until = :lease_until AND vectors IS NULL AND error IS NULL
RETURNING lease_until
""")
_IS_LATE = sa.text("SELECT FROM embed_requests WHERE id = :id AND deadline <= clock_timestamp()")


def renew(conn: sa.Connection, request: EmbedRequest, *, lease_seconds: float) -> EmbedRequest | None:
    """The request with a lease from now on. None if nobody waits for it any more, or another worker has it."""
    if has_columns(conn, "deadline") and conn.execute(_IS_LATE, {"id": request.id}).one_or_none() is not None:
        return None
    parameters = {"id": request.id, "lease_until": request.lease_until, "lease": lease_seconds}
    until = conn.execute(_RENEW, parameters).scalar_one_or_none()
    return None if until is None else replace(request, lease_until=until)


_RENEW_ALL = sa.text("""
UPDATE embed_requests r
SET lease_until = clock_timestamp() + make_interval(secs => :lease)
FROM unnest(CAST(:ids AS bigint[]), CAST(:untils AS timestamptz[])) AS held (id, lease_until)
WHERE r.id = held.id AND r.lease_until = held.lease_until AND r.vectors IS NULL AND r.error IS NULL
RETURNING r.id, r.lease_until
""")


def renew_all(
    conn: sa.Connection, requests: Sequence[EmbedRequest], *, lease_seconds: float = LEASE_SECONDS
) -> dict[int, EmbedRequest]:
    """Those requests that somebody still waits for and no other worker has, each with a lease from now on, by id."""
    parameters = {"lease": lease_seconds} | _claims(requests)
    until = {row.id: row.lease_until for row in conn.execute(_RENEW_ALL, parameters)}
    return {request.id: replace(request, lease_until=until[request.id]) for request in requests if request.id in until}


def _claims(requests: Sequence[EmbedRequest]) -> dict[str, object]:
    return {
        "ids": [request.id for request in requests],
        "untils": [request.lease_until for request in requests],
    }


def still_open(conn: sa.Connection, request_ids: Sequence[int]) -> set[int]:
    """Those of the requests that have no answer and that their callers have not withdrawn."""
    return set(
        conn.execute(
            sa.text("""
                SELECT id
                FROM embed_requests
                WHERE id = ANY(CAST(:ids AS bigint[])) AND vectors IS NULL AND error IS NULL
            """),
            {"ids": list(request_ids)},
        ).scalars()
    )


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


# Each notification has only as many ids as fit into its payload: see MOST_PAYLOAD.
_ANSWER = sa.text("""
WITH answered AS (
    UPDATE embed_requests r
    SET vectors = a.vectors, error = NULL
    FROM unnest(CAST(:ids AS bigint[]), CAST(:vectors AS bytea[])) AS a (id, vectors)
    WHERE r.id = a.id
    RETURNING r.id
)
SELECT pg_notify(:channel, string_agg(CAST(id AS text), ','))
FROM (SELECT id, (row_number() OVER (ORDER BY id) - 1) / :ids_each AS part FROM answered) AS numbered
GROUP BY part
""")
# An array of arrays must be a rectangle in Postgres, so that each array is given as a text.
_ANSWER_WITH_TOKENS = sa.text("""
WITH answered AS (
    UPDATE embed_requests r
    SET vectors = a.vectors, error = NULL, tokens = CAST(a.tokens AS int[]),
        truncated = CAST(a.truncated AS boolean[])
    FROM unnest(CAST(:ids AS bigint[]), CAST(:vectors AS bytea[]), CAST(:tokens AS text[]), CAST(:truncated AS text[]))
        AS a (id, vectors, tokens, truncated)
    WHERE r.id = a.id
    RETURNING r.id
)
SELECT pg_notify(:channel, string_agg(CAST(id AS text), ','))
FROM (SELECT id, (row_number() OVER (ORDER BY id) - 1) / :ids_each AS part FROM answered) AS numbered
GROUP BY part
""")


def answer_all(conn: sa.Connection, answers: Sequence[EmbedAnswer]) -> None:
    """Store the vectors of many requests, and tell their callers with one notification when the transaction commits.

    They count even if a lease was lost. Requests that were withdrawn get no answer.
    """
    if not answers:
        return
    parameters: dict[str, object] = {
        "ids": [answer.request_id for answer in answers],
        "vectors": [np.ascontiguousarray(answer.vectors, dtype="<f4").tobytes() for answer in answers],
        "channel": ANSWERS_CHANNEL,
        "ids_each": IDS_EACH,
    }
    statement = _ANSWER
    if has_columns(conn, "tokens"):
        statement = _ANSWER_WITH_TOKENS
        parameters["tokens"] = [_array(answer.tokens) for answer in answers]
        parameters["truncated"] = [_array(answer.truncated) for answer in answers]
    conn.execute(statement, parameters)


def _array(values: NDArray[np.int32] | NDArray[np.bool_] | None) -> str | None:
    """An array as Postgres writes it."""
    return None if values is None else "{" + ",".join(map(str, values.tolist())) + "}"


def answer(
    conn: sa.Connection,
    request_id: int,
    vectors: NDArray[np.float32],
    tokens: NDArray[np.int32] | None = None,
    truncated: NDArray[np.bool_] | None = None,
) -> None:
    """Store the vectors of one request, as :func:`answer_all` does."""
    answer_all(conn, [EmbedAnswer(request_id, vectors, tokens, truncated)])


def tell(conn: sa.Connection, request_ids: Sequence[int]) -> None:
    """Tell the callers of these requests, when the transaction commits, that they have an answer."""
    for first in range(0, len(request_ids), IDS_EACH):
        payload = ",".join(map(str, request_ids[first : first + IDS_EACH]))
        parameters = {"channel": ANSWERS_CHANNEL, "payload": payload}
        conn.execute(sa.text("SELECT pg_notify(:channel, :payload)"), parameters)


# The guard of this statement and the next: still unanswered, and still in the hands of this claim.
_REFUSE = sa.text("""
UPDATE embed_requests
SET error = :error
WHERE id = :id AND lease_until = :lease_until AND vectors IS NULL AND error IS NULL
RETURNING id
""")


def refuse(conn: sa.Connection, request: EmbedRequest, error: str) -> None:
    """Store why a request has no vectors, for its caller to take. If the lease was lost, nothing is changed."""
    parameters = {"id": request.id, "lease_until": request.lease_until, "error": storable(error)}
    tell(conn, conn.execute(_REFUSE, parameters).scalars().all())


_RELEASE = sa.text("""
UPDATE embed_requests r
SET attempts = attempts - 1, lease_until = NULL
FROM unnest(CAST(:ids AS bigint[]), CAST(:untils AS timestamptz[])) AS held (id, lease_until)
WHERE r.id = held.id AND r.lease_until = held.lease_until AND r.vectors IS NULL AND r.error IS NULL
""")


def release(conn: sa.Connection, *requests: EmbedRequest) -> None:
    """Leave requests to other workers, uncharged, and wake them. If a lease was lost, nothing is changed."""
    conn.execute(_RELEASE, _claims(requests))
    conn.execute(sa.text(f"NOTIFY {CHANNEL}"))


# While a request of the space is leased, a worker serves the space; it may only be busy.
_REFUSE_UNANSWERED = sa.text("""
UPDATE embed_requests r
SET error = :error
WHERE r.space_id = :space AND r.vectors IS NULL AND r.error IS NULL
  AND (r.lease_until IS NULL OR r.lease_until < now())
  AND r.created_at <= clock_timestamp() - make_interval(secs => :age)
  AND NOT EXISTS (
      SELECT FROM embed_requests o
      WHERE o.space_id = :space AND o.vectors IS NULL AND o.error IS NULL AND o.lease_until >= now())
RETURNING r.id
""")


def refuse_unanswered(conn: sa.Connection, unserved: Mapping[int, str]) -> int:
    """Refuse what nobody has answered for ``TELL_AFTER_SECONDS``; returns how many requests.

    ``unserved`` are the spaces that this worker cannot serve, with the reasons, of which the callers are told.
    """
    refused = 0
    for space_id, reason in unserved.items():
        parameters = {"space": space_id, "error": storable(reason), "age": TELL_AFTER_SECONDS}
        ids = conn.execute(_REFUSE_UNANSWERED, parameters).scalars().all()
        tell(conn, ids)
        refused += len(ids)
    return refused


# What the caller's side needs: many requests at a time, and the answers to many calls.


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
_TRACE_COLUMN = ", traceparent"
_TRACE_VALUE = ", :traceparent"


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
    attempts: Sequence[int] = (),
    traceparent: str | None = None,
) -> list[int]:
    """Insert a request for each part, in one statement; returns their ids in the order of the parts.

    Workers hear of them when the transaction commits. It returns no id if the space is gone, or if another one has its
    id now. ``urgency`` is 0 for a few short texts and 1 for larger requests. After ``timeout_s`` seconds nobody waits.
    ``attempts`` says for each part how many workers may have died of it already; by default none has. ``traceparent``
    is the span under which a worker answers.
    """
    is_new = has_columns(conn, "urgency")
    is_traced = traceparent is not None and has_columns(conn, "traceparent")
    columns = (_NEW_COLUMNS if is_new else "") + (_TRACE_COLUMN if is_traced else "")
    values = (_NEW_VALUES if is_new else "") + (_TRACE_VALUE if is_traced else "")
    # An INSERT of sorted rows numbers them in that order.
    insert = f"""
        WITH asked AS (
            INSERT INTO embed_requests (space_id, kind, texts, attempts{columns})
            SELECT
                s.id, :kind, (CAST(:texts AS text[]))[part.first : part.last],
                part.attempts{values}
            FROM spaces s
            CROSS JOIN unnest(CAST(:firsts AS int[]), CAST(:lasts AS int[]), CAST(:attempts AS int[]))
                AS part (first, last, attempts)
            WHERE s.id = :space AND s.fingerprint = :fingerprint
            ORDER BY part.first
            RETURNING id
        )
        SELECT id, pg_notify(:channel, '')
        FROM asked
    """
    firsts = list(accumulate((len(part) for part in parts), initial=1))
    parameters: dict[str, object] = {
        "channel": CHANNEL,
        "space": space_id,
        "fingerprint": fingerprint,
        "kind": kind,
        "texts": [text for part in parts for text in part],
        "firsts": firsts[:-1],
        "lasts": [first - 1 for first in firsts[1:]],
        "attempts": list(attempts) or [0] * len(parts),
    }
    if is_new:
        parameters |= {"urgency": urgency, "caller": caller, "timeout": timeout_s}
    if is_traced:
        parameters["traceparent"] = traceparent
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
