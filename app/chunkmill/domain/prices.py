"""What providers ask per million tokens, since when. Pure.

Prices change, and old charges stay what they were: a price is looked up for the day of the charge. ``OPENAI_MODELS``
overrides them (``chunkmill.domain.providers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Final

MILLION: Final = Decimal(1_000_000)


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million input tokens from ``since`` on: of the plain endpoint, and of the Batch API."""

    since: date
    standard: Decimal
    batch: Decimal

    def of(self, tokens: int, *, batch: bool) -> Decimal:
        """US dollars for ``tokens``."""
        return tokens * (self.batch if batch else self.standard) / MILLION


OPENAI_PRICES: Final = {
    # OpenAI's model pages; the Batch API is half of it ("50 % discount"), as its FAQ says. Looked up 2026-11-20.
    "text-embedding-3-small": (Price(date(2024, 1, 25), Decimal("0.02"), Decimal("0.01")),),
    "text-embedding-3-large": (Price(date(2024, 1, 25), Decimal("0.13"), Decimal("0.065")),),
    "text-embedding-ada-002": (Price(date(2023, 6, 13), Decimal("0.10"), Decimal("0.05")),),
}


def price_on(prices: tuple[Price, ...], day: date) -> Price | None:
    """The price in force on ``day``: the latest that began by then; the first one for a day before all."""
    if not prices:
        return None
    begun = [price for price in prices if price.since <= day]
    return max(begun, key=lambda price: price.since) if begun else min(prices, key=lambda price: price.since)
