"""An attempt at a ChunkBatch by plain requests: each answer is committed and charged by itself."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from chunkmill.domain.costs import AdjustmentKind
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.reasons import code_of, reason_of
from chunkmill.domain.states import Route
from chunkmill.errors import (
    ChunkmillError,
    ProviderBusy,
    ProviderError,
    ProviderRefused,
    ProviderSilent,
    ProviderStopped,
)
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.money import charges
from chunkmill.ledger.provider import provider_inputs, provider_lanes
from chunkmill.ledger.provider.answering import OTHER_MODEL, refuse_model
from chunkmill.ledger.provider.provider_inputs import UnansweredRequests
from chunkmill.ledger.work import usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.answers import EmbeddedRequest
from chunkmill.spaces.registry import Space
from chunkmill.store.read import Work
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.process.attempt import Attempt
from chunkmill_workers.provider.books import book_silence, book_unanswered
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.writing import write

logger = logging.getLogger(__name__)

BAD_VECTOR, NO_ANSWER = "bad_vector", "no_answer"
"""Why a content that was sent has no vector, as codes of the dead list."""
PAID_TRIES = 3
"""How many attempts at a ChunkBatch may fail after an answer that was paid for, or may have been: it had no usable
vector, could not be written, or never came. ``MAX_ATTEMPTS`` may allow fewer."""
AGAIN_SECONDS = 5.0
"""How long a ChunkBatch waits for its next attempt if others have some of its contents in flight."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request. ``rows`` are the contents that were sent, with their positions in the answer."""

    embedded: EmbeddedRequest
    rows: Sequence[PackedInput]


class PlainAttempt(Attempt[ProviderContext]):
    """What an attempt by plain requests has written, and what keeps it from completing."""

    def __init__(self, context: ProviderContext, lease: Lease) -> None:
        super().__init__(context, lease)
        self.n_elsewhere = 0
        """How many contents others have in flight."""
        self.failed: dict[bytes, tuple[str, str]] = {}
        """``content_hash → (code, reason)`` of contents that were sent and have no vector. They may be tried again."""
        self.started_at = time.monotonic()
        self.lane_is_unproved = False
        """Whether a probe must come first: the lane failed or was stopped before this attempt."""
        self._sent: AdjustmentKind | None = None
        """How to book the request that was sent and is not accounted for; None if there is none."""

    def start(self) -> None:
        """Open the attempt. What an earlier attempt left in flight is booked, because its answer is lost."""

        def read(conn: sa.Connection) -> tuple[Space, Work, bool]:
            space, work = self.open(conn, OPENAI)
            book_unanswered(conn, self._context, space, provider_inputs.remove_own(conn, self.lease))
            return space, work, provider_lanes.is_unproved(conn, Route.OPENAI_SYNC)

        space, work, self.lane_is_unproved = self._context.transact(read, "read texts")
        self.begin(space, work)

    @property
    def has_written(self) -> bool:
        return bool(self._written)

    @property
    def tries(self) -> int:
        """How many attempts in a row have written nothing, as far as is known. An attempt that has written counts as
        the first.
        """
        return 1 if self._written else min(self.lease.attempt, 8)

    @property
    def n_failed(self) -> int:
        """How many contents were refused, or sent in vain."""
        return len(self.dead) + len(self.failed)

    @contextlib.contextmanager
    def sending(self, rows: Sequence[PackedInput]) -> Iterator[None]:
        """Send a request in this block, and commit its answer: however the block ends, the request is accounted for."""
        sent = [row.content_hash for row in rows]
        self._context.transact(lambda conn: provider_inputs.mark_sent(conn, self.lease, sent), "about to send")
        self._sent = AdjustmentKind.MAYBE_CHARGED
        try:
            yield
        except (ProviderRefused, ProviderBusy, ProviderStopped):
            self._sent = None  # it costs nothing
            raise
        except ProviderSilent as silent:
            silence = silent
            self._context.transact(lambda conn: self._book_silence(conn, silence), "book a request without an answer")
            self._sent = None
            raise
        self._sent = None

    def _book_silence(self, conn: sa.Connection, silent: ProviderSilent) -> None:
        book_silence(conn, self._context, self.space, provider_inputs.take_sent(conn, self.lease), silent)

    def commit(self, answer: Answer) -> None:
        """Commit the vectors, the charge and the account of one answer in one transaction.

        Raises :class:`ProviderStopped` if another model answered than the space has vectors of.
        """
        self._sent = AdjustmentKind.LOST  # if it cannot be written
        space = self.space
        made = assemble(answer.embedded, answer.rows, normalize=space.spec.normalize, half=space.is_half)
        tokens = answer.embedded.prompt_tokens or 0
        sent = [row.content_hash for row in answer.rows]
        written = [row.content_hash for row in made.rows]
        model = self._context.model(self.space)
        refusal: str | None = None

        def write_all(conn: sa.Connection) -> tuple[usage.Usage, int]:
            nonlocal refusal
            removed = provider_inputs.remove_answered(conn, self.lease, sent)
            refusal = refuse_model(conn, space.id, asked=model.name, answered=answer.embedded.model)
            if refusal is not None:
                if removed:
                    lost = UnansweredRequests(self.lease.job_id, len(answer.rows), tokens)
                    book_unanswered(conn, self._context, space, [lost], kind=AdjustmentKind.LOST, reason=refusal)
                return self.account, 0
            new = write(conn, self.space, made.rows, made.vectors)
            provider_inputs.drop_suspects(conn, space.id, written)
            # Otherwise this is the second run of a commit whose answer was lost, or another attempt has taken the
            # contents over and has booked that this request may have been charged.
            if removed:
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
        for row, why in made.problems:
            self.failed[row.content_hash] = (BAD_VECTOR, f"the provider answered without a usable vector: {why}")

    def complete(self) -> None:
        """Commit the dead list, the completion and the account; or release the ChunkBatch if others have a part of it.

        If contents were sent in vain, the attempt fails, and in the last one they are dead.
        """
        if self.failed and self._may_pay_again:
            code, reason = next(iter(self.failed.values()))
            self._log_failure(f"{len(self.failed)} contents have no vector ({code})")
            self.fail(code=code, error=reason, retryable=True)
            return
        if self.n_elsewhere:
            self.release(delay_s=AGAIN_SECONDS)
            self.log_end("given back, because others have sent some of its texts")
            return
        self.dead += [
            DeadContent(content_hash, code, f"no vector after {self._charged} attempts: {reason}")
            for content_hash, (code, reason) in self.failed.items()
        ]

        def end(conn: sa.Connection) -> bool:
            done = self._complete_if_held(conn)
            if done:
                usage.book(conn, self.lease, self.account, usage.Outcome.COMPLETED)
                self._forget_in_flight(conn)
                provider_inputs.drop_suspects(conn, self.space.id, list(self.failed))
            return done

        if not self._context.transact(end, "complete"):
            raise self._superseded()
        self.log_end("completed")

    def fail_with(self, error: Exception) -> None:
        """Log why the attempt failed, and charge it. The number of attempts that cost money is limited."""
        known = isinstance(error, ChunkmillError)
        message = reason_of(error)
        self._log_failure(error.brief if isinstance(error, ProviderError) else message, None if known else error)
        is_lost = self._sent is AdjustmentKind.LOST
        self.fail(code=code_of(error), error=message, retryable=not is_lost or self._may_pay_again)

    @property
    def _charged(self) -> int:
        """How many attempts at the ChunkBatch count, with this one. Each that was released has raised the limit."""
        return self.lease.attempt - (self.lease.max_attempts - self._context.settings.max_attempts)

    @property
    def _may_pay_again(self) -> bool:
        return self._charged < PAID_TRIES and self.lease.attempt < self.lease.max_attempts

    def _log_failure(self, why: str, error: Exception | None = None) -> None:
        logger.error(
            "ChunkBatch %s, attempt %s failed: %s", self.lease.chunk_batch_id, self.lease.attempt, why, exc_info=error
        )

    def _forget_in_flight(self, conn: sa.Connection) -> None:
        """Take what this attempt has in flight out of flight, and book the request that was sent and is not booked yet.

        What was sent in vain is sent alone the next time, because one text may spoil the vectors of its neighbours.
        """
        if self.failed:
            provider_inputs.add_suspects(conn, self.space.id, sorted(self.failed))
        left = provider_inputs.remove_own(conn, self.lease)
        if self._sent is not None:
            book_unanswered(conn, self._context, self.space, left, kind=self._sent)
