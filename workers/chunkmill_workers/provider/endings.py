"""The ways in which a ProviderBatch ends: its contents leave flight, and its ChunkBatches are settled or discarded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.errors import ProviderStopped
from chunkmill.ledger.money import charges
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_losses, provider_work
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_endings import settle
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.openai.catalogue import model_for
from chunkmill.openai.plan.endings import Isolate, Split
from chunkmill.openai.wire.bounds import believed_tokens
from chunkmill.openai.wire.status import RemoteBatch
from chunkmill.spaces import registry
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.oddities import tokens_factor

logger = logging.getLogger(__name__)

VANISHED = "vanished"
"""The ``provider_status`` of a batch that the provider does not know any more."""


def require_own_key(context: ProviderContext, step: Step, what: str) -> None:
    """Raise :class:`ProviderStopped` if the ProviderBatch is followed with another key than this worker's.

    In that case, that the provider does not find the batch proves nothing, because keys of another project do not see
    it.
    """
    if step.key_digest in (None, context.provider.key_digest):
        return
    raise ProviderStopped(
        f"{step.name} was made with another key of {context.provider.server}, and with this worker's key the provider "
        f"does not find {what}",
        provider_code="other_key",
        advice="Give all workers on queue openai a key of the project that made it, or let go of it (chunkmill lanes "
        f"abandon {step.id}), then: chunkmill lanes resume openai",
    )


def give_back(context: ProviderContext, step: Step, why: str) -> Step:
    """End a ProviderBatch of which nothing was sent. Its contents wait again, and no attempt is charged."""
    logger.info("%s: given back, %s", step.name, why)

    def end(conn: sa.Connection) -> Step:
        provider_inputs.remove_all(conn, step.id)
        return settle(conn, step, error=why)

    return context.transact(end, "give back")


def give_up(
    context: ProviderContext, step: Step, *, code: str, reason: str, may_have_run: bool = False, **columns: Any
) -> Step:
    """End a ProviderBatch for good. Its ChunkBatches are discarded with the reason; ``retry`` takes them up again.

    With ``may_have_run``, what the provider charged for it, or may have charged, is booked.
    """
    logger.error("%s: given up, %s; the ledger has the provider's words", step.name, code)

    def end(conn: sa.Connection) -> Step:
        left = provider_inputs.remove_all(conn, step.id)
        given_up = provider_batches.note(conn, step, **columns) if columns else step
        book_unanswered(conn, context, given_up, left, may_have_run=may_have_run, reason=f"{step.name}: {reason}")
        cleaning = provider_batches.advance(conn, given_up, State.CLEANING, error_code=code, error=reason)
        provider_work.discard(conn, provider_work.members(conn, step.id), code=code, reason=f"{step.name}: {reason}")
        return cleaning

    return context.transact(end, "give up")


def book_unanswered(
    conn: sa.Connection,
    context: ProviderContext,
    step: Step,
    left: Sequence[InFlight],
    *,
    may_have_run: bool,
    reason: str,
) -> None:
    """Book what a ProviderBatch cost beyond what its lines confirmed (`provider_losses.book_unanswered`)."""
    price = charges.price_today(conn, model_for(context.settings, registry.get(conn, step.space_id).spec))
    provider_losses.book_unanswered(conn, price, step, left, may_have_run=may_have_run, reason=reason)


def believed_usage(context: ProviderContext, step: Step, remote: RemoteBatch) -> int | None:
    """How many tokens the provider charged for the whole batch; None if it does not say, or if its number cannot be
    true of this model.
    """
    if remote.used_tokens is None:
        return None
    with context.begin() as conn:
        space = registry.get(conn, step.space_id)
    said = {"total_tokens": remote.used_tokens}
    return believed_tokens(said, step.n_tokens, tokens_factor(context.model(space)))[0]


def book_doubled(context: ProviderContext, step: Step, other: RemoteBatch) -> None:
    """Book what a second batch of the same file cost, once for each such batch. Its files are deleted."""
    used = believed_usage(context, step, other) or (step.n_tokens if other.completed else 0)
    if not used:
        return

    def book(conn: sa.Connection) -> None:
        price = charges.price_today(conn, model_for(context.settings, registry.get(conn, step.space_id).spec))
        provider_losses.book_doubled(
            conn, price, step, used, reason=f"{step.name} was at the provider twice: {other.id}"
        )

    context.transact(book, "book the second batch")
    for file_id in (other.output_file_id, other.error_file_id):
        if file_id:
            context.provider.delete_file(file_id)


def return_all(conn: sa.Connection, step: Step, reason: str) -> Step:
    """End a ProviderBatch of which nothing ran. Its contents wait again, uncharged, to be packed differently."""
    returned = provider_inputs.remove_all(conn, step.id)
    return settle(conn, step, n_returned=len(returned), error=reason, provider_status="failed")


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
