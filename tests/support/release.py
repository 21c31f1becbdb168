"""What one release sends to Postgres: recorded once, and replayed on every schema until the next release.

Old workers and producers run on a new schema for one release. CI has no old code (its checkout may be shallow).
Therefore the fixture keeps what the old code sent to Postgres: each statement with its parameters, each COPY with its
bytes, each COMMIT, and how many rows each of them returned. To record the next release, run this in a checkout of it:

    python -m tests.support.release tests/fixtures/release.json.gz
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Json, Jsonb

Event = dict[str, Any]
OWN = ("pg_catalog", "pg_type", "SHOW ", "SET client_min_messages")
"""Words in the statements that the drivers send by themselves when they connect."""


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Yield a list that gets everything that psycopg is asked to send within the block."""
    events: list[Event] = []
    numbers: dict[int, int] = {}
    execute, copy = psycopg.Cursor.execute, psycopg.Cursor.copy
    commit, rollback = psycopg.Connection.commit, psycopg.Connection.rollback

    def number(connection: object) -> int:
        return numbers.setdefault(id(connection), len(numbers))

    def _execute(self: Any, query: Any, params: Any = None, **more: Any) -> Any:
        result = execute(self, query, params, **more)
        text = query.decode() if isinstance(query, bytes) else query
        # A query that is not text is one of psycopg's own about types.
        if isinstance(text, str) and not any(name in text for name in OWN):
            events.append({"on": number(self.connection), "sql": text, "params": encode(params), "rows": self.rowcount})
        return result

    @contextmanager
    def _copy(self: Any, statement: Any, *args: Any, **more: Any) -> Iterator[Any]:
        with copy(self, statement, *args, **more) as opened:
            parts: list[bytes] = []
            write = opened.write
            opened.write = lambda data: (parts.append(bytes(data)), write(data))[1]
            yield opened
        events.append({"on": number(self.connection), "copy": statement, "data": encode(b"".join(parts)),
                       "rows": self.rowcount})  # fmt: skip

    def _commit(self: Any) -> None:
        commit(self)
        events.append({"on": number(self), "end": "commit"})

    def _rollback(self: Any) -> None:
        rollback(self)
        events.append({"on": number(self), "end": "rollback"})

    psycopg.Cursor.execute, psycopg.Cursor.copy = _execute, _copy  # type: ignore[assignment, method-assign]
    psycopg.Connection.commit, psycopg.Connection.rollback = _commit, _rollback  # type: ignore[method-assign]
    try:
        yield events
    finally:
        psycopg.Cursor.execute, psycopg.Cursor.copy = execute, copy  # type: ignore[method-assign]
        psycopg.Connection.commit, psycopg.Connection.rollback = commit, rollback  # type: ignore[method-assign]


def replay(events: list[Event], url: str) -> list[str]:
    """Send everything again and return what gave another number of rows than then. Raises what Postgres refuses."""
    connections: dict[int, psycopg.Connection[Any]] = {}
    different = []
    try:
        for at, event in enumerate(events):
            connection = connections.get(event["on"])
            if connection is None:
                connection = connections[event["on"]] = psycopg.connect(url)
            if event.get("end") == "commit":
                connection.commit()
            elif event.get("end") == "rollback":
                connection.rollback()
            else:
                rows, what = _say(connection, event)
                if rows != event["rows"]:
                    different.append(f"{at}: {rows} rows instead of {event['rows']}: {what[:200]}")
    finally:
        for connection in connections.values():
            connection.close()
    return different


def _say(connection: psycopg.Connection[Any], event: Event) -> tuple[int, str]:
    with connection.cursor() as cursor:
        if "copy" in event:
            with cursor.copy(event["copy"]) as copy:
                copy.write(decode(event["data"]))
            return cursor.rowcount, event["copy"]
        cursor.execute(event["sql"], decode(event["params"]))
        return cursor.rowcount, event["sql"]


def encode(value: Any) -> Any:
    """Return the value as JSON. A value that JSON cannot hold gets a tag."""
    match value:
        case dict():
            return {key: encode(item) for key, item in value.items()}
        case list() | tuple():
            return [encode(item) for item in value]
        case bytes() | memoryview():
            return {"$bytes": base64.b64encode(bytes(value)).decode()}
        case psycopg.Binary():
            return encode(value.obj)
        case Json() | Jsonb():
            return {"$json": value.obj}
        case datetime():
            return {"$time": value.isoformat()}
        case date():
            return {"$date": value.isoformat()}
        case timedelta():
            return {"$seconds": value.total_seconds()}
        case Decimal():
            return {"$decimal": str(value)}
        case str():
            return str(value)
        case None | bool() | int() | float():
            return value
    raise TypeError(f"a parameter of type {type(value).__name__}")


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, held),) = value.items()
        match tag:
            case "$bytes":
                return base64.b64decode(held)
            case "$json":
                return Jsonb(held)
            case "$time":
                return datetime.fromisoformat(held)
            case "$date":
                return date.fromisoformat(held)
            case "$seconds":
                return timedelta(seconds=held)
            case "$decimal":
                return Decimal(held)
    return {key: decode(item) for key, item in value.items()}


def read(file: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return recorded


def main(target: Path) -> None:
    """Do everything that a producer, a worker and a poller do, one after the other."""
    import tempfile

    from chunkmill import Client
    from chunkmill.broker import Broker
    from chunkmill.db.connect import create_db, migrate, migration_level
    from chunkmill.embedded import Stack
    from chunkmill.ledger.work import chunk_batches
    from chunkmill.poller.poller import Poller
    from chunkmill.settings import Settings
    from chunkmill_workers.local.context import WorkerContext
    from chunkmill_workers.local.engines import Engines
    from chunkmill_workers.local.pipeline import run_chunk_batch
    from chunkmill_workers.process.lease import LeaseKeeper

    home = Path(tempfile.mkdtemp(prefix="cm-"))
    home.chmod(0o711)  # root's servers run as another user
    stack = Stack(home, fsync=False)
    status = stack.up()
    try:
        migrate(status.database_url)
        settings = Settings.from_env(database_url=status.database_url, redis_url=status.redis_url, chunk_batch_size=2)
        engines = Engines(Settings.from_env(embedding_dtype="fp32"), "cpu")
        db = create_db(status.database_url, role="recorded")
        with db.connect() as conn:
            _, head = migration_level(conn)
        with recording() as events:
            client = Client(create_db(status.database_url, role="client"), Broker.connect(settings), settings)
            context = WorkerContext(settings, db, engines, LeaseKeeper(db, 300), name="recorded-worker")
            poller = Poller(create_db(status.database_url, role="poller"), Broker.connect(settings), settings)

            def run(*ids: int) -> None:
                for chunk_batch_id in ids:
                    run_chunk_batch(context, chunk_batch_id)

            def claim(chunk_batch_id: int, seconds: float = 300) -> chunk_batches.Lease:
                with db.begin() as conn:
                    lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner="other", lease_seconds=seconds)
                if lease is None:
                    raise RuntimeError(f"ChunkBatch {chunk_batch_id} is not due")
                return lease

            first = client.enqueue([(f"c{i}", f"text {i}") for i in range(4)], collection="docs", route="local")
            poller.round()
            run(1, 2)
            # One text is cached, one replaced, one long and two are new, in two windows: ChunkBatches 3, 4 and 6 wait.
            second = client.enqueue(
                [("c0", "text 0"), ("c1", "another text"), ("long", "word " * 400), ("d0", "new 0"), ("d1", "new 1")],
                collection="docs", idempotency_key="key", deadline=86_400, priority="high",
            )  # fmt: skip
            with db.begin() as conn:
                chunk_batches.renew_if_held(conn, [claim(3)], lease_seconds=300)
            with db.begin() as conn:
                chunk_batches.release_all(conn, "other")
            claim(3, 0.0)
            poller.round()  # takes the lease back
            lease = claim(4)
            with db.begin() as conn:
                chunk_batches.fail_if_held(conn, lease, code="no", error="it failed", retryable=False)
            run(3)
            client.retry(second.id)
            client.cancel(second.id)
            client.retry(second.id)
            run(4, 6)
            poller.round()
            cancelled = client.enqueue([("x", "left out")], collection="others", on_long="reject")
            client.cancel(cancelled.id)
            vector = client.vectors("docs", ["c0"])["c0"]
            for job_id in (first.id, second.id):
                client.job(job_id), client.attempts(job_id), client.failing(job_id), client.explain(job_id)
            client.search(vector, collection="docs", k=3)
            client.search(vector, collection="docs", k=3, metadata={"a": 1})
            client.jobs(), client.dead(), client.dead_codes(), client.usage(), client.lanes(), client.collections()
            client.estimate([("e", "text 0"), ("f", "unknown")])
            client.delete("docs", ["d1"])
            client.audit("docs")
            states = [str(job.state) for job in client.jobs()]
        client.close()
        if states != ["cancelled", "completed", "completed"]:
            raise RuntimeError(f"the flow went wrong: {states}")
    finally:
        stack.destroy()
    text = json.dumps({"release": head, "states": states, "events": events}, separators=(",", ":"))
    target.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(events)} events of release {head}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
