"""The month's budget as the ledger has it: what is spent and committed, and which warnings were given."""

from __future__ import annotations

from decimal import Decimal

import sqlalchemy as sa

from chunkmill.db.locks import BUDGET_LOCK, NOTICE_LOCK, lock
from chunkmill.domain.budget import Budget, due_percents
from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.prices import price_on
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import ProviderBatchState, Route
from chunkmill.errors import BudgetExceeded, InvalidSetting
from chunkmill.ledger.money import adjustments, charges, questions
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry

_COMMITTED = [state for state in ProviderBatchState if state.is_committed]


def read(conn: sa.Connection, settings: Settings) -> Budget:
    """The budget of this month, with or without a limit."""
    month = conn.execute(sa.text(f"SELECT {charges.MONTH}")).scalar_one()
    # The order matters: what is booked between the two statements counts twice for a moment. In the other order it
    # would not count at all.
    in_flight = committed(conn, settings)
    confirmed, adjusted = charges.month_confirmed(conn), adjustments.month_adjusted(conn)
    limit = settings.openai_monthly_budget_usd
    spent = confirmed + adjusted.total
    return Budget(month, spent, in_flight, limit, adjusted.lost, adjusted.maybe_charged, adjusted.corrected)


def headroom(conn: sa.Connection, settings: Settings) -> Decimal | None:
    """How many US dollars new work may cost this month; None if there is no limit."""
    return None if settings.openai_monthly_budget_usd is None else read(conn, settings).headroom


def require_budget(conn: sa.Connection, settings: Settings, spec: SpaceSpec) -> None:
    """Check that new work of a space may go to a provider.

    Raises :class:`BudgetExceeded` if what is spent and committed has reached the limit, and :class:`InvalidSetting` if
    there is a limit and the model has no price.
    """
    if settings.openai_monthly_budget_usd is None:
        return
    if (unpriced := why_unpriced(settings, spec)) is not None:
        raise InvalidSetting(unpriced)
    budget = read(conn, settings)
    if budget.is_used_up:
        raise BudgetExceeded(budget.refusal())


def why_unpriced(settings: Settings, spec: SpaceSpec) -> str | None:
    """Why no paid route may serve a space: there is a budget, and no price tells what the work takes of it."""
    model = model_for(settings, spec)
    if settings.openai_monthly_budget_usd is None or model is None or model.prices:
        return None
    return (
        f"model {model.name!r} has no price, so OPENAI_MONTHLY_BUDGET_USD cannot limit what it costs. Give it usd in "
        'OPENAI_MODELS ("usd": 0 if it costs nothing), or leave the budget out.'
    )


def is_exceeded(conn: sa.Connection, settings: Settings) -> bool:
    """Whether what is spent and in flight is more than the limit. What is in flight has been counted before, so this
    may be so only if a part of it cost more than was committed for it."""
    return settings.openai_monthly_budget_usd is not None and read(conn, settings).exceeds()


def why_held(conn: sa.Connection, settings: Settings, spec: SpaceSpec, usd: Decimal = Decimal(0)) -> str | None:
    """Why work of a space may not be sent now; None if it may.

    Counts what this transaction has put in flight, and ``usd`` for what it is about to put there. Until it ends, other
    transactions wait here, so that no two spend the same money. Therefore call it last, and commit soon: nothing may be
    sent before the commit.
    """
    if settings.openai_monthly_budget_usd is None:
        return None
    if (unpriced := why_unpriced(settings, spec)) is not None:
        return unpriced
    lock(conn, BUDGET_LOCK)
    budget = read(conn, settings)
    return budget.refusal() if budget.exceeds(usd) else None


def committed(conn: sa.Connection, settings: Settings) -> Decimal:
    """The estimated cost, in US dollars, of what is at a provider or about to be sent there, and not charged yet.

    A model without a price (``OPENAI_MODELS``) counts as 0. What was lost is not committed any more. What may have been
    charged still is, because it may be sent again.
    """
    # It sums up the few open ProviderBatches, because their inputs in flight may be millions.
    rows = conn.execute(
        sa.text(f"""
            SELECT p.space_id, CAST(:batch_api AS text) AS route,
                   sum(greatest(0, p.n_tokens - coalesce((
                       SELECT sum(c.tokens) FROM ({adjustments.charged_or_lost(conn)}) c
                       WHERE c.provider_batch_id = p.id AND c.day >= p.created_at::date - 1
                   ), 0))) AS tokens
            FROM provider_batches p
            WHERE p.state = ANY(:committed)
            GROUP BY p.space_id
            UNION ALL
            SELECT space_id, :plain, sum(sent_tokens)
            FROM provider_inputs
            WHERE provider_batch_id IS NULL
            GROUP BY space_id
        """),
        {
            "batch_api": Route.OPENAI,
            "plain": Route.OPENAI_SYNC,
            "committed": _COMMITTED,
            "lost": AdjustmentKind.LOST,
        },
    ).all()
    rows = [*rows, *questions.committed(conn)]
    total = Decimal(0)
    today = charges.today(conn) if rows else None
    for row in rows:
        space = registry.get_if_readable(conn, row.space_id)
        model = model_for(settings, space.spec) if space else None
        price = price_on(model.prices, today) if model and today else None
        if price:
            total += price.of(int(row.tokens), Route(row.route))
    return total


def due_notices(conn: sa.Connection, budget: Budget, *, warn_percent: int) -> tuple[int, ...]:
    """Mark the thresholds that are reached and not warned of yet as warned of; returns them, the highest last.

    Send the warnings before the commit: after a rollback they are due again. While another poller is sending them, this
    returns nothing.
    """
    reached = due_percents(budget, warn_percent)
    if not reached or not conn.execute(
        sa.text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": NOTICE_LOCK}
    ).scalar_one():  # fmt: skip
        return ()
    rows = conn.execute(
        sa.text("""
            INSERT INTO budget_notices (month, percent)
            SELECT :month, unnest(CAST(:percents AS smallint[]))
            ON CONFLICT DO NOTHING
            RETURNING percent
        """),
        {"month": budget.month, "percents": list(reached)},
    )
    return tuple(sorted(rows.scalars()))
