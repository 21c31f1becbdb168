"""What no answer confirmed is shown wherever money is, and a person's correction is booked once, with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from chunkmill import AdjustmentKind, Client
from chunkmill.cli.__main__ import cli
from chunkmill.domain.prices import Price
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.ledger.money import adjustments, budget, charges
from chunkmill.monitor import snapshot
from chunkmill.monitor.gauges import _of_snapshot
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.telemetry import metrics
from tests.support.paid_ledger import LARGE, SMALL, add_charge, add_provider_batch, register, set_time_zone
from tests.support.waiting import together

PRICE = Price(date(2020, 1, 1), Decimal(2), Decimal(1))
MAYBE = AdjustmentKind.MAYBE_CHARGED


@pytest.fixture
def small(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings)


@pytest.fixture
def large(db: sa.Engine, settings: Settings) -> registry.Space:
    return register(db, settings, LARGE, 256)


@pytest.fixture
def month(db: sa.Engine) -> date:
    """The first day of this month in UTC."""
    with db.begin() as conn:
        return charges.today(conn).replace(day=1)


@pytest.fixture
def call(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("REDIS_URL", settings.require_redis_url())
    return lambda *arguments: CliRunner().invoke(cli, list(arguments))


def lose(db: sa.Engine, space: registry.Space, job: int, on: date | None = None, **changed: Any) -> None:
    values = {"kind": AdjustmentKind.LOST, "route": Route.OPENAI, "contents": 3, "tokens": 1_000_000, **changed}
    with db.begin() as conn:
        adjustments.add_tokens(conn, PRICE, space_id=space.id, job_id=job, reason=f"why {job}", **values)
        if on is not None:
            conn.execute(sa.text("UPDATE adjustments SET day = :on WHERE job_id = :job"), {"on": on, "job": job})


def correct(client: Client, usd: str, day: date, **changed: Any) -> Any:
    given = {"route": "openai", "reason": "the invoice says so", "author": "ada", **changed}
    return client.correct_charge(usd, day=day, **given)


@pytest.fixture
def booked(db: sa.Engine, client: Client, small: registry.Space, large: registry.Space, month: date) -> None:
    """Of both kinds, on both routes, in two months."""
    before = month - timedelta(days=1)
    with db.begin() as conn:
        add_charge(conn, small, "5", on=str(month), job=1, batch=1)
        add_charge(conn, large, "7", on=str(before), job=2)
    lose(db, small, job=1, on=month)
    lose(db, large, job=2, on=month, kind=MAYBE, route=Route.OPENAI_SYNC)
    lose(db, large, job=3, on=before, route=Route.OPENAI_SYNC, tokens=2_000_000)
    correct(client, "-0.25", month)


# What is shown


def test_costs_have_what_no_answer_confirmed_as_parts_of_their_sums(
    client: Client, booked: None, month: date, small: registry.Space
) -> None:
    rows = client.usage("month").rows
    assert [(r.key, r.route, r.usd, r.lost_usd, r.maybe_charged_usd, r.corrected_usd) for r in rows] == [
        (f"{month - timedelta(days=1):%Y-%m}", "openai-sync", 7 + 4, 4, 0, 0),
        (f"{month:%Y-%m}", "openai", Decimal("5.75"), 1, 0, Decimal("-0.25")),
        (f"{month:%Y-%m}", "openai-sync", 2, 0, 2, 0),
    ]
    assert {(r.key, r.usd) for r in client.usage("model").rows} == {
        (SMALL, 6), (LARGE, 13), ("(no model)", Decimal("-0.25")),
    }  # fmt: skip
    assert {(r.key, r.usd) for r in client.usage("job").rows} == {
        ("0", Decimal("-0.25")), ("1", 6), ("2", 7 + 2), ("3", 4),
    }  # fmt: skip
    this_month = client.usage("route", since=month)
    spent = this_month.budget
    assert spent.spent == sum(row.usd or 0 for row in this_month.rows) == Decimal("7.75")
    assert (spent.lost, spent.maybe_charged, spent.corrected) == (1, 2, Decimal("-0.25"))
    assert "7.75 USD spent (with 1.00 lost, 2.00 maybe charged, -0.25 of corrections)" in spent.sentence()


def test_every_adjustment_is_listed_with_its_reason(client: Client, booked: None, month: date) -> None:
    listed = client.adjustments()
    assert [(a.kind, a.route, a.model, a.job_id, a.usd, a.reason, a.author) for a in listed] == [
        ("correction", "openai", None, 0, Decimal("-0.25"), "the invoice says so", "ada"),
        ("lost", "openai-sync", LARGE, 3, 4, "why 3", None),
        ("maybe_charged", "openai-sync", LARGE, 2, 2, "why 2", None),
        ("lost", "openai", SMALL, 1, 1, "why 1", None),
    ]
    assert [a.job_id for a in client.adjustments("lost")] == [3, 1]
    assert [a.job_id for a in client.adjustments("lost", since=month)] == [1]
    assert [a.job_id for a in client.adjustments(limit=2)] == [0, 3]


def test_the_commands_show_it(call: Callable[..., Result], booked: None) -> None:
    shown = call("cost")
    assert "corrected" in shown.stdout.splitlines()[0]
    assert "maybe charged" in shown.stdout.splitlines()[0]
    assert "chunkmill cost adjustments" in shown.stderr
    rows = json.loads(call("cost", "--json").stdout)["rows"]
    assert [(r["usd"], r["lost_usd"], r["maybe_charged_usd"], r["corrected_usd"]) for r in rows] == [
        ("11", "4", "0", "0"), ("5.75", "1", "0", "-0.25"), ("2", "0", "2", "0"),
    ]  # fmt: skip
    assert "why 3" in call("cost", "adjustments", "--kind", "lost").stdout
    assert json.loads(call("cost", "adjustments", "--json").stdout)[0]["author"] == "ada"
    lanes = json.loads(call("lanes", "--json").stdout)
    assert [(lane["lost_usd"], lane["maybe_charged_usd"]) for lane in lanes] == [("1", "0"), ("0", "2")]
    assert "1.00 USD" in call("lanes").stdout
    assert "1.00 USD lost, 2.00 USD maybe charged this month" in call("status").stdout
    money = json.loads(call("status", "--json").stdout)["database"]["money_usd"]
    assert (money["month"], money["lost"], money["maybe_charged"], money["corrected"]) == ("7.75", "1", "2", "-0.25")


def test_the_metrics_have_it(db: sa.Engine, settings: Settings, booked: None, month: date) -> None:
    with db.begin() as conn:
        looked = snapshot.take(conn, settings)
        on_first = charges.today(conn) == month
    values = {(metric, labels): value for metric, labels, value in _of_snapshot(looked)}
    assert [values[metrics.ADJUSTED, (kind,)] for kind in ("lost", "maybe_charged", "correction")] == [1, 2, -0.25]
    assert values[metrics.CHARGED, ("month",)] == 7.75
    assert values[metrics.CHARGED, ("today",)] == (7.75 if on_first else 0)


def test_without_adjustments_nothing_of_them_is_shown(
    call: Callable[..., Result], db: sa.Engine, small: registry.Space, large: registry.Space, month: date
) -> None:
    with db.begin() as conn:
        add_charge(conn, small, "5", on=str(month))
        add_charge(conn, large, "6", on=str(month))
    assert "lost" not in call("cost").stdout + call("status").stdout
    assert "all that is booked was confirmed" in call("cost", "adjustments").stdout


def test_lost_tokens_of_an_open_provider_batch_are_spent_and_not_committed_as_well(
    db: sa.Engine, settings: Settings, small: registry.Space, large: registry.Space
) -> None:
    """What may have been charged stays committed, because it may be sent again."""
    with db.begin() as conn:
        lossy = add_provider_batch(conn, small, n_tokens=5_000_000)
        unsure = add_provider_batch(conn, large, n_tokens=2_000_000)
    lose(db, small, job=1, provider_batch_id=lossy)
    lose(db, large, job=2, provider_batch_id=unsure, kind=MAYBE)
    with db.begin() as conn:
        assert budget.committed(conn, settings) == 4 * Decimal("0.01") + 2 * Decimal("0.065")


# Corrections


def test_the_same_correction_is_booked_once(client: Client, booked: None, month: date) -> None:
    before = client.usage().budget.spent
    first, again = (correct(client, "-0.50", month, reason="batch 7 was free") for _ in range(2))
    other = correct(client, "-0.50", month, reason="batch 8 was free")
    named = correct(client, "-0.50", month, reason="batch 8 was free", key="november-9")
    assert (first.is_new, again.is_new, other.is_new, named.is_new) == (True, False, True, True)
    assert again.adjustment == first.adjustment
    assert client.usage().budget.spent == before - Decimal("1.50")
    with pytest.raises(InvalidInput, match=r"key 'november-9' is that of another correction: -0\.50 USD on route"):
        correct(client, "-0.40", month, key="november-9")


def test_corrections_at_once_are_booked_once_and_take_back_no_more_than_there_is(
    client: Client, booked: None, month: date
) -> None:
    same = together(*[lambda: correct(client, "-0.50", month).is_new] * 4)
    assert sorted(same) == [False, False, False, True]

    def take(n: int) -> bool:
        try:
            return bool(correct(client, "-3", month, key=str(n)).is_new)
        except InvalidInput:
            return False

    assert sum(together(*(lambda n=n: take(n) for n in range(4)))) == 1  # of 5.25 USD
    assert client.usage("route", since=month).rows[0].usd == Decimal("2.25")


def test_a_correction_belongs_to_its_month_its_job_and_its_model(client: Client, booked: None, month: date) -> None:
    before = month - timedelta(days=1)
    spent = client.usage().budget.spent
    made = correct(client, "-1", before, route="openai-sync", job_id=2).adjustment
    assert (made.model, made.job_id, made.day) == (LARGE, 2, before)
    assert correct(client, "3", before, model=SMALL).adjustment.model == SMALL
    assert client.usage().budget.spent == spent
    assert {r.key: r.corrected_usd for r in client.usage("month").rows if r.corrected_usd == -1} == {
        f"{before:%Y-%m}": -1
    }
    with pytest.raises(InvalidInput, match=r"takes back 6\.5 USD, and only 6 USD are booked of job 2 on route openai-"):
        correct(client, "-6.5", before, route="openai-sync", job_id=2)
    with pytest.raises(InvalidInput, match=r"only 5\.75 USD are booked on route openai in"):
        correct(client, "-5.76", month)
    with pytest.raises(NotFound, match="no space of model 'nothing'"):
        correct(client, "1", month, model="nothing")


def test_a_correction_is_on_a_day_that_has_begun_in_utc(
    db: sa.Engine, settings: Settings, client: Client, booked: None, month: date
) -> None:
    """The database is a day ahead of UTC for the most part of a day."""
    set_time_zone(db, "Etc/GMT-14")
    client._db.dispose()
    with db.begin() as conn:
        today = charges.today(conn)
    assert correct(client, "1", today).is_new
    with pytest.raises(InvalidInput, match=r"the day of the correction is .*, which has not begun .UTC."):
        correct(client, "1", today + timedelta(days=1))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"usd": "0"}, "usd is '0'; it must be an amount other than 0"),
        ({"usd": "NaN"}, "usd is 'NaN'"),
        ({"usd": "much"}, "usd is 'much'; it must be an amount such as -1.25"),
        ({"usd": 0.1}, "usd is 0.1; it must be a Decimal"),
        ({"usd": "1e-30"}, "at most 18 places"),
        ({"route": "local"}, "route is 'local'; charges are booked on openai and openai-sync"),
        ({"reason": " "}, "reason is"),
        ({"author": ""}, "author is"),
        ({"key": "\x00"}, "key is"),
        ({"job_id": -1}, "job_id is -1"),
        ({"day": "2026-11-01"}, "day is of type str; it must be a date"),
    ],
)
def test_a_wrong_correction_is_refused_and_named(
    client: Client, month: date, rows: Callable[[str], int], changed: dict[str, Any], said: str
) -> None:
    given: dict[str, Any] = {
        "usd": "1", "route": "openai", "reason": "why", "author": "ada", "day": month, **changed,
    }  # fmt: skip
    with pytest.raises(InvalidInput) as refused:
        client.correct_charge(given.pop("usd"), **given)
    assert said in str(refused.value)
    assert rows("adjustments") == 0


def test_the_command_asks_first_and_corrects_once(
    call: Callable[..., Result], booked: None, month: date, rows: Callable[[str], int]
) -> None:
    arguments = ("cost", "correct", "--usd", "-1.25", "--route", "openai", "--month", f"{month:%Y-%m}", "--reason",
                 "not on the invoice", "--who", "grace")  # fmt: skip
    before = rows("adjustments")
    assert "pass --yes" in call(*arguments).stderr
    assert "either --month or --day" in call(*arguments, "--day", f"{month}").stderr
    assert rows("adjustments") == before
    assert f"Booked -1.25 USD on route openai in {month:%Y-%m} as adjustment" in call(*arguments, "--yes").stdout
    assert "Nothing was booked" in call(*arguments, "--yes").stdout
    assert json.loads(call(*arguments, "--yes", "--json").stdout)["is_new"] is False
    assert rows("adjustments") == before + 1
    shown = call("cost", "adjustments", "--kind", "correction").stdout
    assert "not on the invoice" in shown
    assert "grace" in shown


def test_the_last_schema_cannot_keep_corrections_and_says_so(db: sa.Engine, small: registry.Space, month: date) -> None:
    lose(db, small, job=1)
    with db.connect() as conn:
        conn.execute(sa.text("ALTER TABLE adjustments DROP COLUMN key"))
        assert [a.reason for a in adjustments.listed(conn, kind=None, since=None, limit=9)] == ["why 1"]
        with pytest.raises(Exception, match="Run: chunkmill migrate"):
            adjustments.correct(conn, Decimal(1), route=Route.OPENAI, day=month, reason="why", author="ada", key="k")
        conn.rollback()


# Exact money


def test_bookings_of_single_tokens_add_up_to_the_last_digit(
    db: sa.Engine, client: Client, small: registry.Space, large: registry.Space
) -> None:
    """At 0.00935 USD per million tokens, ten places were half a per cent too much for a token."""
    price = Price(date(2020, 1, 1), Decimal("0.00935"), Decimal("0.004675"))
    with db.begin() as conn:
        for tokens in (1, 7) * 500:
            for space, route in ((small, Route.OPENAI_SYNC), (large, Route.OPENAI)):
                charges.book_tokens(conn, price, route=route, space_id=space.id, contents=1, tokens=tokens)
    sums = {row.route: (row.tokens, row.usd) for row in client.usage("route").rows}
    assert sums == {
        Route.OPENAI_SYNC: (4_000, Decimal("0.0000374")),
        Route.OPENAI: (4_000, Decimal("0.0000187")),
    }
