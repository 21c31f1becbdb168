"""The budget as the ledger has it: spent and committed, and which warnings were given."""

from __future__ import annotations

from decimal import Decimal

import sqlalchemy as sa

from chunkmill.db.locks import NOTICE_LOCK
from chunkmill.domain.budget import Budget, due_percents
from chunkmill.domain.prices import price_on
from chunkmill.errors import BudgetExceeded
from chunkmill.ledger.money import charges
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry


def read(conn: sa.Connection, settings: Settings) -> Budget:
    """This month's, with or without a limit."""
    month = conn.execute(sa.text(f"SELECT {charges.MONTH}")).scalar_one()
    return Budget(month, charges.month_spent(conn), committed(conn, settings), settings.openai_monthly_budget_usd)


def headroom(conn: sa.Connection, settings: Settings) -> Decimal | None:
    """US dollars that new work may cost this month; None: there is no limit."""
    return None if settings.openai_monthly_budget_usd is None else read(conn, settings).headroom


def require_budget(conn: sa.Connection, settings: Settings) -> None:
    """Raise :class:`BudgetExceeded` where what is spent and committed has reached the limit."""
    if settings.openai_monthly_budget_usd is None:
        return
    budget = read(conn, settings)
    if budget.is_used_up:
        raise BudgetExceeded(budget.refusal())


def committed(conn: sa.Connection, settings: Settings) -> Decimal:
    """Estimated US dollars of what is at a provider now, or about to be, and not charged yet.

    A model without a price (``OPENAI_MODELS``) counts for nothing.
    """
    rows = conn.execute(
        sa.text(
            # From the few open ProviderBatches: their inputs in flight may be millions.
            "SELECT space_id, true AS batch, sum(greatest(0, n_tokens - coalesce((SELECT sum(c.tokens) FROM charges c "
            "  WHERE c.provider_batch_id = p.id AND c.day >= p.created_at::date - 1), 0))) AS tokens "
            "FROM provider_batches p WHERE state IN ('gathered', 'uploaded', 'creating', 'submitted', 'collecting') "
            "GROUP BY space_id UNION ALL "
            "SELECT space_id, false, sum(sent_tokens) FROM provider_inputs WHERE provider_batch_id IS NULL GROUP BY 1"
        )
    ).all()
    if not rows:
        return Decimal(0)
    today = charges.today(conn)
    total = Decimal(0)
    for row in rows:
        model = model_for(settings, registry.get(conn, row.space_id).spec)
        price = price_on(model.prices, today) if model else None
        if price:
            total += price.of(int(row.tokens), batch=row.batch)
    return total


def due_notices(conn: sa.Connection, budget: Budget, *, warn_percent: int) -> tuple[int, ...]:
    """Mark the thresholds that were reached and not warned of yet as given; returns them, the highest last.

    Give the warning before the commit: rolled back, it is due again. None where another poller is at it.
    """
    reached = due_percents(budget, warn_percent)
    if not reached or not conn.execute(
        sa.text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": NOTICE_LOCK}
    ).scalar_one():  # fmt: skip
        return ()
    rows = conn.execute(
        sa.text(
            "INSERT INTO budget_notices (month, percent) SELECT :month, unnest(CAST(:percents AS smallint[])) "
            "ON CONFLICT DO NOTHING RETURNING percent"
        ),
        {"month": budget.month, "percents": list(reached)},
    )
    return tuple(sorted(rows.scalars()))
