"""The outbox: jobs that a producer wrote in a transaction of its own, until they are delivered.

The statements that the producer's connection runs name the schema, because that connection has its own search path. The
statements of our own connections do not name it. On the schema of the last release there is no outbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from chunkmill.db.locks import KEY_LOCK
from chunkmill.domain.chunks import PreparedChunk
from chunkmill.domain.results import Job
from chunkmill.domain.routing import Choice
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.errors import InvalidChunk, NotFound
from chunkmill.spaces import registry

OUTBOX_CHANNEL = "chunkmill_outbox"
"""The channel on which Postgres notifies of the number of a job once the producer's transaction is committed."""

LATE_SECONDS = 10.0
"""If a job has been in the outbox for this long, no poller seems to deliver."""

WAITS = (
    "The job was enqueued within a transaction and is not delivered yet, which a poller with the rights of a producer "
    "does: if one is connected, its log says why it does not"
)


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A job in the outbox: what its producer asked for."""

    job_id: int
    collection: str
    spec: SpaceSpec
    storage: str
    route: Route
    choice: Choice
    deadline: datetime | None
    priority: Priority
    on_long: OnLong
    idempotency_key: str | None
    may_cost: bool
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class KeyedEntry:
    """An entry of the outbox that has an idempotency key already."""

    job_id: int
    collection: str
    fingerprint: str
    on_long: OnLong
    digest: bytes | None


# --- in the producer's transaction -----------------------------------------------------------------------------------


class Statements:
    """What the producer's connection runs, for the schema of one installation."""

    def __init__(self, schema: str) -> None:
        quoted = '"' + schema.replace('"', '""').replace(":", r"\:") + '"'
        self.lock_key = """
            SELECT pg_catalog.pg_advisory_xact_lock(CAST(:lock AS integer), pg_catalog.hashtext(CAST(:key AS text)))
        """
        self.entry_of_key = f"""
            SELECT job_id, collection, fingerprint, on_long, digest
            FROM {quoted}.outbox_jobs
            WHERE idempotency_key = CAST(:key AS text)
        """
        self.add_entry = f"""
            INSERT INTO {quoted}.outbox_jobs (job_id, collection, fingerprint, on_long, idempotency_key, request)
            VALUES (
                CAST(:job_id AS bigint), CAST(:collection AS text), CAST(:fingerprint AS text), CAST(:on_long AS text),
                CAST(:key AS text), CAST(CAST(:request AS text) AS jsonb)
            )
        """
        self.add_page = f"""
            INSERT INTO {quoted}.outbox_pages (job_id, number, chunks)
            VALUES (CAST(:job_id AS bigint), CAST(:number AS integer), CAST(CAST(:chunks AS text) AS json))
        """
        self.close_entry = f"""
            UPDATE {quoted}.outbox_jobs
            SET n_chunks = CAST(:n_chunks AS bigint), digest = CAST(:digest AS bytea)
            WHERE job_id = CAST(:job_id AS bigint)
        """
        self.job = f"""
            SELECT job_id, collection, fingerprint, request -> 'spec' ->> 'model', request ->> 'route',
                   request ->> 'priority', idempotency_key, n_chunks, created_at
            FROM {quoted}.outbox_jobs
            WHERE job_id = CAST(:job_id AS bigint)
        """
        self.tell = """
            SELECT pg_catalog.pg_notify(CAST(:channel AS text), CAST(:payload AS text))
        """


def entry_parameters(entry: OutboxEntry) -> dict[str, object]:
    """The parameters of ``add_entry``."""
    request = {
        "spec": asdict(entry.spec),
        "storage": entry.storage,
        "route": entry.route,
        "lane": entry.choice.route,
        "because": entry.choice.because,
        "instead_of": entry.choice.instead_of,
        "deadline": None if entry.deadline is None else entry.deadline.isoformat(),
        "priority": entry.priority,
        "may_cost": entry.may_cost,
        "traceparent": entry.traceparent,
    }
    return {
        "job_id": entry.job_id,
        "collection": entry.collection,
        "fingerprint": entry.spec.fingerprint,
        "on_long": str(entry.on_long.value),
        "key": entry.idempotency_key,
        "request": json.dumps(request),
    }


def page_of(items: Sequence[PreparedChunk | InvalidChunk]) -> str:
    """The JSON of some chunks, and of those that were refused."""
    rows = [
        f"[{json.dumps(item.id, ensure_ascii=False)}, {json.dumps(item.text.decode(), ensure_ascii=False)}, "
        f"{item.metadata}]"
        if isinstance(item, PreparedChunk)
        else json.dumps([item.problem, item.chunk_id, item.position, item.reason])
        for item in items
    ]
    return f"[{', '.join(rows)}]"


def items_of(page: Sequence[Sequence[Any]]) -> list[object]:
    """The items of ``enqueue`` in a page: triples, and an :class:`InvalidChunk` for a chunk that was refused."""
    return [
        tuple(row) if len(row) == 3 else InvalidChunk(row[0], chunk_id=row[1], position=row[2], reason=row[3])
        for row in page
    ]


# --- in a transaction of ours ----------------------------------------------------------------------------------------


def is_kept(conn: sa.Connection) -> bool:
    """False on the schema of the last release, on which this code runs too during an upgrade."""
    query = "SELECT to_regclass(quote_ident(current_schema()) || '.outbox_jobs') IS NOT NULL"
    return bool(conn.execute(sa.text(query)).scalar_one())


def may_deliver(conn: sa.Connection) -> bool:
    """Whether this role may read the chunks of the outbox and enqueue them."""
    query = """
        SELECT has_table_privilege('outbox_pages', 'SELECT') AND has_table_privilege('outbox_jobs', 'DELETE')
           AND has_table_privilege('jobs', 'INSERT') AND has_table_privilege('contents', 'INSERT')
           AND has_table_privilege('chunks', 'INSERT')
    """
    return bool(conn.execute(sa.text(query)).scalar_one())


def new_job_id(conn: sa.Connection) -> int:
    """The number of a job that is still to be opened."""
    query = "SELECT nextval(pg_get_serial_sequence('jobs', 'id'))"
    return int(conn.execute(sa.text(query)).scalar_one())


def waiting(conn: sa.Connection, *, after: int = 0, limit: int = 100) -> list[int]:
    """The jobs that are to be delivered and have a larger number than ``after``, the oldest numbers first."""
    query = "SELECT job_id FROM outbox_jobs WHERE job_id > :after ORDER BY job_id LIMIT :limit"
    return list(conn.execute(sa.text(query), {"after": after, "limit": limit}).scalars())


def being_delivered(conn: sa.Connection) -> list[int]:
    """The jobs in the outbox that were opened and have not all of their chunks yet."""
    query = """
        SELECT o.job_id
        FROM outbox_jobs o
        JOIN jobs j ON j.id = o.job_id
        WHERE j.state = :enqueueing
    """
    return list(conn.execute(sa.text(query), {"enqueueing": JobState.ENQUEUEING}).scalars())


def read(conn: sa.Connection, job_id: int) -> OutboxEntry | None:
    """An entry; None if it was delivered. Raises :class:`NewerSpace` if only a newer release can read its space."""
    query = """
        SELECT 0 AS id, fingerprint, request -> 'spec' AS spec, request ->> 'storage' AS storage,
               collection, on_long, idempotency_key, request
        FROM outbox_jobs
        WHERE job_id = :id
    """
    row = conn.execute(sa.text(query), {"id": job_id}).one_or_none()
    if row is None:
        return None
    request = row.request
    instead_of, deadline = request["instead_of"], request["deadline"]
    return OutboxEntry(
        job_id=job_id,
        collection=row.collection,
        spec=registry.from_row(row).spec,
        storage=row.storage,
        route=Route(request["route"]),
        choice=Choice(Route(request["lane"]), request["because"], None if instead_of is None else Route(instead_of)),
        deadline=None if deadline is None else datetime.fromisoformat(deadline),
        priority=Priority(request["priority"]),
        on_long=OnLong(row.on_long),
        idempotency_key=row.idempotency_key,
        may_cost=request["may_cost"],
        traceparent=request["traceparent"],
    )


def is_late(conn: sa.Connection, job_id: int) -> bool:
    """Whether a job has been in the outbox for longer than any poller that delivers would leave it there."""
    query = """
        SELECT EXISTS (
            SELECT FROM outbox_jobs
            WHERE job_id = :id AND created_at < clock_timestamp() - make_interval(secs => :late))
    """
    return bool(conn.execute(sa.text(query), {"id": job_id, "late": LATE_SECONDS}).scalar_one())


def page(conn: sa.Connection, job_id: int, number: int) -> list[object] | None:
    """The items of a page; None after the last one."""
    query = "SELECT chunks FROM outbox_pages WHERE job_id = :id AND number = :number"
    rows = conn.execute(sa.text(query), {"id": job_id, "number": number}).scalar_one_or_none()
    return None if rows is None else items_of(rows)


def hold(conn: sa.Connection, job_id: int) -> None:
    """Keep a job in the outbox until the end of this transaction. Raises :class:`NotFound` if it is not there."""
    query = "SELECT FROM outbox_jobs WHERE job_id = :id FOR UPDATE"
    if conn.execute(sa.text(query), {"id": job_id}).one_or_none() is None:
        raise NotFound(f"job {job_id} is not in the outbox. Another process has delivered it.")


def delete(conn: sa.Connection, job_id: int) -> bool:
    """Take a job out of the outbox, with its chunks. False if another process has done it."""
    return conn.execute(sa.text("DELETE FROM outbox_jobs WHERE job_id = :id"), {"id": job_id}).rowcount == 1


def lock_key(conn: sa.Connection, idempotency_key: str) -> None:
    """Wait for other transactions that enqueue with this key. Later ones wait for this transaction."""
    lock = "SELECT pg_advisory_xact_lock(:lock, hashtext(:key))"
    conn.execute(sa.text(lock), {"lock": KEY_LOCK, "key": idempotency_key})


def of_key(conn: sa.Connection, idempotency_key: str) -> KeyedEntry | None:
    """The committed entry with this key, if there is one."""
    query = """
        SELECT job_id, collection, fingerprint, on_long, digest
        FROM outbox_jobs
        WHERE idempotency_key = :key
    """
    row = conn.execute(sa.text(query), {"key": idempotency_key}).one_or_none()
    return None if row is None else held(row)


def held(row: Sequence[Any]) -> KeyedEntry:
    """An entry, from the columns of ``entry_of_key``."""
    return KeyedEntry(row[0], row[1], row[2], OnLong(row[3]), None if row[4] is None else bytes(row[4]))


def digest_of(conn: sa.Connection, job_id: int) -> bytes | None:
    """The digest of the chunks of an entry that has a key."""
    query = "SELECT digest FROM outbox_jobs WHERE job_id = :id"
    digest: bytes | None = conn.execute(sa.text(query), {"id": job_id}).scalar_one_or_none()
    return digest


_JOB = sa.text("""
SELECT o.job_id, coalesce(aliased.name, o.collection), o.fingerprint, o.request -> 'spec' ->> 'model',
       o.request ->> 'route', o.request ->> 'priority', o.idempotency_key, o.n_chunks, o.created_at
FROM outbox_jobs o
LEFT JOIN collection_aliases a ON a.name = o.collection
LEFT JOIN collections aliased ON aliased.id = a.collection_id
WHERE o.job_id = :job_id
""")


def job(conn: sa.Connection, job_id: int) -> Job | None:
    """The job of a committed entry as it is now: its chunks are still to be enqueued."""
    row = conn.execute(_JOB, {"job_id": job_id}).one_or_none()
    return None if row is None else as_job(row)


def job_of_key(conn: sa.Connection, idempotency_key: str) -> Job | None:
    """The job of the committed entry with this key; None if there is none."""
    entry = of_key(conn, idempotency_key)
    return None if entry is None else job(conn, entry.job_id)


# If only some collections are asked for, only entries of these are returned. The collection of an entry may not exist
# yet, and an entry may name it by an alias.
_LISTED = sa.text("""
SELECT o.job_id, coalesce(aliased.name, o.collection), o.fingerprint, o.request -> 'spec' ->> 'model',
       o.request ->> 'route', o.request ->> 'priority', o.idempotency_key, o.n_chunks, o.created_at
FROM outbox_jobs o
LEFT JOIN collection_aliases a ON a.name = o.collection
LEFT JOIN collections aliased ON aliased.id = a.collection_id
WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = o.job_id)
  AND (CAST(:before AS bigint) IS NULL OR o.job_id < CAST(:before AS bigint))
  AND (
      CAST(:collections AS bigint[]) IS NULL
      OR coalesce(aliased.name, o.collection) IN (
          SELECT c.name FROM collections c WHERE c.id = ANY(CAST(:collections AS bigint[]))
      )
  )
ORDER BY o.job_id DESC
LIMIT :limit
""")


def listed(
    conn: sa.Connection, *, limit: int, before: int | None = None, collections: Sequence[int] | None = None
) -> list[Job]:
    """The newest ``limit`` jobs that are not opened: with a smaller id than ``before``, and of these collections only,
    if they are given.
    """
    parameters = {
        "limit": limit,
        "before": before,
        "collections": None if collections is None else list(collections),
    }
    return [as_job(row) for row in conn.execute(_LISTED, parameters)]


def count(conn: sa.Connection) -> int:
    """How many jobs are not opened."""
    query = "SELECT count(*) FROM outbox_jobs o WHERE NOT EXISTS (SELECT FROM jobs j WHERE j.id = o.job_id)"
    return int(conn.execute(sa.text(query)).scalar_one())


def as_job(row: Sequence[Any]) -> Job:
    """The job that is still to be delivered, from the columns of ``Statements.job``."""
    job_id, collection, fingerprint, model, route, priority, idempotency_key, n_chunks, created_at = row
    return Job(
        id=job_id,
        state=JobState.ENQUEUEING,
        collection=collection,
        space=fingerprint,
        model=model,
        route=Route(route),
        priority=Priority(priority),
        idempotency_key=idempotency_key,
        chunks=n_chunks,
        contents=0,
        cached=0,
        embedded=0,
        remaining=0,
        dead=0,
        truncated=0,
        tokens=0,
        engine_seconds=0.0,
        created_at=created_at,
        finished_at=None,
        error=None,
    )
