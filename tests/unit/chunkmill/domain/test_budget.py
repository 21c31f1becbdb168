from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from chunkmill.domain.budget import Budget, dollars, due_percents
from chunkmill.errors import BudgetExceeded


def budget(spent: str, committed: str = "0", limit: str | None = "10", month: date = date(2026, 11, 1)) -> Budget:
    return Budget(month, Decimal(spent), Decimal(committed), None if limit is None else Decimal(limit))


def test_headroom_is_what_is_neither_spent_nor_committed() -> None:
    assert budget("3.5", "2").headroom == Decimal("4.5")
    assert budget("12", "0").headroom == 0  # a charge may come out over the estimate
    assert budget("12", limit=None).headroom is None


@pytest.mark.parametrize(
    ("spent", "committed", "limit", "used_up", "exceeded", "percent"),
    [
        ("9.99", "0", "10", False, False, 99),
        ("9.9999999", "0", "10", False, False, 99),
        ("9.99", "0.01", "10", True, False, 100),  # what just fits is not too much
        ("9.99", "0.0100000001", "10", True, True, 100),
        ("10", "0", "10", True, False, 100),
        ("0", "0", "0", True, False, 100),
        ("99", "99", None, False, False, None),
    ],
)
def test_when_it_is_used_up_and_when_exceeded(
    spent: str, committed: str, limit: str | None, used_up: bool, exceeded: bool, percent: int | None
) -> None:
    given = budget(spent, committed, limit)
    assert (given.is_used_up, given.exceeds(), given.percent) == (used_up, exceeded, percent)


def test_a_month_ends_with_the_first_of_the_next() -> None:
    assert budget("0", month=date(2026, 11, 1)).ends == date(2026, 12, 1)
    assert budget("0", month=date(2026, 12, 1)).ends == date(2027, 1, 1)


def test_the_refusal_says_all_that_one_needs() -> None:
    said = budget("9.5", "0.75").refusal()
    for part in (
        "2026-11",
        "9.50 USD spent",
        "0.75 USD committed",
        "10 USD",
        "OPENAI_MONTHLY_BUDGET_USD",
        "2026-12-01",
    ):
        assert part in said
    assert BudgetExceeded.http_status == 402


@pytest.mark.parametrize(
    ("spent", "due"), [("0", ()), ("7.99", ()), ("8", (80,)), ("9.999", (80,)), ("10", (80, 100)), ("25", (80, 100))]
)
def test_warnings_are_due_at_the_threshold_and_at_the_limit(spent: str, due: tuple[int, ...]) -> None:
    assert due_percents(budget(spent), 80) == due
    assert due_percents(budget(spent, limit=None), 80) == ()


def test_a_warning_at_100_percent_is_one_warning() -> None:
    assert due_percents(budget("10"), 100) == (100,)


@pytest.mark.parametrize(
    ("usd", "shown"),
    [("0", "0.00"), ("1234.5", "1,234.50"), ("0.02", "0.020"), ("0.00001234", "0.000012"), ("1", "1.00")],
)
def test_small_amounts_are_told_from_nothing(usd: str, shown: str) -> None:
    assert dollars(Decimal(usd)) == shown
