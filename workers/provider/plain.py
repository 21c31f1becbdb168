"""Plain embeddings requests: a ChunkBatch of route ``openai-sync``, in one go, for twice the price of the Batch API.

It is claimed, written and completed as a local one is. Each request's contents are in flight before it is sent, and
paid when its vectors are committed. A worker that is killed in between has paid for one request whose answer is lost.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from app.db import spaces
from app.db.retry import is_transient
from app.db.spaces import Space
from app.domain.prices import price_on
from app.domain.states import Route
from app.errors import (
    ChunkmillError,
    LeaseLost,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
)
from app.ledger import budget, charges, chunk_batches, dead_chunks, provider_inputs, provider_lanes, usage
from app.ledger.chunk_batches import Lease
from app.ledger.dead_chunks import DeadContent
from app.ledger.finish import finish_if_done
from app.openai_batch.assemble import assemble
from app.openai_batch.endings import Alone, Dead, after_line_error, backoff
from app.openai_batch.inputs import ProviderInput, RefusedInput, prepare
from app.openai_batch.jsonl import Embedded
from app.openai_batch.packing import PackedInput, Packer
from app.openai_batch.vectors import read_embeddings
from app.telemetry import metrics
from app.telemetry.counts import COUNTS
from app.vectors.read import Work, read_work
from workers.lease import HeldLease
from workers.observed import attempt_at
from workers.provider.context import ProviderContext
from workers.provider.steps import LEAST_PAUSE_S, pause_lane, stop_lane
from workers.provider.writing import write

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0
"""A ChunkBatch some of whose contents others have in flight looks again after so long."""
HELD_SECONDS = 60.0
"""A ChunkBatch that the month's budget does not reach for looks again after so long."""
SILENT_TRIES = 20
"""Attempts that end without an answer are the provider's fault, up to so many."""


class _Stopping(Exception):
    """The worker was told to go, or its lane to wait."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer: what it gave its contents, and what it cost."""

    embedded: Embedded
    rows: tuple[PackedInput, ...]


@dataclass(slots=True)
class _Attempt:
    """What one attempt has to do and has done."""

    lease: Lease
    space: Space
    work: Work
    account: usage.Usage
    dead: list[DeadContent] = field(default_factory=list)
    done: int = 0
    truncated: int = 0
    elsewhere: int = 0
    """Contents that others have in flight."""
    bad: str | None = None
    """Why a content that was answered has no vector."""


def request_chunk_batch(context: ProviderContext, chunk_batch_id: int) -> None:
    """Claim, read, send, write, complete. Every way out leaves the ledger true; none raises for the work's sake."""
    context.last_doorbell, rung_ns = time.monotonic(), time.time_ns()
    if context.stopping.is_set():
        return

    def claim(conn: sa.Connection) -> Lease | None:
        if not provider_lanes.lane(conn, Route.OPENAI_SYNC).is_healthy:
            return None  # rung again when it is
        return chunk_batches.claim_if_due(
            conn,
            chunk_batch_id,
            owner=context.name,
            lease_seconds=context.settings.lease_seconds,
            route=Route.OPENAI_SYNC,
            not_spaces=context.unserved(),
        )

    lease = context.transact(claim, "claim", give_up=True)
    if lease is None:
        return
    with attempt_at(context, lease, rung_ns=rung_ns):
        with context.leases.holding(lease) as held:
            _run(context, held)
        with context.begin() as conn:
            finish_if_done(conn, lease.job_id, spaces.get(conn, lease.space_id))


def _run(context: ProviderContext, held: HeldLease) -> None:
    lease = held.lease
    attempt = context.transact(lambda conn: _open(context, conn, lease), "read texts")
    try:
        _embed(context, held, attempt)
    except _Stopping:
        _release(context, attempt)
    except LeaseLost as lost:
        logger.warning("%s", lost)
    except ProviderBusy as busy:
        delay = max(LEAST_PAUSE_S, backoff(_tries(attempt), busy.retry_after_s))
        pause_lane(context, Route.OPENAI_SYNC, busy, delay)
        _release(context, attempt, because=busy, delay_s=delay)
    except ProviderStopped as stopped:
        stop_lane(context, Route.OPENAI_SYNC, stopped)
        _release(context, attempt, because=stopped)
    except ProviderSilent as silent:
        if attempt.done or lease.attempt <= SILENT_TRIES:
            _release(context, attempt, because=silent, delay_s=backoff(_tries(attempt)))
        else:
            _fail(context, attempt, silent)
    except Exception as error:
        if is_transient(error):
            raise  # the lease runs out
        _fail(context, attempt, error)


def _tries(attempt: _Attempt) -> int:
    """Attempts that came to nothing, as far as is known: one that wrote something is as good as the first."""
    return 1 if attempt.done else min(attempt.lease.attempt, 8)


def _open(context: ProviderContext, conn: sa.Connection, lease: Lease) -> _Attempt:
    space = spaces.get(conn, lease.space_id)
    provider_inputs.remove_own(conn, lease)
    account = usage.Usage("openai", context.name)
    usage.book(conn, lease, account)
    return _Attempt(lease, space, read_work(conn, space, lease.chunk_batch_id), account)


def _embed(context: ProviderContext, held: HeldLease, attempt: _Attempt) -> None:
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
        _release(context, attempt, delay_s=HELD_SECONDS)
        return
    attempt.elsewhere = len(items) - len(mine)
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
    _complete(context, attempt)


def _put_in_flight(
    context: ProviderContext, conn: sa.Connection, lease: Lease, items: list[ProviderInput]
) -> set[bytes] | None:
    """What nobody else has in flight; None where the month's budget does not reach for it."""
    mine = provider_inputs.add_own(conn, lease, items)
    now = budget.read(conn, context.settings) if context.settings.openai_monthly_budget_usd is not None else None
    held = now is not None and mine and now.is_exceeded
    provider_lanes.hold(conn, Route.OPENAI_SYNC, now.refusal() if now and held else None)
    if held:
        provider_inputs.remove_own(conn, lease)
        return None
    return mine


def _send(
    context: ProviderContext,
    held: HeldLease,
    attempt: _Attempt,
    rows: Sequence[PackedInput],
    texts: dict[bytes, list[str]],
) -> None:
    """One request. A refused one, which costs nothing, is halved until the content at fault stands alone."""
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
    _commit(context, attempt, answer)


def _ask(
    context: ProviderContext,
    held: HeldLease,
    attempt: _Attempt,
    rows: Sequence[PackedInput],
    texts: dict[bytes, list[str]],
) -> Answer:
    settings = context.settings
    inputs = [text for row in rows for text in texts[row.content_hash]]
    tokens = sum(row.sent_tokens for row in rows)

    def take_turn(conn: sa.Connection) -> float | None:
        if not provider_lanes.lane(conn, Route.OPENAI_SYNC).is_healthy:
            return None  # another worker was told so
        return provider_lanes.take_turn(
            conn,
            Route.OPENAI_SYNC,
            tokens=tokens,
            requests_per_minute=settings.openai_sync_requests_per_minute,
            tokens_per_minute=settings.openai_sync_tokens_per_minute,
        )

    wait = context.transact(take_turn, "take turn")
    if wait is None or context.stopping.wait(wait):
        raise _Stopping
    held.check()
    held.moved()
    form = context.form(context.model(attempt.space), attempt.space)
    body = context.provider.embed(
        form.model, inputs, dimensions=form.dimensions, idempotency_key=_key(attempt.space, rows)
    )
    embedded = read_answer(body, len(inputs), attempt.space)
    if embedded.prompt_tokens is None:
        embedded = replace(embedded, prompt_tokens=tokens)
    at = 0
    placed = []
    for row in rows:  # a half has its own places
        placed.append(row._replace(position=at))
        at += row.windows
    return Answer(embedded, tuple(placed))


def read_answer(body: dict[str, Any], n_inputs: int, space: Space) -> Embedded:
    """The body of a plain answer; ``prompt_tokens`` None where it does not say."""
    spec = space.spec
    data = body.get("data")
    if not isinstance(data, list):
        raise ProviderSilent("the provider answered an embeddings request without data")
    vectors, problems = read_embeddings(data, n_inputs, spec.dimensions, normalize=spec.normalize)
    charged = body.get("usage")
    tokens = charged.get("prompt_tokens") if isinstance(charged, dict) else None
    return Embedded(0, vectors, problems, tokens if type(tokens) is int else None, None)


def _key(space: Space, rows: Sequence[PackedInput]) -> str:
    """The same request has the same key, for servers that know one: what was lost on the way is not charged again."""
    digest = hashlib.sha256(space.spec.fingerprint.encode())
    for row in rows:
        digest.update(row.content_hash)
    return digest.hexdigest()


def _commit(context: ProviderContext, attempt: _Attempt, answer: Answer) -> None:
    """The vectors, the charge and the account in one transaction; what is done stays, whatever comes next."""
    space, lease = attempt.space, attempt.lease
    made = assemble(answer.embedded, answer.rows, normalize=space.spec.normalize)
    tokens = answer.embedded.prompt_tokens or 0

    def commit(conn: sa.Connection) -> tuple[usage.Usage, int]:
        hashes = [row.content_hash for row in answer.rows]
        removed = provider_inputs.remove(conn, space_id=space.id, hashes=hashes, provider_batch_id=None)
        new = write(conn, space, made.rows, made.vectors)
        account = replace(
            attempt.account,
            contents=attempt.account.contents + new,
            recomputed=attempt.account.recomputed + len(made.rows) - new,
            tokens=attempt.account.tokens + tokens,
        )
        if removed:  # else this is the second run of a commit whose answer was lost
            _charge(context, conn, attempt, len(answer.rows), tokens)
        usage.book(conn, lease, account)
        if not chunk_batches.record_progress_if_held(conn, lease, attempt.work.known + attempt.done + len(made.rows)):
            logger.warning("ChunkBatch %s: its lease was lost; the vectors stay", lease.chunk_batch_id)
        return account, new

    attempt.account, new = context.transact(commit, "write vectors")
    COUNTS.add_all(((metrics.CONTENTS, new), (metrics.TOKENS, tokens)))
    attempt.done += len(made.rows)
    attempt.truncated += sum(row.truncated for row in made.rows)
    if made.problems:
        attempt.bad = made.problems[0][1]


def _charge(context: ProviderContext, conn: sa.Connection, attempt: _Attempt, contents: int, tokens: int) -> None:
    price = price_on(context.model(attempt.space).prices, charges.today(conn))
    charges.book(
        conn,
        route=Route.OPENAI_SYNC,
        space_id=attempt.space.id,
        job_id=attempt.lease.job_id,
        provider_batch_id=0,
        contents=contents,
        tokens=tokens,
        usd=price.of(tokens, batch=False) if price else Decimal(0),
    )


def _complete(context: ProviderContext, attempt: _Attempt) -> None:
    lease = attempt.lease
    if attempt.bad is not None:
        raise ProviderAnswerBad(f"the provider answered without a usable vector: {attempt.bad}")
    if attempt.elsewhere:
        _release(context, attempt, delay_s=AGAIN_SECONDS)
        return

    def complete(conn: sa.Connection) -> bool:
        n = attempt.work.known + attempt.done
        truncated = len(attempt.work.truncated) + attempt.truncated
        done = chunk_batches.complete_if_held(conn, lease, n_embedded=n, n_truncated=truncated)
        if done:
            dead_chunks.add_contents(conn, lease, attempt.dead)
            usage.book(conn, lease, attempt.account, usage.Outcome.COMPLETED)
            provider_inputs.remove_own(conn, lease)
        return done

    if not context.transact(complete, "complete"):
        raise LeaseLost(f"ChunkBatch {lease.chunk_batch_id}: attempt {lease.attempt} was superseded")


class ProviderAnswerBad(ChunkmillError):
    code = "bad_vector"
    retryable = True
    http_status = 502


def _release(
    context: ProviderContext, attempt: _Attempt, *, because: ChunkmillError | None = None, delay_s: float = 0.0
) -> None:
    def release(conn: sa.Connection) -> None:
        provider_inputs.remove_own(conn, attempt.lease)
        if chunk_batches.release_if_held(conn, attempt.lease, because=because, delay_s=delay_s):
            usage.book(conn, attempt.lease, attempt.account, usage.Outcome.RELEASED)

    context.transact(release, "release")


def _fail(context: ProviderContext, attempt: _Attempt, error: Exception) -> None:
    lease = attempt.lease
    known = isinstance(error, ChunkmillError)
    said = str(error) if known else type(error).__name__
    brief = error.brief if isinstance(error, ProviderError) else said
    logger.error("ChunkBatch %s, attempt %s failed: %s", lease.chunk_batch_id, lease.attempt, brief, exc_info=not known)

    def fail(conn: sa.Connection) -> None:
        provider_inputs.remove_own(conn, lease)
        code = error.code if isinstance(error, ChunkmillError) else "worker_error"
        if chunk_batches.fail_if_held(conn, lease, code=code, error=said, retryable=True):
            usage.book(conn, lease, attempt.account, usage.Outcome.FAILED, said)

    context.transact(fail, "fail")
