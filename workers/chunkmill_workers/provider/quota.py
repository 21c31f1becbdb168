"""What to do when the account's quota has no room for a ProviderBatch: wait, and split it if waiting cannot help."""

from __future__ import annotations

import logging

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import LeaseLost, ProviderBusy
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_room
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.openai.plan.limits import limit_in
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.endings import return_all
from chunkmill_workers.provider.flow import StepReleased, pause_lane

logger = logging.getLogger(__name__)

REFUSALS = 3
"""How often a ProviderBatch is refused, with nothing else of ours at the provider, before it is split in two."""
LEAST_SHARE = 0.9
"""Share of a limit that we use, because providers count some tokens more than we do."""


def names_quota(message: str) -> bool:
    """Whether a refusal is about what may be queued at a time, and not about the pace of requests."""
    lower = message.lower()
    return "token_limit_exceeded" in lower or ("enqueued" in lower and "limit" in lower)


def too_many_tokens(context: ProviderContext, step: Step) -> bool:
    """Whether a ProviderBatch that was not sent holds more than may be at the provider at a time, and can be split."""
    with context.begin() as conn:
        return step.n_tokens > provider_room.max_tokens(conn, context.settings) and _can_be_cut(conn, step)


def refused_by_quota(context: ProviderContext, step: Step, busy: ProviderBusy) -> Step:
    """Create the batch again after a pause of the lane, or return its contents, to be packed into smaller ones.

    It is split at once if the limit that the refusal names is smaller than the batch. Without such a limit it is split
    after some refusals while nothing else of ours was at the provider. No attempt is charged.
    """
    limit, refusals = limit_in(str(busy)), step.refusals + 1

    def decide(conn: sa.Connection) -> Step | None:
        is_larger = limit is not None and step.n_tokens > limit
        is_alone = refusals >= REFUSALS and not provider_batches.any_other_at_provider(conn, step)
        if (is_larger or is_alone) and _can_be_cut(conn, step):
            most = int(limit * LEAST_SHARE) if limit is not None and is_larger else step.n_tokens // 2
            provider_lanes.learn_max_tokens(conn, Route.OPENAI, most)
            return return_all(conn, step, f"it holds {step.n_tokens:,} tokens, and is cut: {busy}")
        again = provider_batches.advance(
            conn, step, State.UPLOADED, batch_id=None, submitted_at=None, refusals=refusals, error=str(busy)
        )
        provider_batches.release(conn, again, delay_s=0.0)
        return None

    try:
        cut = context.transact(decide, "no room")
    except LeaseLost:
        pause_lane(context, Route.OPENAI, busy, tries=refusals)  # the lane must pause all the same
        raise
    no_room = f"{step.name}: the account's quota has no room for its {step.n_tokens} tokens"
    if cut is not None:
        logger.warning("%s; it is cut: %s", no_room, busy.brief)
        return cut
    delay_s = pause_lane(context, Route.OPENAI, busy, tries=refusals)
    logger.warning("%s; its lane pauses %.0f s: %s", no_room, delay_s, busy.brief)
    raise StepReleased


def _can_be_cut(conn: sa.Connection, step: Step) -> bool:
    return provider_inputs.count(conn, step.id) > 1
