"""How much more may be sent to the provider now, under the account's limits and the month's budget."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.prices import MILLION, price_on
from chunkmill.ledger.money import budget, charges
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space

LEAST_SHARE = 20
"""A twentieth of the account's tokens must be free: a small ProviderBatch may take a day as a full one does."""


@dataclass(frozen=True, slots=True)
class Room:
    """``usd`` None: no monthly budget. ``reason``: why there is none at all now; None where there is some."""

    tokens: int
    requests: int
    usd: Decimal | None = None
    usd_per_million: Decimal | None = None
    reason: str | None = None

    @property
    def affordable_tokens(self) -> int:
        """What is left of the account's tokens, as far as the month's money goes."""
        if self.usd is None or not self.usd_per_million:
            return self.tokens
        return min(self.tokens, int(self.usd * MILLION / self.usd_per_million))


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What of ours is at the provider, or about to be, and how many batches were made in the last hour or will be."""

    tokens: int
    requests: int
    batches: int
    made_in_an_hour: int


def enqueued(conn: sa.Connection) -> Enqueued:
    row = conn.execute(
        sa.text(
            "SELECT coalesce(sum(n_tokens), 0)::bigint AS tokens, coalesce(sum(n_requests), 0)::bigint AS requests, "
            "count(*) AS batches, (SELECT count(*) FROM provider_batches "
            "                      WHERE creating_since > now() - interval '1 hour' "
            "                      OR (creating_since IS NULL AND state IN ('gathered', 'uploaded'))) AS made "
            "FROM provider_batches WHERE state IN ('gathered', 'uploaded', 'creating', 'submitted')"
        )
    ).one()
    return Enqueued(row.tokens, row.requests, row.batches, row.made)


def room(conn: sa.Connection, settings: Settings, space: Space) -> Room:
    """For one more ProviderBatch of a space."""
    used = enqueued(conn)
    model = model_for(settings, space.spec)
    price = price_on(model.prices, conn.execute(sa.text(f"SELECT {charges.TODAY}")).scalar_one()) if model else None
    left = Room(
        settings.openai_max_enqueued_tokens - used.tokens,
        settings.openai_max_enqueued_requests - used.requests,
        budget.headroom(conn, settings),
        price.batch if price else None,
    )
    return Room(left.tokens, left.requests, left.usd, left.usd_per_million, _reason(conn, settings, left, used))


def _reason(conn: sa.Connection, settings: Settings, left: Room, used: Enqueued) -> str | None:
    if left.usd is not None and left.usd_per_million and left.usd <= 0:
        return budget.read(conn, settings).refusal()
    if used.made_in_an_hour >= settings.openai_max_batches_per_hour:
        return f"{used.made_in_an_hour} ProviderBatches in the last hour (OPENAI_MAX_BATCHES_PER_HOUR)"
    if used.batches and left.tokens < settings.openai_max_enqueued_tokens / LEAST_SHARE:
        return f"{used.tokens:,} tokens are at the provider (OPENAI_MAX_ENQUEUED_TOKENS); it goes on as batches end"
    if left.requests <= 0:
        return f"{used.requests:,} requests are at the provider (OPENAI_MAX_ENQUEUED_REQUESTS)"
    return None
