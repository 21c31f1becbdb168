"""Under whose name a task thread works: in its log lines, and in the job's trace."""

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
    """Lines carry job, ChunkBatch and attempt; the span stands under the job's enqueue, from when the bell came."""
    facts = {
        "job": lease.job_id,
        "chunk_batch": lease.chunk_batch_id,
        "attempt": lease.attempt,
        "space": lease.space_id,
    }
    with bound(**facts, worker=context.name):
        parents = _parents(context, lambda conn: traces.of_job(conn, lease.job_id))
        with tracing.root("chunkmill.chunk_batch", facts, kind="CONSUMER", parents=parents, began_ns=rung_ns):
            # Whose work it is was known only when it was claimed.
            with tracing.span("claim", began_ns=rung_ns):
                pass
            yield


@contextmanager
def step_of(context: QueueContext, step: Step, *, expected: tuple[type[Exception], ...]) -> Iterator[None]:
    """One step of a ProviderBatch: its span stands under its one job, or is linked to each of several."""
    parents = _parents(context, lambda conn: traces.of_provider_batch(conn, step.id))
    name = f"chunkmill.provider_batch.{step.state}"
    with tracing.root(name, ids(step), kind="CLIENT", parents=parents, expected=expected):
        yield


def ids(step: Step) -> dict[str, int]:
    return {"provider_batch": step.id, "attempt": step.attempt, "space": step.space_id}


def _parents(context: QueueContext, read: Callable[[sa.Connection], Sequence[str]]) -> Sequence[str]:
    return context.transact(read, "read the trace") if tracing.is_on() else ()
