"""The ways in which a ProviderBatch ends: its contents leave flight, and its ChunkBatches are settled or discarded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_work
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.openai.plan.endings import Isolate, Split
from chunkmill.spaces import registry
from chunkmill_workers.provider.context import ProviderContext

logger = logging.getLogger(__name__)


def settle(conn: sa.Connection, step: Step, **columns: Any) -> Step:
    """Move the ProviderBatch to ``cleaning`` and settle the ChunkBatches that waited for it.

    Call it after its contents have left flight. Its files may still be at the provider, and ``cleaning`` deletes them.
    """
    cleaning = provider_batches.advance(conn, step, State.CLEANING, **columns)
    provider_work.settle(conn, registry.get(conn, step.space_id), provider_work.members(conn, step.id))
    return cleaning


def give_back(context: ProviderContext, step: Step, why: str) -> Step:
    """End a ProviderBatch of which nothing was sent. Its contents wait again, and no attempt is charged."""
    logger.info("%s: given back, %s", step.name, why)

    def end(conn: sa.Connection) -> Step:
        provider_inputs.remove_all(conn, step.id)
        return settle(conn, step, error=why)

    return context.transact(end, "give back")


def give_up(context: ProviderContext, step: Step, *, code: str, reason: str) -> Step:
    """End a ProviderBatch for good. Its ChunkBatches are discarded with the reason; ``retry`` takes them up again."""
    logger.error("%s: given up, %s; the ledger has the provider's words", step.name, code)

    def end(conn: sa.Connection) -> Step:
        provider_inputs.remove_all(conn, step.id)
        cleaning = provider_batches.advance(conn, step, State.CLEANING, error_code=code, error=reason)
        provider_work.discard(conn, provider_work.members(conn, step.id), code=code, reason=f"{step.name}: {reason}")
        return cleaning

    return context.transact(end, "give up")


def repack(conn: sa.Connection, step: Step, verdict: Split | Isolate) -> Step:
    """End a ProviderBatch that failed validation. Its contents wait again, and will be packed differently."""
    returned = provider_inputs.remove_all(conn, step.id)
    if isinstance(verdict, Split):
        provider_lanes.learn_max_inputs(conn, Route.OPENAI, verdict.inputs)
    else:
        accused = [row for row in returned if row.packed.request_no in verdict.requests]
        provider_inputs.add_suspects(conn, step.space_id, [row.content_hash for row in accused])
        provider_work.bury_in_flight(conn, [(row, verdict.code, verdict.reason) for row in _alone(accused)])
    return settle(conn, step, n_returned=len(returned), error=verdict.reason, provider_status="failed")


def bury(conn: sa.Connection, step: Step, code: str, reason: str) -> Step:
    """End a ProviderBatch that failed validation and holds one content only: that content is dead."""
    returned = provider_inputs.remove_all(conn, step.id)
    provider_work.bury_in_flight(conn, [(row, code, reason) for row in returned])
    provider_inputs.drop_suspects(conn, step.space_id, [row.content_hash for row in returned])
    return settle(conn, step, n_dead=len(returned), error_code=code, error=reason, provider_status="failed")


def _alone(accused: Sequence[InFlight]) -> list[InFlight]:
    """The contents that had a request to themselves, so that no other content can be at fault."""
    contents_in = Counter(row.packed.request_no for row in accused)
    return [row for row in accused if contents_in[row.packed.request_no] == 1]
