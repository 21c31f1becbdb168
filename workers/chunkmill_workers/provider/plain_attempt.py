"""An attempt at a ChunkBatch by plain requests: each answer is committed and charged by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.domain.providers import OPENAI
from chunkmill.domain.reasons import code_of, reason_of
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, ProviderAnswerBad, ProviderError, ProviderStopped
from chunkmill.ledger.money import charges
from chunkmill.ledger.provider import provider_inputs
from chunkmill.ledger.provider.answering import OTHER_MODEL, refuse_model
from chunkmill.ledger.work import usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.answers import Embedded
from chunkmill.spaces.registry import Space
from chunkmill.store.read import Work
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.process.attempt import Attempt
from chunkmill_workers.provider.asking import book_lost
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.writing import write

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0
"""How long a ChunkBatch waits for its next attempt if others have some of its contents in flight."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request. ``rows`` are the contents that were sent, with their positions in the answer."""

    embedded: Embedded
    rows: Sequence[PackedInput]


class PlainAttempt(Attempt[ProviderContext]):
    """What an attempt by plain requests has written, and what keeps it from completing."""

    def __init__(self, context: ProviderContext, lease: Lease) -> None:
        super().__init__(context, lease)
        self.n_elsewhere = 0
        """How many contents others have in flight."""
        self._problem: str | None = None
        """Why a content that was answered has no vector."""

    def start(self) -> None:
        """Open the attempt. What an earlier attempt left in flight is forgotten, because its answer is lost."""

        def read(conn: sa.Connection) -> tuple[Space, Work]:
            self._forget_in_flight(conn)
            return self.open(conn, OPENAI)

        self.begin(*self._context.transact(read, "read texts"))

    @property
    def has_written(self) -> bool:
        return bool(self._written)

    @property
    def tries(self) -> int:
        """How many attempts in a row came to nothing, as far as is known. One that has written counts as the first."""
        return 1 if self._written else min(self.lease.attempt, 8)

    def commit(self, answer: Answer) -> None:
        """Commit the vectors, the charge and the account of one answer in one transaction.

        Raises :class:`ProviderStopped` if another model answered than the space has vectors of.
        """
        space = self.space
        made = assemble(answer.embedded, answer.rows, normalize=space.spec.normalize, half=space.is_half)
        tokens = answer.embedded.prompt_tokens or 0
        sent = [row.content_hash for row in answer.rows]
        written = [row.content_hash for row in made.rows]
        model = self._context.model(self.space)
        refusal: str | None = None

        def write_all(conn: sa.Connection) -> tuple[usage.Usage, int]:
            nonlocal refusal
            removed = provider_inputs.remove(conn, space_id=self.space.id, hashes=sent, provider_batch_id=None)
            refusal = refuse_model(conn, space.id, asked=model.name, answered=answer.embedded.model)
            if refusal is not None:
                if removed:
                    self._book_lost(conn, contents=len(answer.rows), tokens=tokens, reason=refusal)
                return self.account, 0
            new = write(conn, self.space, made.rows, made.vectors)
            if removed:  # else this is the second run of a commit whose answer was lost
                charges.book_tokens(
                    conn,
                    charges.price_today(conn, model),
                    route=Route.OPENAI_SYNC,
                    space_id=self.space.id,
                    job_id=self.lease.job_id,
                    contents=len(answer.rows),
                    tokens=tokens,
                )
            account = self._book(conn, written, new=new, tokens=tokens)
            if not self._record_progress_if_held(conn, written):
                logger.warning("ChunkBatch %s: its lease was lost; the vectors stay", self.lease.chunk_batch_id)
            return account, new

        self._usage, new = self._context.transact(write_all, "write vectors", is_paid=True)
        if refusal is not None:
            self._context.oddities.count(model, {OTHER_MODEL: 1})
            raise ProviderStopped(refusal, advice="Then: chunkmill lanes resume", provider_code=OTHER_MODEL)
        COUNTS.add_all(((metrics.CONTENTS, new), (metrics.TOKENS, tokens)))
        self._written += written
        self._n_truncated += sum(row.truncated for row in made.rows)
        if made.problems:
            self._problem = made.problems[0][1]

    def lose(self, rows: Sequence[PackedInput], *, tokens: int, reason: str) -> None:
        """Book once a request that was charged and whose answer cannot be used: its contents leave flight with it."""
        sent = [row.content_hash for row in rows]

        def book(conn: sa.Connection) -> None:
            if provider_inputs.remove(conn, space_id=self.space.id, hashes=sent, provider_batch_id=None):
                self._book_lost(conn, contents=len(rows), tokens=tokens, reason=reason)

        self._context.transact(book, "book as lost")

    def _book_lost(self, conn: sa.Connection, *, contents: int, tokens: int, reason: str) -> None:
        book_lost(
            conn, self._context, self.space, contents=contents, tokens=tokens, reason=reason, job_id=self.lease.job_id
        )

    def complete(self) -> None:
        """Commit the dead list, the completion and the account; or release the ChunkBatch if others have a part of it.

        Raises :class:`ProviderAnswerBad` if the provider answered a content without a usable vector.
        """
        if self._problem is not None:
            raise ProviderAnswerBad(f"the provider answered without a usable vector: {self._problem}")
        if self.n_elsewhere:
            self.release(delay_s=AGAIN_SECONDS)
            return

        def end(conn: sa.Connection) -> bool:
            done = self._complete_if_held(conn)
            if done:
                usage.book(conn, self.lease, self.account, usage.Outcome.COMPLETED)
                self._forget_in_flight(conn)
            return done

        if not self._context.transact(end, "complete"):
            raise self._superseded()

    def fail_with(self, error: Exception) -> None:
        """Log why the attempt failed, and charge it."""
        known = isinstance(error, ChunkmillError)
        message = reason_of(error)
        logger.error(
            "ChunkBatch %s, attempt %s failed: %s",
            self.lease.chunk_batch_id,
            self.lease.attempt,
            error.brief if isinstance(error, ProviderError) else message,
            exc_info=None if known else error,
        )
        self.fail(code=code_of(error), error=message, retryable=True)

    def _forget_in_flight(self, conn: sa.Connection) -> None:
        provider_inputs.remove_own(conn, self.lease)
