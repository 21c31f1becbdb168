"""Fills a ProviderBatch with contents that wait for its space, in one transaction: all are in flight, or none."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import sqlalchemy as sa

from chunkmill.domain.states import ProviderBatchState as State
from chunkmill.domain.states import Route
from chunkmill.ledger.dead.dead_chunks import DeadContent, damaged_content
from chunkmill.ledger.money import budget
from chunkmill.ledger.provider import provider_batches, provider_inputs, provider_lanes, provider_work
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill.ledger.provider.provider_inputs import InFlight
from chunkmill.ledger.provider.provider_room import ProviderRoom, room
from chunkmill.ledger.provider.provider_work import WaitingChunkBatch
from chunkmill.openai.plan.inputs import ProviderInput, RefusedInput, prepare
from chunkmill.openai.plan.limits import Headroom
from chunkmill.openai.plan.packing import Packer
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill_workers.provider.books import book_unanswered
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.flow import StepDelayed

logger = logging.getLogger(__name__)

AT_A_TIME = 8
"""How many ChunkBatches are read at once, which is at most 32 MiB of text."""
LATER_SECONDS = 30.0
"""How long a ChunkBatch waits whose first content has more tokens than the limits leave."""
TRIES = 5


@dataclass(slots=True)
class Contribution:
    """What a ChunkBatch adds to a ProviderBatch. ``shared``: other ProviderBatches that have some of it."""

    dead: list[DeadContent] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)
    kept: int = 0
    """How many of its contents were handled. The others did not fit."""


def gather(context: ProviderContext, step: Step) -> Step | None:
    """``gathering`` → ``gathered``, or None if there was nothing to gather or the limits leave no room.

    If a plain request takes one of the contents meanwhile, or some of the month's money, the transaction is rolled back
    and run again without what was taken.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            return context.transact(lambda conn: _gather(context, conn, step), "gather")
        except sa.exc.IntegrityError:
            if not tries_left:
                raise
        except _MoneyTaken as taken:
            if not tries_left:
                raise StepDelayed(LATER_SECONDS) from taken
    raise AssertionError("the last try returned or raised")


class _MoneyTaken(Exception):
    """Plain requests have committed money that this ProviderBatch was filled for. The message is the budget's."""


def _gather(context: ProviderContext, conn: sa.Connection, step: Step) -> Step | None:
    provider_work.serialize_gathers(conn)
    space = registry.get(conn, step.space_id)
    left = room(conn, context.settings, space)
    if left.reason is not None:
        provider_lanes.hold(conn, Route.OPENAI, left.reason)
        provider_work.drop_gathering(conn, step)
        return None
    filler = _BatchFiller(context, conn, step, space, left)
    for waiting in _waiting(conn, space):
        if not filler.take(waiting):
            break
    if not filler.packer.inputs:
        provider_work.drop_gathering(conn, step)
        provider_lanes.hold(conn, Route.OPENAI, filler.too_little)
        return None
    packer = filler.packer
    # Searches and plain requests go on while it is filled. Only this last look keeps them waiting.
    held = budget.why_held(conn, context.settings, space.spec, left.usd_of(packer.tokens))
    if held is not None:
        raise _MoneyTaken(held)
    provider_lanes.hold(conn, Route.OPENAI, None)
    logger.info(
        "%s: gathered %s contents of space %s in %s requests, %s tokens, %.1f MB",
        step.name, len(packer.rows), space.id, packer.requests, packer.tokens, packer.bytes / 1e6,
    )  # fmt: skip
    return provider_batches.advance(
        conn,
        step,
        State.GATHERED,
        n_requests=packer.requests,
        n_inputs=packer.inputs,
        n_contents=len(packer.rows),
        n_tokens=packer.tokens,
        n_bytes=packer.bytes,
    )


def _waiting(conn: sa.Connection, space: Space) -> Iterator[WaitingChunkBatch]:
    """The waiting ChunkBatches, those of high priority first. Jobs of one priority take turns, so that a small job need
    not wait for a large one.
    """
    for _, jobs in groupby(provider_work.open_jobs(conn, space), key=lambda job: job.priority):
        line = deque(jobs)
        while line:
            job = line.popleft()
            taken = provider_work.take_waiting(conn, space, job, limit=AT_A_TIME)
            yield from taken
            if taken:
                line.append(job)


class _BatchFiller:
    """Fills one ProviderBatch. Each ChunkBatch is recorded in the ledger before the next one is looked at."""

    def __init__(
        self, context: ProviderContext, conn: sa.Connection, step: Step, space: Space, left: ProviderRoom
    ) -> None:
        model = context.model(space)
        self._context = context
        self._conn, self._step, self._space = conn, step, space
        self._counter = context.counter(model)
        max_inputs = provider_lanes.lane(conn, Route.OPENAI).max_inputs
        self._limits = context.limits(model, space, max_inputs=max_inputs)
        self._form = context.form(model, space)
        headroom = Headroom(tokens=left.affordable_tokens, requests=left.requests)
        self.packer = Packer(step.id, self._form, self._limits, headroom)
        self._left = left
        self.too_little: str | None = None
        """Why not even the first content fits; None if it does."""

    def take(self, waiting: WaitingChunkBatch) -> bool:
        """Pack the contents that still have no vector. Returns False when the ProviderBatch is full."""
        first_row = len(self.packer.rows)
        contribution = self._pack(waiting)
        full = contribution.kept < len(waiting.hashes)
        if full and not contribution.kept:
            if not self.packer.inputs:
                provider_work.postpone(self._conn, waiting, delay_s=LATER_SECONDS)
                self.too_little = (
                    f"a content waits that has more tokens than the limits leave ({self._left.affordable_tokens})"
                )
            return False
        if full:
            provider_work.split(self._conn, waiting, contribution.kept)
        lease = provider_work.begin(self._conn, waiting, self._step)
        rows = self.packer.rows[first_row:]
        provider_inputs.add(
            self._conn,
            space_id=self._space.id,
            provider_batch_id=self._step.id,
            inputs=(InFlight(row, lease.chunk_batch_id, lease.attempt, lease.job_id) for row in rows),
        )
        provider_work.bury(self._conn, lease, contribution.dead)
        carriers = contribution.shared | ({self._step.id} if rows else set())
        provider_work.join(self._conn, lease, carriers)
        if not carriers:
            # None of its contents is to be sent: each has a vector, is dead, or is in a plain request that ends soon.
            provider_work.settle(self._conn, self._space, [lease.chunk_batch_id])
        return not full

    def _pack(self, waiting: WaitingChunkBatch) -> Contribution:
        texts, damaged = provider_work.missing_texts(self._conn, self._space, waiting)
        left = provider_inputs.drop_left_behind(self._conn, self._space.id, waiting.hashes)
        book_unanswered(self._conn, self._context, self._space, left)
        taken = provider_inputs.carriers(self._conn, self._space.id, waiting.hashes)
        suspects = provider_inputs.suspects(self._conn, self._space.id, list(texts))
        wanted = [(hash_, texts[hash_]) for hash_ in waiting.hashes if hash_ in texts and hash_ not in taken]
        prepared = {item.content_hash: item for item in prepare(wanted, self._counter, self._limits, waiting.on_long)}
        contribution = Contribution()
        for content_hash in waiting.hashes:
            item = prepared.get(content_hash)
            if content_hash in texts and taken.get(content_hash) is not None:
                contribution.shared.add(int(taken[content_hash] or 0))
            elif isinstance(item, RefusedInput):
                contribution.dead.append(DeadContent(content_hash, item.code, item.reason))
            elif content_hash in damaged:
                contribution.dead.append(damaged_content(content_hash))
            elif isinstance(item, ProviderInput) and not self.packer.add(item, alone=content_hash in suspects):
                return contribution
            contribution.kept += 1
        return contribution
