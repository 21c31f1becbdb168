"""Says in log lines and in the job's trace what a task thread is working on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from chunkmill.ledger.jobs import traces
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.telemetry import tracing
from chunkmill.telemetry.logging import bound
from chunkmill_workers.process.context import QueueContext


@contextmanager
def attempt_at(context: QueueContext, lease: Lease, *, rung_ns: int) -> Iterator[None]:
    """Log lines carry job, ChunkBatch and attempt; the span is under the job's enqueue and begins with the bell."""
    fields = {
        "job": lease.job_id,
        "chunk_batch": lease.chunk_batch_id,
        "attempt": lease.attempt,
        "space": lease.space_id,
    }
    with bound(**fields, worker=context.name):
        parents = _parents(context, lambda conn: traces.of_job(conn, lease.job_id))
        with tracing.root("chunkmill.chunk_batch", fields, kind="CONSUMER", parents=parents, began_ns=rung_ns):
            # Only the claim told which job's work this is, so its span is added afterwards.
            with tracing.span("claim", began_ns=rung_ns):
                pass
            yield


@contextmanager
def step_of(context: QueueContext, step: Step, *, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """The span of a ProviderBatch's step. It belongs to its job, or is linked to each job if there are several."""
    parents = _parents(context, lambda conn: traces.of_provider_batch(conn, step.id))
    name = f"chunkmill.provider_batch.{step.state}"
    with tracing.root(name, ids(step), kind="CLIENT", parents=parents, expected=expected):
        yield


def ids(step: Step) -> dict[str, int]:
    """The fields that name a step in log lines and spans."""
    return {"provider_batch": step.id, "attempt": step.attempt, "space": step.space_id}


def _parents(context: QueueContext, read: Callable[[sa.Connection], Sequence[str]]) -> Sequence[str]:
    return context.transact(read, "read the trace") if tracing.is_on() else ()
