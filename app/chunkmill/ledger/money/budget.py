"""The month's budget as the ledger has it: what is spent and committed, and which warnings were given."""

from __future__ import annotations

from decimal import Decimal

import sqlalchemy as sa

from chunkmill.db.locks import NOTICE_LOCK
from chunkmill.domain.budget import Budget, due_percents
from chunkmill.domain.prices import price_on
from chunkmill.domain.states import ProviderBatchState, Route
from chunkmill.errors import BudgetExceeded
from chunkmill.ledger.money import adjustments, charges
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry

_COMMITTED = [state for state in ProviderBatchState if state.is_committed]


def read(conn: sa.Connection, settings: Settings) -> Budget:
    """The budget of this month, with or without a limit."""
    month = conn.execute(sa.text(f"SELECT {charges.MONTH}")).scalar_one()
    spent = charges.month_confirmed(conn) + adjustments.month_adjusted(conn)
    return Budget(month, spent, committed(conn, settings), settings.openai_monthly_budget_usd)


def headroom(conn: sa.Connection, settings: Settings) -> Decimal | None:
    """How many US dollars new work may cost this month; None if there is no limit."""
    return None if settings.openai_monthly_budget_usd is None else read(conn, settings).headroom


def require_budget(conn: sa.Connection, settings: Settings) -> None:
    """Raise :class:`BudgetExceeded` if what is spent and committed has reached the limit."""
    if settings.openai_monthly_budget_usd is None:
        return
    budget = read(conn, settings)
    if budget.is_used_up:
        raise BudgetExceeded(budget.refusal())


def committed(conn: sa.Connection, settings: Settings) -> Decimal:
    """The estimated cost, in US dollars, of what is at a provider or about to be sent there, and not charged yet.

    A model without a price (``OPENAI_MODELS``) counts as 0.
    """
    # It sums up the few open ProviderBatches, because their inputs in flight may be millions.
    rows = conn.execute(
        sa.text("""
            SELECT p.space_id, CAST(:batch_api AS text) AS route,
                   sum(greatest(0, p.n_tokens - coalesce((
                       SELECT sum(c.tokens) FROM charges c
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
        {"batch_api": Route.OPENAI, "plain": Route.OPENAI_SYNC, "committed": _COMMITTED},
    ).all()
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

    Give the warning before the commit: after a rollback it is due again. Nothing is due while another poller gives it.
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
