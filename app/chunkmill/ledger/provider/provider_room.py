"""How much more may be sent to the provider now, under the account's limits and the month's budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.domain.prices import MILLION
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.ledger.money import budget, charges
from chunkmill.ledger.provider import provider_lanes
from chunkmill.ledger.provider.provider_batches import ENDED
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space

LEAST_SHARE = 20
"""A ProviderBatch is made only if a twentieth of the account's tokens is free, because a small one may take a day just
as a full one does."""

_ENQUEUED = [state for state in State if state.is_enqueued]


@dataclass(frozen=True, slots=True)
class ProviderRoom:
    """What one more ProviderBatch of a space may hold.

    ``usd`` is None if there is no monthly budget. ``reason`` says why there is no room at all now; None if there is.
    """

    tokens: int
    requests: int
    usd: Decimal | None = None
    usd_per_million: Decimal | None = None
    reason: str | None = None

    def usd_of(self, tokens: int) -> Decimal:
        """What ``tokens`` cost in a ProviderBatch; 0 if the price is not known."""
        return tokens * (self.usd_per_million or 0) / MILLION

    @property
    def affordable_tokens(self) -> int:
        """How many tokens may be sent: what is left of the account's limit, or less if the month's money does not pay
        for that.
        """
        if self.usd is None or not self.usd_per_million:
            return self.tokens
        return min(self.tokens, int(self.usd * MILLION / self.usd_per_million))


@dataclass(frozen=True, slots=True)
class EnqueuedTotals:
    """What we have at the provider or are about to send, and how many ProviderBatches were made in the last hour.

    A batch that the provider has ended is not in its queue any more, although we may still look for its result files.
    ``made_in_an_hour`` includes those that are about to be made.
    """

    tokens: int
    requests: int
    provider_batches: int
    made_in_an_hour: int


def enqueued(conn: sa.Connection) -> EnqueuedTotals:
    row = conn.execute(
        sa.text("""
            SELECT coalesce(sum(n_tokens), 0)::bigint AS tokens,
                   coalesce(sum(n_requests), 0)::bigint AS requests,
                   count(*) AS provider_batches,
                   (
                       SELECT count(*) FROM provider_batches
                       WHERE creating_since > now() - interval '1 hour'
                          OR (creating_since IS NULL AND state IN (:gathered, :uploaded))
                   ) AS made
            FROM provider_batches
            WHERE state = ANY(:enqueued)
              AND (state = :submitted AND provider_status = ANY(:ended)) IS NOT TRUE
        """),
        {
            "enqueued": _ENQUEUED,
            "gathered": State.GATHERED,
            "uploaded": State.UPLOADED,
            "submitted": State.SUBMITTED,
            "ended": ENDED,
        },
    ).one()
    return EnqueuedTotals(row.tokens, row.requests, row.provider_batches, row.made)


def room(conn: sa.Connection, settings: Settings, space: Space) -> ProviderRoom:
    """The room for one more ProviderBatch of a space."""
    used, most = enqueued(conn), max_tokens(conn, settings)
    price = charges.price_today(conn, model_for(settings, space.spec))
    left = ProviderRoom(
        most - used.tokens,
        settings.openai_max_enqueued_requests - used.requests,
        budget.headroom(conn, settings),
        price.batch_api if price else None,
    )
    return replace(left, reason=budget.why_unpriced(settings, space.spec) or _reason(conn, settings, left, used, most))


def max_tokens(conn: sa.Connection, settings: Settings) -> int:
    """How many tokens may be at the provider at a time: what the setting allows, or less if the provider refused it."""
    learnt = provider_lanes.lane(conn, Route.OPENAI).max_tokens
    return min(settings.openai_max_enqueued_tokens, learnt or settings.openai_max_enqueued_tokens)


def _limit(settings: Settings, most: int) -> str:
    if most == settings.openai_max_enqueued_tokens:
        return "OPENAI_MAX_ENQUEUED_TOKENS"
    return f"the limit of {most:,} that the provider's refusals have taught (chunkmill lanes resume openai forgets it)"


def _reason(conn: sa.Connection, settings: Settings, left: ProviderRoom, used: EnqueuedTotals, most: int) -> str | None:
    if left.usd is not None and left.usd_per_million and left.usd <= 0:
        return budget.read(conn, settings).refusal()
    if used.made_in_an_hour >= settings.openai_max_batches_per_hour:
        return f"{used.made_in_an_hour} ProviderBatches in the last hour (OPENAI_MAX_BATCHES_PER_HOUR)"
    if used.provider_batches and left.tokens < most / LEAST_SHARE:
        return (
            f"{used.tokens:,} tokens are at the provider, which is all that {_limit(settings, most)} allows; work "
            "continues as ProviderBatches end"
        )
    if left.requests <= 0:
        return f"{used.requests:,} requests are at the provider (OPENAI_MAX_ENQUEUED_REQUESTS)"
    return None
