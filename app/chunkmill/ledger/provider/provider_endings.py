"""Ends ProviderBatches without asking the provider: what was not sent is given back, what is stuck is let go.

A worker that holds the lease of such a ProviderBatch loses it, and can change nothing any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from chunkmill.domain.results import Abandoned
from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.ledger.money import charges
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_losses, provider_work
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry

ABANDONED = "abandoned"
"""The code of a ProviderBatch that a person has let go."""


def settle(conn: sa.Connection, step: Step, **columns: object) -> Step:
    """Move a ProviderBatch to ``cleaning`` and settle the ChunkBatches that waited for it.

    Call it when none of its contents is in flight any more. Its files may still be at the provider, and ``cleaning``
    deletes them.
    """
    cleaning = provider_batches.advance(conn, step, State.CLEANING, **columns)
    provider_work.settle(conn, registry.get(conn, step.space_id), provider_work.members(conn, step.id))
    return cleaning


def give_back_unsent(conn: sa.Connection, why: str, *, of_jobs: Sequence[int] | None = None) -> int:
    """Give back ProviderBatches of which nothing was created; returns how many. Their contents wait again, uncharged.

    With ``of_jobs``, only those for which these jobs wait.
    """
    if not provider_batches.can_be_taken_over(conn):
        return 0
    steps = provider_batches.take_over_unsent(conn, of_jobs=of_jobs)
    for step in steps:
        provider_inputs.remove_all(conn, step.id)
        settle(conn, step, error=why)
    return len(steps)


def abandon(conn: sa.Connection, settings: Settings, provider_batch_id: int) -> Abandoned:
    """Let go of a ProviderBatch, whatever the provider does with it.

    Its contents wait again. If they may have been sent, they are booked. Its files are deleted when a worker can; a
    second call no longer waits for that. Raises :class:`NotFound` and :class:`InvalidInput`.
    """
    step = provider_batches.take_over(conn, provider_batch_id)
    if step is None:
        raise NotFound(f"there is no ProviderBatch {provider_batch_id}; `chunkmill lanes` lists the open ones.")
    if step.state is State.CLOSED:
        raise InvalidInput(f"ProviderBatch {provider_batch_id} is closed: nothing waits for it.")
    if step.state is State.CLEANING:
        provider_batches.close(conn, step)
        return Abandoned(step.id, 0, may_be_charged=False)
    left = provider_inputs.remove_all(conn, step.id)
    may_be_charged = step.state not in (State.GATHERING, State.GATHERED, State.UPLOADED)
    space = registry.get(conn, step.space_id)
    if may_be_charged:
        price = charges.price_today(conn, model_for(settings, space.spec))
        reason = f"{step.name} was abandoned at step {step.state}"
        provider_losses.book_unanswered(conn, price, step, left, may_have_run=True, reason=reason)
    returned = provider_batches.plus("n_returned", len(left))
    settle(conn, step, error_code=ABANDONED, error="abandoned by a person", n_returned=returned)
    return Abandoned(step.id, len(left), may_be_charged)
