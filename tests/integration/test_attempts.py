"""What one attempt at a ChunkBatch leaves in the ledger, beside another job that embeds the same texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from chunkmill import Client, JobState
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.work import chunk_batches
from chunkmill.spaces import registry
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.pipeline import TaskResult, run_chunk_batch
from tests.integration.conftest import Runner

LONG = "many words in one long text " * 80  # past MiniLM's 256 tokens


def execute(db: sa.Engine, statement: str, **parameters: object) -> list[tuple[Any, ...]]:
    with db.begin() as conn:
        result = conn.execute(sa.text(statement), parameters)
        return [tuple(row) for row in result] if result.returns_rows else []


def hear_canary(context: WorkerContext) -> None:
    """As a worker does on its start, so that what a test then does to the engine meets its chunks alone."""
    with context.db.begin() as conn:
        space = registry.all_spaces(conn)[0]
    context.engine_for(space)


def test_what_another_job_truncated_meanwhile_is_counted(client: Client, runner: Runner) -> None:
    """Both are enqueued before either is embedded, so the second finds two of its texts embedded, one of them cut."""
    first = client.enqueue([("a", LONG), ("b", "short")], collection="first")
    second = client.enqueue([("c", LONG), ("d", "short"), ("e", "another")], collection="second")
    assert runner.run_due() == [TaskResult.COMPLETED, TaskResult.COMPLETED]
    assert [client.job(job.id).truncated for job in (first, second)] == [1, 1]
    assert [client.job(job.id).embedded for job in (first, second)] == [2, 3]


def test_what_was_embedded_twice_is_counted(
    client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the three texts of the second job, the first one writes two between the second's look and its write."""
    client.enqueue([("a", "one"), ("b", "two")], collection="first")
    client.enqueue([("c", "one"), ("d", "two"), ("e", "three")], collection="second")
    hear_canary(context)
    real_stream = Engine.stream

    def overtaken(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        monkeypatch.setattr(Engine, "stream", real_stream)
        assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
        yield from real_stream(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", overtaken)
    contents, recomputed = COUNTS.total(m.CONTENTS), COUNTS.total(m.RECOMPUTED)
    assert run_chunk_batch(context, 2) is TaskResult.COMPLETED
    assert COUNTS.total(m.CONTENTS) - contents == 3
    assert COUNTS.total(m.RECOMPUTED) - recomputed == 2
    booked = execute(db, "SELECT contents, recomputed FROM usage ORDER BY chunk_batch_id")
    assert booked == [(2, 0), (1, 2)]


def test_what_a_kill_could_cost_counts_what_is_on_the_device(
    client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.enqueue([("a", "one"), ("b", "two"), ("c", "three")], collection="docs")
    hear_canary(context)
    real_stream = Engine.stream

    def more_under_way(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        for result in real_stream(self, *args, **kwargs):
            yield dataclasses.replace(result, under_way=5)

    monkeypatch.setattr(Engine, "stream", more_under_way)
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    assert execute(db, "SELECT contents, at_risk FROM usage") == [(3, 3 + 5)]


@pytest.mark.parametrize(
    ("fault", "noted"),
    [
        ("ALTER TABLE contents RENAME COLUMN text TO gone", "UndefinedColumn: column c.text does not exist"),
        (
            "ALTER TABLE vectors_1 ADD CONSTRAINT never CHECK (false) NOT VALID",
            'CheckViolation: new row for relation "vectors_1" violates check constraint "never"',
        ),
    ],
    ids=["query", "copy"],
)
def test_an_error_in_the_ledger_is_one_line_of_what_postgres_said(
    client: Client, context: WorkerContext, db: sa.Engine, fault: str, noted: str
) -> None:
    """Neither the statement nor the row that it was about, whose hash and vector stand in Postgres' further lines."""
    client.enqueue([("a", "one")], collection="docs")
    hear_canary(context)
    execute(db, fault)
    assert run_chunk_batch(context, 1) is TaskResult.FAILED
    assert execute(db, "SELECT error FROM chunk_batches") == [(f"test-worker: {noted}",)]


@pytest.mark.parametrize("ends", ["leaves", "fails"])
def test_an_attempt_that_lost_its_chunk_batch_has_no_end_of_its_own(
    ends: str, client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker falls silent and is taken for dead. What it says of its end after that changes nothing."""
    client.enqueue([("a", "one"), ("b", "two")], collection="docs")
    hear_canary(context)

    def falls_silent(self: Engine, *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
        execute(db, "UPDATE chunk_batches SET lease_until = now() - interval '1 s'")
        with db.begin() as conn:
            assert deaths.take_back_expired(conn).available == 1
            assert chunk_batches.claim_if_due(conn, 1, owner="another", lease_seconds=60) is not None
        if ends == "fails":
            raise MemoryError("no room for it")
        yield from ()

    monkeypatch.setattr(Engine, "stream", falls_silent)
    monkeypatch.setattr(
        "chunkmill_workers.local.attempt.LocalAttempt.flush", lambda self: None
    )  # it has nothing to write
    run_chunk_batch(context, 1)
    assert execute(db, "SELECT outcome FROM usage WHERE attempt = 1") == [("died",)]
    assert execute(db, "SELECT state, attempt, lease_owner FROM chunk_batches") == [("running", 2, "another")]


def test_postgres_being_away_in_the_middle_costs_no_attempt(
    client: Client, context: WorkerContext, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the reference of the space's canary cannot be read: nothing that this worker could try again here."""
    job = client.enqueue([("a", "one")], collection="docs")
    real = WorkerContext.engine_for

    def away(self: WorkerContext, space: registry.Space) -> Any:
        monkeypatch.setattr(WorkerContext, "engine_for", real)
        raise sa.exc.OperationalError("SELECT", {}, psycopg.OperationalError("the connection is lost"))

    monkeypatch.setattr(WorkerContext, "engine_for", away)
    assert run_chunk_batch(context, 1) is TaskResult.RELEASED
    assert execute(db, "SELECT state, max_attempts - attempt, error FROM chunk_batches") == [("available", 5, None)]
    assert run_chunk_batch(context, 1) is TaskResult.COMPLETED
    assert client.job(job.id).state is JobState.COMPLETED


@pytest.mark.parametrize("first", ["truncate", "reject"])
def test_reject_takes_a_chunk_out_whose_text_was_replaced_by_a_long_one(
    client: Client, runner: Runner, first: str
) -> None:
    """The chunk belongs to the job that replaced its text, beside a chunk that the first job keeps."""
    runner.finish(client.enqueue([("a", "short"), ("b", "stays")], collection="docs", on_long=first))
    runner.finish(client.enqueue([("a", "short"), ("c", "unrelated")], collection="others", on_long="reject"))
    job = runner.finish(client.enqueue([("a", LONG)], collection="docs", on_long="reject"))
    assert (job.state, job.dead) == (JobState.COMPLETED, 1)
    assert [client.audit(name).chunks for name in ("docs", "others")] == [1, 2]
    assert client.audit("docs").complete
