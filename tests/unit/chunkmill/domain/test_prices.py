"""A price holds from its first day on, and each day has exactly one."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from chunkmill.domain.prices import Price, price_on
from chunkmill.domain.states import Route

FIRST = Price(date(2026, 3, 1), Decimal("0.02"), Decimal("0.01"))
SECOND = Price(date(2026, 7, 1), Decimal("0.04"), Decimal("0.03"))
THIRD = Price(date(2026, 12, 1), Decimal("0.08"), Decimal("0.05"))


@pytest.mark.parametrize("prices", [(FIRST, SECOND, THIRD), (THIRD, FIRST, SECOND)])
@pytest.mark.parametrize(
    ("day", "price"),
    [
        (date(2020, 1, 1), FIRST),  # before all of them: nothing is free because a price is new
        (date(2026, 3, 1), FIRST),
        (date(2026, 6, 30), FIRST),
        (date(2026, 7, 1), SECOND),
        (date(2026, 7, 2), SECOND),
        (date(2026, 11, 30), SECOND),
        (date(2026, 12, 1), THIRD),
        (date(2030, 1, 1), THIRD),
    ],
)
def test_a_price_holds_from_its_first_day_until_the_next_begins(
    prices: tuple[Price, ...], day: date, price: Price
) -> None:
    assert price_on(prices, day) == price


def test_a_model_without_prices_has_none() -> None:
    assert price_on((), date(2026, 7, 1)) is None


def test_a_price_is_for_a_million_tokens_of_its_endpoint() -> None:
    assert SECOND.of(1_000_000, Route.OPENAI) == Decimal("0.03")
    assert SECOND.of(1_000_000, Route.OPENAI_SYNC) == Decimal("0.04")
    assert SECOND.of(1, Route.OPENAI) == Decimal("0.00000003")
