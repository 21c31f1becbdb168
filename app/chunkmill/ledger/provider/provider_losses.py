"""What a provider charged for a ProviderBatch, or may have charged, beyond what its answers confirmed."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.domain.costs import AdjustmentKind as Kind
from chunkmill.domain.prices import Price
from chunkmill.domain.states import Route
from chunkmill.ledger.money import adjustments
from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_inputs import InFlight


def book_unanswered(
    conn: sa.Connection, price: Price | None, step: Step, left: Sequence[InFlight], *, may_have_run: bool, reason: str
) -> None:
    """Book what a ProviderBatch cost and no line has answered. Call it when its last contents leave flight.

    ``left`` are these contents. If the provider says what it charged for the whole batch, the rest of that is lost. If
    it does not, and the contents may have been sent (``may_have_run``), our own count of them may have been charged.
    """
    told = step.used_tokens if step.used_tokens or step.n_completed == 0 else None
    if told is not None:
        kind, tokens = Kind.LOST, told - _booked(conn, step)
    elif step.n_completed and may_have_run:
        kind, tokens = Kind.LOST if step.n_completed >= step.n_requests else Kind.MAYBE_CHARGED, _sent(left)
    else:
        kind, tokens = Kind.MAYBE_CHARGED, _sent(left) if may_have_run else 0
    if tokens <= 0:
        return
    # Shared among the jobs in proportion to our own counts, as an answer's tokens are.
    by_job: dict[int, tuple[int, int]] = {}
    for row in left:
        contents, counted = by_job.get(row.job_id, (0, 0))
        by_job[row.job_id] = contents + 1, counted + row.packed.sent_tokens
    counted_left = _sent(left)
    for job_id, (contents, counted) in sorted(by_job.items()) or [(0, (0, 0))]:
        share = tokens * counted // counted_left if counted_left else tokens
        counted_left, tokens = counted_left - counted, tokens - share
        # If only some of the contents were charged, it is not known which.
        contents = min(contents, -(-contents * share // counted)) if counted else contents
        adjustments.add_tokens(
            conn,
            price,
            kind=kind,
            route=Route.OPENAI,
            space_id=step.space_id,
            job_id=job_id,
            provider_batch_id=step.id,
            contents=contents,
            tokens=share,
            reason=reason,
        )


def book_doubled(conn: sa.Connection, price: Price | None, step: Step, tokens: int, *, reason: str) -> None:
    """Book the tokens of a second batch that ran for the same contents, unless it was booked with this reason."""
    provider_batches.note(conn, step, failures=step.failures)  # it locks the row, so nobody else books for it now
    booked = sa.text("SELECT EXISTS (SELECT FROM adjustments WHERE provider_batch_id = :id AND reason = :reason)")
    if conn.execute(booked, {"id": step.id, "reason": reason}).scalar_one():
        return
    adjustments.add_tokens(
        conn,
        price,
        kind=Kind.LOST,
        route=Route.OPENAI,
        space_id=step.space_id,
        provider_batch_id=step.id,
        contents=step.n_inputs,
        tokens=tokens,
        reason=reason,
    )


def _sent(left: Sequence[InFlight]) -> int:
    return sum(row.packed.sent_tokens for row in left)


def _booked(conn: sa.Connection, step: Step) -> int:
    query = sa.text("""
        SELECT coalesce(sum(tokens), 0)
        FROM charges
        WHERE provider_batch_id = :id AND day >= CAST(:day AS date) - 1
    """)
    return int(conn.execute(query, {"id": step.id, "day": step.created_on}).scalar_one())
