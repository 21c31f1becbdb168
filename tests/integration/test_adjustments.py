"""What no answer confirmed counts in the bill as what was confirmed does."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
import sqlalchemy as sa

from chunkmill.domain.budget import Budget
from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.prices import Price
from chunkmill.domain.states import Route
from chunkmill.ledger.money import adjustments, budget, charges
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.paid_ledger import LARGE, register

PRICE = Price(date(2020, 1, 1), Decimal(2), Decimal(1))


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


@pytest.fixture
def large(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings, LARGE, 256)


def lose(conn: sa.Connection, space: registry.Space, job: int, **changed: object) -> None:
    values = {"kind": AdjustmentKind.LOST, "route": Route.OPENAI, "contents": 3, "tokens": 1_000_000, **changed}
    adjustments.add_tokens(conn, PRICE, space_id=space.id, job_id=job, reason="its results never came", **values)  # type: ignore[arg-type]


def read(conn: sa.Connection, settings: Settings) -> Budget:
    limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal(10)})
    return budget.read(conn, limited)


def test_lost_and_maybe_charged_money_uses_up_the_budget_beside_what_was_confirmed(
    db: sa.Engine, settings: Settings, small: registry.Space, large: registry.Space
) -> None:
    with db.begin() as conn:
        charges.book_tokens(conn, PRICE, route=Route.OPENAI, space_id=small.id, job_id=1, contents=1, tokens=3_000_000)
        lose(conn, small, job=1)
        lose(conn, large, job=2, kind=AdjustmentKind.MAYBE_CHARGED, route=Route.OPENAI_SYNC)
        assert read(conn, settings).spent == 3 + 1 + 2
        conn.execute(sa.text("UPDATE adjustments SET day = day - 40 WHERE job_id = 1"))
        assert read(conn, settings).spent == 3 + 2


def test_each_adjustment_keeps_its_reason_its_job_and_its_day_in_utc(
    db: sa.Engine, small: registry.Space, large: registry.Space
) -> None:
    with db.begin() as conn:
        lose(conn, small, job=1)
        lose(conn, small, job=1)
        lose(conn, large, job=2, provider_batch_id=7)
        rows = conn.execute(sa.text("SELECT space_id, job_id, provider_batch_id, usd, reason, day FROM adjustments"))
        reason, today = "its results never came", charges.today(conn)
        assert [tuple(row) for row in rows] == [
            (small.id, 1, 0, 1, reason, today),
            (small.id, 1, 0, 1, reason, today),
            (large.id, 2, 7, 1, reason, today),
        ]


@pytest.mark.parametrize("column", ["contents", "tokens", "usd"])
@pytest.mark.parametrize("table", ["charges", "adjustments"])
def test_a_charge_is_never_negative(db: sa.Engine, small: registry.Space, table: str, column: str) -> None:
    with db.begin() as conn:
        charges.book_tokens(conn, PRICE, route=Route.OPENAI, space_id=small.id, contents=1, tokens=5)
        lose(conn, small, job=1)
    with pytest.raises(sa.exc.IntegrityError, match="negative"), db.begin() as conn:
        conn.execute(sa.text(f"UPDATE {table} SET {column} = -1"))


def test_a_correction_may_be_negative(db: sa.Engine, settings: Settings, small: registry.Space) -> None:
    with db.begin() as conn:
        lose(conn, small, job=1, tokens=3_000_000)
        lose(conn, small, job=2, kind=AdjustmentKind.CORRECTION, tokens=-2_000_000)
        assert read(conn, settings).spent == 1


def test_on_the_last_releases_schema_it_counts_as_a_charge(
    db: sa.Engine, settings: Settings, small: registry.Space
) -> None:
    with db.connect() as conn:
        conn.execute(sa.text("DROP TABLE adjustments"))
        lose(conn, small, job=1)
        lose(conn, small, job=2)
        assert read(conn, settings).spent == 2
        conn.rollback()
