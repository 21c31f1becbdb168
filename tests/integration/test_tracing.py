"""Where a trace context is kept, and who stands under whom: on real tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.errors import LeaseLost
from chunkmill.ledger.jobs import traces
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.telemetry import tracing
from chunkmill_workers.process.work_context import step_of
from chunkmill_workers.provider.flow import StepDelayed

pytest.importorskip("opentelemetry.sdk", reason="the extra `tracing` is not installed")

from opentelemetry.sdk.trace import ReadableSpan


@dataclass
class Worker:
    """As much of a worker as :func:`step_of` wants."""

    db: sa.Engine
    name: str = "host:1"

    def transact(self, work: Callable[[sa.Connection], Sequence[str]], what: str) -> Sequence[str]:
        with self.db.begin() as conn:
            return work(conn)


def in_flight(db: sa.Engine, provider_batch: int, *jobs: int) -> Step:
    """A content of each job at the provider."""
    with db.begin() as conn:
        for job in jobs:
            conn.execute(
                sa.text(
                    "INSERT INTO provider_inputs (space_id, content_hash, provider_batch_id, chunk_batch_id, attempt, "
                    "job_id, n_tokens, sent_tokens, truncated) VALUES (1, :hash, :batch, 1, 1, :job, 1, 1, false)"
                ),
                {"hash": f"{provider_batch} {job}".encode(), "batch": provider_batch, "job": job},
            )
    return cast(Step, SimpleNamespace(id=provider_batch, attempt=1, space_id=1, state="uploaded"))


def enqueue(client: Client) -> int:
    return client.enqueue([("a", "a text of the house")], collection="docs").id


def test_a_step_stands_under_its_one_job_and_is_linked_to_each_of_several(
    client: Client, db: sa.Engine, spans: Callable[[], list[ReadableSpan]]
) -> None:
    jobs = [enqueue(client) for _ in range(2)]
    contexts = {span.context.span_id: span.context for span in spans() if span.name == "chunkmill.enqueue"}
    assert len({context.trace_id for context in contexts.values()}) == 2
    for step in (in_flight(db, 1, jobs[0]), in_flight(db, 2, *jobs), in_flight(db, 3)):
        with step_of(Worker(db), step, expected=(StepDelayed,)):
            pass
    one, several, none = [span for span in spans() if span.name == "chunkmill.provider_batch.uploaded"]
    assert one.parent is not None
    assert one.parent.trace_id == contexts[one.parent.span_id].trace_id
    assert several.parent is none.parent is None
    assert {link.context.span_id for link in several.links} == set(contexts)
    assert dict(one.attributes or {}) == {
        "chunkmill.provider_batch": 1, "chunkmill.attempt": 1, "chunkmill.space": 1
    }  # fmt: skip


def test_what_only_waits_did_not_fail(db: sa.Engine, spans: Callable[[], list[ReadableSpan]]) -> None:
    step = in_flight(db, 1)
    for error in (StepDelayed(1.0), LeaseLost("ChunkBatch 1: ZEBRAFISH")):
        with pytest.raises(type(error)), step_of(Worker(db), step, expected=(StepDelayed,)):
            raise error
    waited, lost = [span for span in spans() if span.name.startswith("chunkmill.provider_batch")]
    assert waited.status.is_unset
    assert (lost.status.is_ok, lost.status.description) == (False, "LeaseLost")
    assert "ZEBRAFISH" not in lost.to_json()


def test_the_first_context_of_a_job_stays(client: Client, db: sa.Engine) -> None:
    job = enqueue(client)
    with db.begin() as conn:
        assert traces.of_job(conn, job) == []  # nobody traced
        traces.keep(conn, job, None)
        traces.keep(conn, job, "00-first")
        traces.keep(conn, job, "00-second")
        assert traces.of_job(conn, job) == ["00-first"]


def test_the_schema_of_the_last_release_knows_no_traces(
    client: Client, db: sa.Engine, spans: Callable[[], list[ReadableSpan]]
) -> None:
    with db.begin() as conn:
        conn.execute(sa.text("DROP TABLE job_traces"))
    job = enqueue(client)
    with step_of(Worker(db), in_flight(db, 1, job), expected=()):
        pass
    (step,) = [span for span in spans() if span.name.startswith("chunkmill.provider_batch")]
    assert step.parent is None


def test_a_span_needs_one_above_it(spans: Callable[[], list[Any]]) -> None:
    with tracing.span("claim"):
        pass
    with tracing.root("above"), tracing.span("below"):
        pass
    assert [span.name for span in spans()] == ["below", "above"]
