"""Promise 9 on the paid routes: the provider's errors contain the key and texts, and nothing of ours shows them."""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.broker import Broker, make_celery
from chunkmill.db.connect import create_db
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.openai_server import OpenAIServer
from tests.support.waiting import PATIENCE, until

KEY = "sk-proj-QUAGGAKEY-0123456789abcdefghijklmnopqrstuvwxyz"
WORD = "ZEBRAFISH"
"""In every text and in the query."""
PROVIDERS_WORDS = ("error", "reason", "message", "stop_reason", "pause_reason")
"""Columns in which the ledger keeps a provider's message, redacted: why a chunk is dead is of use to its owner."""
BAD = f"{WORD} refused because of what it says about the matters of the house"


def texts(route: str) -> list[tuple[str, str]]:
    made = [(f"{route}-{i}", f"{WORD} {i} on {route}, with some more words to be of a usual length") for i in range(30)]
    return [*made, (f"{route}-bad", f"{BAD} {route}")]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(key=KEY, fast_tokens=True) as running:
        yield running


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    named = settings.model_copy(update={"embedding_model": "text-embedding-3-small", "embedding_dimensions": 8})
    with Client(create_db(settings.require_database_url(), role="client"), Broker.connect(named), named) as made:
        yield made


def misbehave(server: OpenAIServer) -> None:
    """Make every step of both routes fail, with the key and texts in the errors."""
    said = f"Invalid input '{BAD} batched' for the key {KEY}: {BAD}, which is {WORD}."
    for endpoint in ("files.create", "embeddings.create"):
        server.misbehave("unauthorized", where={"endpoint": endpoint})
        server.misbehave("cut", where={"endpoint": endpoint})
    for endpoint in ("files.create", "batches.create", "batches.retrieve", "files.content", "embeddings.create"):
        server.misbehave("http_error", where={"endpoint": endpoint}, message=said)
        server.misbehave("hang", where={"endpoint": endpoint}, seconds=3.0)
    for endpoint in ("batches.create", "embeddings.create"):
        server.misbehave("http_error", where={"endpoint": endpoint}, status=400, message=said)
    server.misbehave("fail_validation", message=said, code="invalid_request")
    server.misbehave("line_failures", times=None, marker=BAD, message=said)
    server.misbehave("truncated")


def hurry(db: sa.Engine) -> None:
    """Make everything due now that waits after a failure; the last waits would take minutes."""
    with db.begin() as conn:
        for table in ("provider_batches", "chunk_batches"):
            conn.exec_driver_sql(f"UPDATE {table} SET not_before = now() WHERE not_before > now()")
        conn.exec_driver_sql("UPDATE provider_lanes SET paused_until = NULL")


def rows_of_all_tables(db: sa.Engine, *, but: Sequence[str] = ()) -> str:
    """Return all rows as a dump has them, without the one column where texts belong and without the columns ``but``."""
    rows = []
    with db.begin() as conn:
        tables = sa.inspect(conn).get_table_names()
        for table in tables:
            without = " - 'text'" if table == "contents" else "".join(f" - '{column}'" for column in but)
            rows += conn.execute(sa.text(f"SELECT '{table} ' || (to_jsonb(t){without})::text FROM {table} t")).scalars()
    assert {"contents", "charges", "provider_batches", "provider_lanes", "dead_chunks", "embed_requests"} <= set(tables)
    assert any(row.startswith("contents ") for row in rows)
    return "\n".join(rows)


def readable(everything: str) -> str:
    """Return the data followed by what it holds in base64 (kombu's bodies, vectors) and in hex (bytea), decoded."""
    in_base64 = re.findall(r"[A-Za-z0-9+/]{16,}={0,2}", everything)
    in_hex = re.findall(r"\\\\?x([0-9a-f]{8,})", everything)
    decoded = [base64.b64decode(body[: len(body) // 4 * 4]) for body in in_base64]
    decoded += [bytes.fromhex(body[: len(body) // 2 * 2]) for body in in_hex]
    return "\n".join([everything, *(content.decode(errors="replace") for content in decoded)])


class Listener(threading.Thread):
    """Receives what Flower receives: every event of every worker."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.app = make_celery(settings)
        self.events: list[dict[str, Any]] = []
        self._stop_listening = threading.Event()

    def run(self) -> None:
        with self.app.connection_for_read() as connection:
            receiver = self.app.events.Receiver(connection, handlers={"*": self.events.append})
            while not self._stop_listening.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.5, wakeup=False)
                except TimeoutError:
                    continue

    def stop(self) -> None:
        self._stop_listening.set()
        self.join(PATIENCE)


def test_key_and_texts_are_nowhere(
    processes: Processes, client: Client, settings: Settings, db: sa.Engine, server: OpenAIServer
) -> None:
    misbehave(server)
    listener = Listener(settings)
    listener.start()
    env = {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": server.url,
        "OPENAI_GATHER_SECONDS": "0",
        "OPENAI_POLL_SECONDS": "0.3",
        "OPENAI_ADOPT_SECONDS": "0.3",
        "OPENAI_TIMEOUT_SECONDS": "1",
        "OPENAI_REQUEST_INPUTS": "8",
        "OPENAI_LOG": "debug",
        "LOG_LEVEL": "debug",
        "EMBEDDING_MODEL": "text-embedding-3-small",
        "EMBEDDING_DIMENSIONS": "8",
    }
    worker = processes.start(
        "celery", "-A", "chunkmill_workers", "worker", "-Q", "openai", "-E", "--loglevel=DEBUG", **env
    )
    without_key = {name: value for name, value in env.items() if name != "OPENAI_API_KEY"}
    poller = processes.start("chunkmill.cli", "poller", **without_key)
    worker.wait_for("ready.")
    seen: list[str] = []
    with redis.Redis.from_url(settings.require_redis_url()) as store, store.monitor() as monitor:
        jobs = [
            client.enqueue(texts("batched"), collection="batched", route="openai"),
            client.enqueue(texts("plain"), collection="plain", route="openai-sync"),
        ]

        def ended() -> bool:
            hurry(db)
            for lane in client.lanes():
                if lane.stopped_at:
                    client.resume_lane(lane.route)
            return all(client.job(job.id).state.is_final for job in jobs)

        until(ended, worker.output)
        client.search(f"{WORD} 3", collection="batched", timeout=PATIENCE)
        until(lambda: (hurry(db), not open_batches(db))[1], worker.output)
        asked = listener.app.control.inspect(destination=[f"openai@{socket.gethostname()}"], timeout=PATIENCE)
        shown = [asked.conf(with_defaults=True), asked.stats(), asked.active()]
        store.echo("the end")
        for command in monitor.listen():
            seen.append(str(command["command"]))
            if "the end" in command["command"]:
                break
        seen += [(store.dump(key) or b"").decode("latin-1") for key in store.scan_iter()]
    listener.stop()
    jobs = [client.job(job.id) for job in jobs]
    assert worker.terminate() == 0
    # The server misbehaved in every way, and yet all work was done, except for the one text that it refused.
    assert {"unauthorized", "http_error", "hang", "cut", "fail_validation", "line_failures"} <= struck(server)
    assert [(job.state, job.embedded) for job in jobs] == [(JobState.FAILED, 30), (JobState.COMPLETED, 31)]
    assert all(shown)
    assert {event["type"] for event in listener.events} >= {"task-received", "task-succeeded", "worker-heartbeat"}
    places = {
        "the worker's log": worker.output(),
        "the poller's log": poller.output(),
        "Redis": "\n".join(seen),
        "Celery's events": str(listener.events),
        "what Flower asks for": str(shown),
        "the ledger, but for what the provider said": rows_of_all_tables(db, but=PROVIDERS_WORDS),
    }
    with_its_words = {"the ledger": rows_of_all_tables(db), "the jobs": str(jobs)}
    assert "workers.advance_provider_batch" in readable(places["Redis"])
    assert '"level": "debug"' in places["the worker's log"]
    assert "answered 401" in places["the worker's log"]
    assert leaks(places, KEY, "QUAGGAKEY", WORD, "matters of the house") == []
    assert leaks(with_its_words, KEY, "QUAGGAKEY", f"{BAD} batched") == []


def leaks(places: Mapping[str, str], *secrets: str) -> list[str]:
    """Return the places that contain what must not be there."""
    return [
        f"{secret} in {place}: {line[:2000]}"
        for place, everything in places.items()
        for line in readable(everything).splitlines()
        for secret in secrets
        if secret in line
    ]


def open_batches(db: sa.Engine) -> int:
    with db.begin() as conn:
        return int(conn.execute(sa.text("SELECT count(*) FROM provider_batches WHERE state <> 'closed'")).scalar_one())


def struck(server: OpenAIServer) -> set[str]:
    return {misbehaviour["kind"] for misbehaviour in server.state()["misbehaviours"] if misbehaviour["fired"]}
