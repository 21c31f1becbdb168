"""Money at the borders of days and months, which are those of UTC, whatever time zone the database is set to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.budget import Budget
from chunkmill.domain.costs import CostsBy
from chunkmill.domain.prices import Price
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput
from chunkmill.ledger.jobs import routing
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.provider import provider_room
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from tests.support.paid_ledger import LARGE, SMALL, add_charge, add_inputs, add_provider_batch, register, set_time_zone

EAST, WEST = "Etc/GMT-14", "Etc/GMT+12"
"""UTC+14 and UTC-12: at any moment the date of one of them is not that of UTC."""


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


@pytest.fixture
def large(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings, LARGE, 256)


@pytest.fixture
def abroad(db: sa.Engine, settings: Settings) -> Iterator[sa.Connection]:
    """A transaction whose ``now()`` is on another day in the database's time zone than it is in UTC."""
    set_time_zone(db, WEST if datetime.now(UTC).hour < 11 else EAST)
    with db.begin() as conn:
        yield conn


def utc_day(conn: sa.Connection) -> date:
    """Of ``now()``, by Python's calendar."""
    epoch = float(conn.execute(sa.text("SELECT extract(epoch FROM now())")).scalar_one())
    return datetime.fromtimestamp(epoch, UTC).date()


def test_a_charge_is_of_the_day_that_it_is_in_utc(abroad: sa.Connection, small: registry.Space) -> None:
    charges.book(
        abroad, route=Route.OPENAI, space_id=small.id, job_id=1, provider_batch_id=2, contents=3, tokens=4,
        usd=Decimal(5),
    )  # fmt: skip

    today = utc_day(abroad)
    assert abroad.execute(sa.text("SELECT day FROM charges")).scalar_one() == today
    assert charges.today(abroad) == today
    assert charges.month_confirmed(abroad) == 5


def test_a_budget_is_of_the_month_that_it_is_in_utc(abroad: sa.Connection, settings: Settings) -> None:
    assert budget.read(abroad, settings).month == utc_day(abroad).replace(day=1)


def test_every_look_at_a_price_is_on_the_day_of_utc(
    abroad: sa.Connection, settings: Settings, small: registry.Space
) -> None:
    """A price begins today and another tomorrow: neither the day before nor the day after is the right one."""
    today = utc_day(abroad)
    prices = [Price(date(2020, 1, 1), Decimal(7), Decimal(7)), Price(today, Decimal(6), Decimal(3)),
              Price(today + timedelta(days=1), Decimal(9), Decimal(9))]  # fmt: skip
    model = replace(settings.provider_models[SMALL], prices=tuple(prices))
    priced = settings.model_copy(update={"openai_models": {SMALL: model}})
    add_provider_batch(abroad, small, n_tokens=1_000_000)
    add_inputs(abroad, small, None, [bytes(32)], sent_tokens=1_000_000)

    offers = {offer.route: offer.usd for offer in routing.offers(abroad, priced, small.spec)}
    assert offers == {Route.OPENAI: 3, Route.OPENAI_SYNC: 6}
    assert provider_room.room(abroad, priced, small).usd_per_million == 3
    assert budget.committed(abroad, priced) == 3 + 6


def test_local_work_stands_on_the_day_of_utc(
    db: sa.Engine, client: Client, settings: Settings, small: registry.Space
) -> None:
    """At noon of the tenth it is the eleventh at UTC+14."""
    set_time_zone(db, EAST)
    client._db.dispose()
    client.enqueue([("a", "text")], collection="docs")
    with db.begin() as conn:
        conn.execute(
            sa.text(
                "INSERT INTO usage (chunk_batch_id, attempt, job_id, space_id, provider, worker, contents, tokens, "
                "engine_seconds, created_at) SELECT id, 1, job_id, space_id, 'local', 'w', 5, 50, 2, "
                "timestamptz '2026-11-10 12:00+00' FROM chunk_batches"
            )
        )
        add_charge(conn, small, "1", on="2026-11-11")

    assert [(row.key, row.route) for row in client.usage("day").rows] == [
        ("2026-11-10", Route.LOCAL), ("2026-11-11", Route.OPENAI_SYNC),
    ]  # fmt: skip
    assert [row.route for row in client.usage("day", since=date(2026, 11, 11)).rows] == [Route.OPENAI_SYNC]


# Months


def test_a_month_has_its_first_day_and_not_the_last_of_the_month_before(
    db: sa.Engine, client: Client, small: registry.Space
) -> None:
    month = client.usage().budget.month
    with db.begin() as conn:
        add_charge(conn, small, "4", on=str(month), batch=3)
        add_charge(conn, small, "2", on=str(month - timedelta(days=1)), batch=3)
        assert charges.month_confirmed(conn) == 4

    assert [(row.key, row.usd) for row in client.usage(CostsBy.MONTH).rows] == [
        (f"{month - timedelta(days=1):%Y-%m}", 2), (f"{month:%Y-%m}", 4),
    ]  # fmt: skip


def test_costs_since_a_day_have_that_day(db: sa.Engine, client: Client, small: registry.Space) -> None:
    with db.begin() as conn:
        for day, usd in ((9, "1"), (10, "2"), (11, "4")):
            add_charge(conn, small, usd, on=f"2026-11-{day}")

    assert [row.usd for row in client.usage("day", since=date(2026, 11, 10)).rows] == [2, 4]


def test_costs_since_a_moment_are_refused(client: Client) -> None:
    """A moment may be on two days, and days are those of UTC."""
    with pytest.raises(InvalidInput, match=r"since is .*; it must be a date"):
        client.usage(since=datetime(2026, 11, 10, 23, tzinfo=UTC))


def test_costs_by_job_come_in_the_order_of_the_jobs(db: sa.Engine, client: Client, small: registry.Space) -> None:
    with db.begin() as conn:
        for job in (100, 9, 10, 0):
            add_charge(conn, small, "1", on="2026-11-10", job=job)

    assert [row.key for row in client.usage("job").rows] == ["0", "9", "10", "100"]


def test_each_month_is_warned_of_anew(db: sa.Engine) -> None:
    november, december = (Budget(date(2026, month, 1), Decimal(9), Decimal(0), Decimal(10)) for month in (11, 12))
    with db.begin() as conn:
        given = [budget.due_notices(conn, month, warn_percent=80) for month in (november, december, november, december)]

    assert given == [(80,), (80,), (), ()]


# Committed money


@pytest.mark.parametrize(
    ("state", "committed"),
    [
        ("gathering", False),
        ("gathered", True),
        ("uploaded", True),
        ("creating", True),
        ("submitted", True),
        ("collecting", True),  # its files are read, and what is not yet read is not charged yet
        ("cleaning", False),
        ("closed", False),
    ],
)
def test_money_is_committed_from_the_gathering_until_all_is_charged(
    db: sa.Engine, settings: Settings, small: registry.Space, large: registry.Space, state: str, committed: bool
) -> None:
    limited = settings.model_copy(update={"openai_monthly_budget_usd": Decimal(1)})
    with db.begin() as conn:
        add_provider_batch(conn, small, state, n_tokens=10_000_000)  # 0.10 USD
        add_provider_batch(conn, large, n_tokens=1_000_000)  # 0.065 USD

        assert budget.committed(conn, settings) == Decimal("0.165" if committed else "0.065")
        assert budget.headroom(conn, limited) == Decimal("0.835" if committed else "0.935")


def test_a_charge_lowers_what_its_own_provider_batch_commits_and_no_other(
    db: sa.Engine, settings: Settings, small: registry.Space
) -> None:
    with db.begin() as conn:
        first, second = (add_provider_batch(conn, small, n_tokens=tokens) for tokens in (1_000_000, 8_000_000))
        today = str(charges.today(conn))
        add_charge(conn, small, "0.004", on=today, tokens=400_000, batch=first)
        add_charge(conn, small, "0.001", on=today, tokens=100_000, batch=first, job=8)
        add_charge(conn, small, "0.060", on=today, tokens=6_000_000, batch=second)
        add_charge(conn, small, "0.020", on=today, tokens=1_000_000)  # plain requests

        assert budget.committed(conn, settings) == Decimal("0.005") + Decimal("0.020")


def test_a_provider_batch_that_costs_more_than_estimated_frees_no_money_of_another(
    db: sa.Engine, settings: Settings, small: registry.Space
) -> None:
    with db.begin() as conn:
        dear, other = (add_provider_batch(conn, small, n_tokens=tokens) for tokens in (1_000_000, 5_000_000))
        add_charge(conn, small, "0.03", on=str(charges.today(conn)), tokens=3_000_000, batch=dear)
        assert other != dear
        assert budget.committed(conn, settings) == Decimal("0.05")


@pytest.mark.parametrize("zone", [EAST, "UTC", WEST])
@pytest.mark.parametrize("created", ["2026-11-10 00:00:00+00", "2026-11-10 12:00+00", "2026-11-10 23:59:59+00"])
def test_what_was_charged_is_not_committed_as_well(
    db: sa.Engine, settings: Settings, small: registry.Space, zone: str, created: str
) -> None:
    """Charges of a ProviderBatch are of the days from its creation on, and a batch may take more than one."""
    set_time_zone(db, zone)
    with db.begin() as conn:
        batch = add_provider_batch(conn, small, "collecting", n_tokens=9_000_000, created_at=sa.text(f"'{created}'"))
        add_charge(conn, small, "0.02", on="2026-11-10", tokens=2_000_000, batch=batch)
        add_charge(conn, small, "0.03", on="2026-11-11", tokens=3_000_000, batch=batch)

        assert budget.committed(conn, settings) == Decimal("0.04")
