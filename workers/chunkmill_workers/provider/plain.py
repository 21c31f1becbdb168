"""Embeds a ChunkBatch of route ``openai-sync`` by plain requests, at once and for twice the price of the Batch API.

The ChunkBatch is claimed, written and completed like a local one. The contents of a request are in flight before it is
sent, and are charged when its vectors are committed. If a worker is killed in between, the answer to one request is
paid for and lost; the next attempt books it.
"""

from __future__ import annotations

import logging
import time

import sqlalchemy as sa

from chunkmill.db.retry import is_transient
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, LeaseLost, ProviderBusy, ProviderSilent, ProviderStopped
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.money import budget
from chunkmill.ledger.provider import provider_inputs, provider_lanes
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.endings import backoff
from chunkmill.openai.plan.inputs import ProviderInput, RefusedInput, prepare
from chunkmill.spaces.registry import Space
from chunkmill_workers.process.claims import claim
from chunkmill_workers.process.context import saying_limits
from chunkmill_workers.process.lease import HeldLease
from chunkmill_workers.process.work_context import attempt_at
from chunkmill_workers.provider.books import book_unanswered
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.flow import pause_failing_lane, pause_lane, stop_lane
from chunkmill_workers.provider.plain_attempt import PlainAttempt
from chunkmill_workers.provider.sending import Interrupted, Sender

logger = logging.getLogger(__name__)

HELD_SECONDS = 60.0
"""How long a ChunkBatch waits for its next attempt if the month's budget is used up."""


def request_chunk_batch(context: ProviderContext, chunk_batch_id: int) -> None:
    """Claim, read, send, write, complete. However this ends, the ledger is correct. Faults of texts raise no error."""
    context.last_doorbell, rung_ns = time.monotonic(), time.time_ns()
    if not context.stopping.is_set():
        with saying_limits():
            _answer(context, chunk_batch_id, rung_ns)


def _answer(context: ProviderContext, chunk_batch_id: int, rung_ns: int) -> None:
    lease = claim(
        context,
        chunk_batch_id,
        route=Route.OPENAI_SYNC,
        not_spaces=list(context.unserved.now()),
        # The poller rings again when the lane is healthy.
        unless=lambda conn: not provider_lanes.lane(conn, Route.OPENAI_SYNC).is_healthy,
    )
    if lease is None:
        return
    with attempt_at(context, lease, rung_ns=rung_ns):
        with context.leases.holding(lease) as held:
            _run(context, held)
        context.finish_job(lease)


def _run(context: ProviderContext, held: HeldLease) -> None:
    lease = held.lease
    attempt = PlainAttempt(context, lease)
    try:
        attempt.start()
        _embed(context, held, attempt)
    except Interrupted:
        attempt.release()
        attempt.log_end("given back, because the worker leaves")
    except LeaseLost as lost:
        logger.warning("%s", lost)
    except ProviderBusy as busy:
        delay = pause_lane(context, Route.OPENAI_SYNC, busy, tries=attempt.tries)
        attempt.release(because=busy, delay_s=delay)
    except ProviderStopped as stopped:
        stop_lane(context, Route.OPENAI_SYNC, stopped)
        attempt.release(because=stopped)
    except ProviderSilent as silent:
        # An outage is not the fault of the texts. What they may have cost is booked, and the lane pauses if it is
        # failing.
        paused = pause_failing_lane(context, Route.OPENAI_SYNC, silent)
        attempt.release(because=silent, delay_s=backoff(attempt.tries) if paused is None else paused)
    except Exception as error:
        if is_transient(error):
            raise  # another worker goes on when the lease runs out
        if isinstance(error, ChunkmillError) and error.elsewhere:
            context.unserved.leave(lease.space_id, error)
            attempt.release(because=error)
            logger.warning("ChunkBatch %s is left to other workers: %s", lease.chunk_batch_id, error)
        else:
            attempt.fail_with(error)


def _embed(context: ProviderContext, held: HeldLease, attempt: PlainAttempt) -> None:
    space, lease = attempt.space, attempt.lease
    model = context.model(space)
    items: list[ProviderInput] = []
    for item in prepare(attempt.work.texts, context.counter(model), context.limits(model, space), lease.on_long):
        if isinstance(item, RefusedInput):
            attempt.dead.append(DeadContent(item.content_hash, item.code, item.reason))
        else:
            items.append(item)
    mine = context.transact(lambda conn: _put_in_flight(context, conn, space, lease, items), "put in flight")
    if mine is None:
        attempt.release(delay_s=HELD_SECONDS)
        return
    attempt.n_elsewhere = len(items) - len(mine)
    Sender(context, held, attempt).send([item for item in items if item.content_hash in mine])
    attempt.complete()


def _put_in_flight(
    context: ProviderContext, conn: sa.Connection, space: Space, lease: Lease, items: list[ProviderInput]
) -> set[bytes] | None:
    """The contents that nobody else has in flight, or None if the month's budget is used up."""
    left = provider_inputs.drop_left_behind(conn, lease.space_id, [item.content_hash for item in items])
    book_unanswered(conn, context, space, left)
    mine = provider_inputs.add_own(conn, lease, items)
    held = budget.why_held(conn, context.settings, space.spec) if mine else None
    provider_lanes.hold(conn, Route.OPENAI_SYNC, held)
    if held is not None:
        provider_inputs.remove_own(conn, lease)
        return None
    return mine
