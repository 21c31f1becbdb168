"""Embeds a ChunkBatch of route ``openai-sync`` by plain requests, at once and for twice the price of the Batch API.

The ChunkBatch is claimed, written and completed like a local one. The contents of a request are in flight before it is
sent, and are charged when its vectors are committed. If a worker is killed in between, the answer to one request is
paid for and lost.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa

from chunkmill.db.retry import is_transient
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, LeaseLost, ProviderBusy, ProviderRefused, ProviderSilent, ProviderStopped
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.money import budget
from chunkmill.ledger.provider import provider_inputs, provider_lanes
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.endings import Alone, Dead, after_line_error, backoff
from chunkmill.openai.plan.inputs import ProviderInput, RefusedInput, prepare
from chunkmill.openai.plan.packing import PackedInput, Packer
from chunkmill.spaces.registry import Space
from chunkmill_workers.process.claims import claim
from chunkmill_workers.process.context import saying_limits
from chunkmill_workers.process.lease import HeldLease
from chunkmill_workers.process.work_context import attempt_at
from chunkmill_workers.provider.asking import ask_plain
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.flow import pause_lane, stop_lane
from chunkmill_workers.provider.plain_attempt import Answer, PlainAttempt

logger = logging.getLogger(__name__)

HELD_SECONDS = 60.0
"""How long a ChunkBatch waits for its next attempt if the month's budget is used up."""
SILENT_TRIES = 20
"""Up to this attempt, one that gets no answer is not charged, because it is the provider's fault."""


class _Interrupted(Exception):
    """The worker was told to leave, or its lane was paused or stopped."""


def request_chunk_batch(context: ProviderContext, chunk_batch_id: int) -> None:
    """Claim, read, send, write, complete. However this ends, the ledger is true. No fault of the texts raises."""
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
    except _Interrupted:
        attempt.release()
    except LeaseLost as lost:
        logger.warning("%s", lost)
    except ProviderBusy as busy:
        delay = pause_lane(context, Route.OPENAI_SYNC, busy, tries=attempt.tries)
        attempt.release(because=busy, delay_s=delay)
    except ProviderStopped as stopped:
        stop_lane(context, Route.OPENAI_SYNC, stopped)
        attempt.release(because=stopped)
    except ProviderSilent as silent:
        if attempt.has_written or lease.attempt <= SILENT_TRIES:
            attempt.release(because=silent, delay_s=backoff(attempt.tries))
        else:
            attempt.fail_with(silent)
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
    limits = replace(context.limits(model, space), inputs=len(attempt.work.texts) * 2048 + 1)
    items: list[ProviderInput] = []
    for item in prepare(attempt.work.texts, context.counter(model), limits, lease.on_long):
        if isinstance(item, RefusedInput):
            attempt.dead.append(DeadContent(item.content_hash, item.code, item.reason))
        else:
            items.append(item)
    mine = context.transact(lambda conn: _put_in_flight(context, conn, lease, items), "put in flight")
    if mine is None:
        attempt.release(delay_s=HELD_SECONDS)
        return
    attempt.n_elsewhere = len(items) - len(mine)
    packer = Packer(1, context.form(model, space), limits)
    for item in items:
        if item.content_hash in mine:
            packer.add(item)
    texts = {item.content_hash: [window.text for window in item.windows] for item in items}
    requests: dict[int, list[PackedInput]] = {}
    for row in packer.rows:
        requests.setdefault(row.request_no, []).append(row)
    for rows in requests.values():
        _send(context, held, attempt, rows, texts)
    attempt.complete()


def _put_in_flight(
    context: ProviderContext, conn: sa.Connection, lease: Lease, items: list[ProviderInput]
) -> set[bytes] | None:
    """The contents that nobody else has in flight, or None if the month's budget is used up."""
    mine = provider_inputs.add_own(conn, lease, items)
    month = budget.read(conn, context.settings) if context.settings.openai_monthly_budget_usd is not None else None
    held = month is not None and mine and month.is_exceeded
    provider_lanes.hold(conn, Route.OPENAI_SYNC, month.refusal() if month and held else None)
    if held:
        provider_inputs.remove_own(conn, lease)
        return None
    return mine


def _send(
    context: ProviderContext,
    held: HeldLease,
    attempt: PlainAttempt,
    rows: Sequence[PackedInput],
    texts: dict[bytes, list[str]],
) -> None:
    """Send one request and commit its answer. A refused one costs nothing and is halved until one content is left."""
    try:
        answer = _ask(context, held, attempt, rows, texts)
    except ProviderRefused as refused:
        verdict = after_line_error(refused.status, refused.provider_code, str(refused), n_inputs_in_request=len(rows))
        if isinstance(verdict, Alone):
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                _send(context, held, attempt, half, texts)
            return
        if not isinstance(verdict, Dead):
            raise
        attempt.dead += [DeadContent(row.content_hash, verdict.code, verdict.reason) for row in rows]
        return
    attempt.commit(answer)


def _ask(
    context: ProviderContext,
    held: HeldLease,
    attempt: PlainAttempt,
    rows: Sequence[PackedInput],
    texts: dict[bytes, list[str]],
) -> Answer:
    settings = context.settings
    inputs = [text for row in rows for text in texts[row.content_hash]]
    tokens = sum(row.sent_tokens for row in rows)

    def take_turn(conn: sa.Connection) -> float | None:
        if not provider_lanes.lane(conn, Route.OPENAI_SYNC).is_healthy:
            return None  # another worker has paused or stopped the lane
        return provider_lanes.take_turn(
            conn,
            Route.OPENAI_SYNC,
            tokens=tokens,
            requests_per_minute=settings.openai_sync_requests_per_minute,
            tokens_per_minute=settings.openai_sync_tokens_per_minute,
        )

    wait = context.transact(take_turn, "take turn")
    if wait is None or context.stopping.wait(wait):
        raise _Interrupted
    held.check()
    held.moved()
    try:
        embedded = ask_plain(context, attempt.space, inputs, tokens=tokens, idempotency_key=_key(attempt.space, rows))
    except ProviderSilent as silent:
        if silent.answered:
            attempt.lose(rows, tokens=tokens, reason=silent.brief)
        raise
    if embedded.prompt_tokens is None:
        embedded = replace(embedded, prompt_tokens=tokens)
    position = 0
    placed = []
    for row in rows:  # in a halved request the positions start at 0 again
        placed.append(row._replace(position=position))
        position += row.windows
    return Answer(embedded, placed)


def _key(space: Space, rows: Sequence[PackedInput]) -> str:
    """The idempotency key of a request. A server that knows such keys does not charge the same request twice."""
    digest = hashlib.sha256(space.spec.fingerprint.encode())
    for row in rows:
        digest.update(row.content_hash)
    return digest.hexdigest()
