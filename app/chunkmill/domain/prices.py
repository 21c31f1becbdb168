"""What providers charge per million tokens, and since when. Pure.

Prices change, and old charges stay what they were: a price is looked up for the day of the charge. ``OPENAI_MODELS``
overrides these prices (``chunkmill.domain.providers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Final

from chunkmill.domain.states import Route

MILLION: Final = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million input tokens from the day ``since`` on: for plain requests, and for the Batch API."""

    since: date
    plain: Decimal
    batch_api: Decimal

    def of(self, tokens: int, route: Route) -> Decimal:
        """US dollars for ``tokens`` on a paid route."""
        return tokens * (self.batch_api if route is Route.OPENAI else self.plain) / MILLION


OPENAI_PRICES: Final = {
    # From OpenAI's model pages. The Batch API costs half ("50 % discount"), as its FAQ says. Looked up on 2026-11-20.
    "text-embedding-3-small": (Price(date(2024, 1, 25), Decimal("0.02"), Decimal("0.01")),),
    "text-embedding-3-large": (Price(date(2024, 1, 25), Decimal("0.13"), Decimal("0.065")),),
    "text-embedding-ada-002": (Price(date(2023, 6, 13), Decimal("0.10"), Decimal("0.05")),),
}


def price_on(prices: tuple[Price, ...], day: date) -> Price | None:
    """The price in force on ``day``: the latest that has begun; on a day before all of them, the first."""
    if not prices:
        return None
    begun = [price for price in prices if price.since <= day]
    return max(begun, key=lambda price: price.since) if begun else min(prices, key=lambda price: price.since)
