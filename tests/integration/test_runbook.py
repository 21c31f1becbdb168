"""The SQL that the documents show finds what the page says it finds, in a database where much is wrong at a time."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.db.connect import create_db, raw
from chunkmill.embedded import StackStatus
from chunkmill.settings import Settings
from tests.conftest import client_for, fresh_settings
from tests.support.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sql\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUERIES = [
    pytest.param(query, id=f"{page.stem}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.stem != "collections"  # its views are read in test_collection_views.py
    for number, query in enumerate(query for block in BLOCK.findall(page.read_text()) for query in block.split(";\n"))
    if query.strip()
]

SLOT = "forgotten"
AHEAD, PAST = "in the time to come", "over, or long ago"
"""What becomes of an interval that is positive or not: the page reads its sign alone."""

ANSWERS: dict[str, list[dict[str, Any]]] = {
    "AS texts_left": [
        {"state": "available", "count": 2, "texts_left": 3, "due_in": AHEAD, "an_error": "unknown_model"},
        {"state": "running", "count": 1, "texts_left": 1, "lease_left": AHEAD, "an_owner": "host:1"},
    ],
    "max(attempt) AS attempts": [
        {"error_code": "unknown_model", "state": "available", "count": 2, "attempts": 3, "for_example": "no model x"},
    ],
    "outcome <> 'completed'": [
        {"worker": "host:1", "outcome": "died", "count": 2, "for_example": "silent past its lease"},
        {"worker": "host:2", "outcome": "failed", "count": 1, "for_example": "out of memory"},
    ],
    "FROM worker_reports": [
        {"name": "host:2", "silent": AHEAD, "held": 1, "contents": 0},
        {"name": "host:1", "silent": AHEAD, "held": 1, "contents": 40},
    ],
    "WHERE state = 'running' ORDER BY lease_until": [
        {"job_id": 43, "lease_left": PAST, "n_embedded": 0, "n_contents": 2},
        {"job_id": 42, "lease_left": AHEAD, "n_embedded": 1, "n_contents": 2},
    ],
    "interval '10 minutes'": [
        {"worker": "host:1", "attempts": 2, "died": 2, "lost": 0, "recomputed": 1},
        {"worker": "host:2", "attempts": 3, "died": 0, "lost": 1, "recomputed": 0},
    ],
    "AS at_the_provider": [
        {"id": 70, "state": "submitted", "batch_id": "batch-70", "lease_left": None, "at_the_provider": AHEAD},
        {"id": 71, "state": "creating", "batch_id": None, "lease_left": PAST, "at_the_provider": None},
    ],
    "WHERE creates > 1 OR resends > 0": [
        {"id": 72, "creates": 1, "resends": 0, "downloads": 0, "oddities": {"unknown": 1}},
        {"id": 71, "creates": 2, "resends": 0, "downloads": 0, "oddities": {}},
    ],
    "input_file_id, output_file_id": [
        {"id": 72, "state": "closed", "token": "token-72", "uploads": 1, "input_file_id": "file-72"},
        {"id": 71, "state": "creating", "token": "token-71", "uploads": 1, "input_file_id": "file-71"},
        {"id": 70, "state": "submitted", "token": "token-70", "uploads": 1, "input_file_id": "file-70"},
    ],
    "AS percent": [
        {"outcome": "died", "attempts": 2, "texts": 4, "recomputed": 1, "percent": 25.0},
        {"outcome": "failed", "attempts": 1, "texts": 0, "recomputed": 0, "percent": None},
        {"outcome": "completed", "attempts": 1, "texts": 3, "recomputed": 0, "percent": 0.0},
        {"outcome": None, "attempts": 1, "texts": 0, "recomputed": 0, "percent": None},
    ],
    "AS tokens_per_second": [
        {"worker": "host:2", "tokens": 100, "engine_seconds": 4, "tokens_per_second": 25},
        {"worker": "host:1", "tokens": 60, "engine_seconds": 4, "tokens_per_second": 15},
    ],
    "AS damaged_texts": [{"damaged_texts": 300}],  # those that make the table large have made-up hashes
    "FROM pg_class": [{"relname": "contents"}],
    "FROM pg_replication_slots": [{"slot_name": SLOT, "active": False}],
    "AS longest FROM pg_stat_activity": [
        {"application_name": "chunkmill-worker", "state": "idle in transaction", "count": 1},
        {"application_name": "chunkmill-waiting", "state": "active", "count": 1},
    ],
    "AS open_for": [{"application_name": "chunkmill-worker", "state": "idle in transaction", "open_for": AHEAD}],
    "pg_blocking_pids": [
        {"application_name": "chunkmill-worker", "waits_for": []},
        {"application_name": "chunkmill-waiting", "wait_event_type": "Lock", "age": AHEAD},
    ],
    "FROM pg_stat_database": [{"deadlocks": 0, "conflicts": 0}],
}
"""What the query with these words must find in the scene, beside other columns and, of Postgres itself, other rows."""


@pytest.fixture(scope="module")
def scene(stack: StackStatus) -> Iterator[sa.Engine]:
    """Two jobs, two workers, three ProviderBatches, and something wrong with most of them."""
    with fresh_settings(stack) as settings:
        db = create_db(settings.require_database_url(), role="test")
        try:
            fill(settings, db)
            with one_waits_for_another(settings, db):
                yield db
        finally:
            slots = f"FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
            execute(db, f"SELECT pg_drop_replication_slot(slot_name) {slots}")
            db.dispose()


def fill(settings: Settings, db: sa.Engine) -> None:
    small = settings.model_copy(update={"chunk_batch_size": 2})
    statements = f"""
        UPDATE chunk_batches SET state = 'running', attempt = 1, lease_owner = 'host:1', n_embedded = 1,
            lease_until = now() + interval '1 hour' WHERE id = 1;
        UPDATE chunk_batches SET attempt = id, error_code = 'unknown_model', error = 'no model x',
            not_before = now() + interval '1 hour' WHERE id IN (2, 3);
        UPDATE chunk_batches SET state = 'running', attempt = 1, lease_owner = 'host:2', error_code = 'other',
            lease_until = now() - interval '1 hour' WHERE id = 4;
        INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, outcome, evidence, contents,
                           recomputed, tokens, engine_seconds, created_at, ended_at) VALUES
            (1, 1, 42, 1, 'local', 'host:1', 'died', 'silent past its lease', 2, 1, 30, 2, now(), now()),
            (2, 1, 42, 1, 'local', 'host:1', 'died', 'silent past its lease', 2, 0, 30, 2, now(), now()),
            (2, 2, 42, 1, 'local', 'host:2', 'failed', 'out of memory', 0, 0, 0, 0, now(), now()),
            (3, 1, 42, 1, 'local', 'host:2', 'completed', NULL, 3, 0, 100, 4, now(), now()),
            (3, 2, 42, 1, 'local', 'host:2', NULL, NULL, 0, 0, 0, 0, now() - interval '20 minutes', NULL),
            (4, 1, 43, 1, 'local', 'host:2', 'died', 'long ago', 9, 9, 9, 9, now() - interval '2 days',
             now() - interval '2 hours');
        INSERT INTO worker_reports (name, kind, label, started_at, seen_at, window_seconds, contents, tokens,
                                    padded_tokens, engine_seconds, held) VALUES
            ('host:1', 'local', 'cpu-1@host', now(), now() - interval '1 second', 60, 40, 800, 900, 9, 1),
            ('host:2', 'local', 'cpu-2@host', now(), now() - interval '1 hour', 60, 0, 0, 0, 0, 1);
        INSERT INTO provider_batches (id, space_id, state, token, batch_id, input_file_id, uploads, creates, resends,
                                      oddities, submitted_at, lease_until, closed_at) OVERRIDING SYSTEM VALUE VALUES
            (70, 1, 'submitted', 'token-70', 'batch-70', 'file-70', 1, 1, 0, '{{}}', now() - interval '1 hour', NULL,
             NULL),
            (71, 1, 'creating', 'token-71', NULL, 'file-71', 1, 2, 0, '{{}}', NULL, now() - interval '1 hour', NULL),
            (72, 1, 'closed', 'token-72', 'batch-72', 'file-72', 1, 1, 0, '{{"unknown": 1}}', now(), NULL, now());
        INSERT INTO contents (content_hash, text)
            SELECT sha256(n::text::bytea),
                   (SELECT string_agg(md5((n * 1000 + i)::text), '') FROM generate_series(1, 999) i)
            FROM generate_series(1, 300) n;
        SELECT pg_create_physical_replication_slot('{SLOT}', true);
    """
    with client_for(small) as client:
        execute(db, "ALTER SEQUENCE jobs_id_seq RESTART WITH 42")
        client.enqueue([(f"a{i}", f"the text {i}") for i in range(5)], collection="docs")
        client.enqueue([(f"b{i}", f"other text {i}") for i in range(2)], collection="others")
    execute(db, statements)


def execute(db: sa.Engine, statement: str) -> None:
    with db.begin() as conn:
        raw(conn).execute(statement.encode())  # which takes several at a time


@contextmanager
def one_waits_for_another(settings: Settings, db: sa.Engine) -> Iterator[None]:
    """A worker that keeps a transaction open, and a connection that waits for it."""
    holder, waiter = (create_db(settings.require_database_url(), role=role) for role in ("worker", "waiting"))
    lock = sa.text("SELECT pg_advisory_xact_lock(4711)")

    def wait() -> None:
        with waiter.begin() as conn:
            conn.execute(lock)

    def waits() -> bool:
        with db.begin() as conn:
            return bool(
                conn.execute(
                    sa.text(
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chunkmill-waiting' "
                        "AND wait_event_type = 'Lock' AND datname = current_database()"
                    )
                ).scalar_one()
            )

    thread = threading.Thread(target=wait, daemon=True)
    try:
        with holder.begin() as conn:
            conn.execute(lock)
            thread.start()
            until(waits)
            yield
    finally:
        thread.join(PATIENCE)
        holder.dispose()
        waiter.dispose()


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_of_the_documents_finds_what_is_wrong_and_changes_nothing(query: str, scene: sa.Engine) -> None:
    (answer,) = [rows for words, rows in ANSWERS.items() if words in query]
    with scene.connect() as conn:
        conn.execute(sa.text("SET TRANSACTION READ ONLY"))
        rows = [{name: plain(value) for name, value in row._mapping.items()} for row in conn.execute(sa.text(query))]
    of_postgres_itself = "FROM pg_" in query
    if not of_postgres_itself:
        assert len(rows) == len(answer)
    if "ORDER BY" not in query or "activity" in query:  # in any order
        rows = [next((row for row in rows if wanted.items() <= row.items()), {}) for wanted in answer]
    for wanted, row in zip(answer, rows, strict=not of_postgres_itself):
        assert {name: row.get(name, "is not there") for name in wanted} == wanted


def plain(value: object) -> object:
    if isinstance(value, timedelta):
        return AHEAD if value > timedelta(0) else PAST
    return float(value) if isinstance(value, Decimal) else value


def test_each_query_is_known_here() -> None:
    queries = [str(param.values[0]) for param in QUERIES]
    assert len(queries) == len(ANSWERS)
    assert all(sum(words in query for words in ANSWERS) == 1 for query in queries)
