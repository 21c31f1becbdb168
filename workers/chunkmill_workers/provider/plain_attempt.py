"""What one attempt at a ChunkBatch by plain requests has to do, has done, and how it ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from chunkmill.domain.planning import too_long_reason
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Route
from chunkmill.errors import ChunkmillError, LeaseLost, ProviderError
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.money import charges
from chunkmill.ledger.provider import provider_inputs
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.openai.plan.assemble import assemble
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.jsonl import Embedded
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.store.read import Work, read_work
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.writing import write

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 5.0
"""A ChunkBatch some of whose contents others have in flight looks again after so long."""


class ProviderAnswerBad(ChunkmillError):
    code = "bad_vector"
    retryable = True
    http_status = 502


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer, ``rows`` with their places in it."""

    embedded: Embedded
    rows: Sequence[PackedInput]


@dataclass(slots=True)
class PlainAttempt:
    """Its counts change after a commit, never inside a transaction, which may be run again."""

    context: ProviderContext
    lease: Lease
    space: Space
    work: Work
    account: usage.Usage
    dead: list[DeadContent] = field(default_factory=list)
    done: int = 0
    truncated: int = 0
    elsewhere: int = 0
    """Contents that others have in flight."""
    bad: str | None = None
    """Why a content that was answered has no vector."""

    @classmethod
    def open(cls, context: ProviderContext, lease: Lease) -> PlainAttempt:
        """Open its account, read its texts, and forget what an earlier attempt left in flight: that answer is lost."""

        def read(conn: sa.Connection) -> PlainAttempt:
            space = registry.get(conn, lease.space_id)
            provider_inputs.remove_own(conn, lease)
            account = usage.Usage("openai", context.name)
            usage.book(conn, lease, account)
            return cls(context, lease, space, read_work(conn, space, lease.chunk_batch_id), account)

        attempt = context.transact(read, "read texts")
        if lease.on_long is OnLong.REJECT:
            # Another job, which cuts long texts, was faster; this one refuses them all the same.
            attempt.dead = [DeadContent(h, "too_long", too_long_reason(n)) for h, n in attempt.work.truncated]
        return attempt

    @property
    def tries(self) -> int:
        """Attempts that came to nothing, as far as is known: one that wrote something is as good as the first."""
        return 1 if self.done else min(self.lease.attempt, 8)

    def commit(self, answer: Answer) -> None:
        """The vectors, the charge and the account in one transaction; what is done stays, whatever comes next."""
        made = assemble(answer.embedded, answer.rows, normalize=self.space.spec.normalize)
        tokens = answer.embedded.prompt_tokens or 0
        hashes = [row.content_hash for row in answer.rows]

        def write_all(conn: sa.Connection) -> tuple[usage.Usage, int]:
            removed = provider_inputs.remove(conn, space_id=self.space.id, hashes=hashes, provider_batch_id=None)
            new = write(conn, self.space, made.rows, made.vectors)
            account = replace(
                self.account,
                contents=self.account.contents + new,
                recomputed=self.account.recomputed + len(made.rows) - new,
                tokens=self.account.tokens + tokens,
            )
            if removed:  # else this is the second run of a commit whose answer was lost
                self._charge(conn, len(answer.rows), tokens)
            account = usage.book(conn, self.lease, account)
            if not chunk_batches.record_progress_if_held(conn, self.lease, self._embedded + len(made.rows)):
                logger.warning("ChunkBatch %s: its lease was lost; the vectors stay", self.lease.chunk_batch_id)
            return account, new

        self.account, new = self.context.transact(write_all, "write vectors")
        COUNTS.add_all(((metrics.CONTENTS, new), (metrics.TOKENS, tokens)))
        self.done += len(made.rows)
        self.truncated += sum(row.truncated for row in made.rows)
        if made.problems:
            self.bad = made.problems[0][1]

    def complete(self) -> None:
        """The dead list, the completion and the account in one transaction; or back, if something is missing still."""
        if self.bad is not None:
            raise ProviderAnswerBad(f"the provider answered without a usable vector: {self.bad}")
        if self.elsewhere:
            self.release(delay_s=AGAIN_SECONDS)
            return
        n_truncated = len(self.work.truncated) - self._refused + self.truncated

        def end(conn: sa.Connection) -> bool:
            done = chunk_batches.complete_if_held(conn, self.lease, n_embedded=self._embedded, n_truncated=n_truncated)
            if done:
                dead_chunks.add_contents(
                    conn, self.dead, job_id=self.lease.job_id, collection_id=self.lease.collection_id
                )
                usage.book(conn, self.lease, self.account, usage.Outcome.COMPLETED)
                provider_inputs.remove_own(conn, self.lease)
            return done

        if not self.context.transact(end, "complete"):
            raise LeaseLost(f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} was superseded")

    def release(self, *, because: ChunkmillError | None = None, delay_s: float = 0.0) -> None:
        def give_back(conn: sa.Connection) -> None:
            provider_inputs.remove_own(conn, self.lease)
            if chunk_batches.release_if_held(conn, self.lease, because=because, delay_s=delay_s):
                usage.book(conn, self.lease, self.account, usage.Outcome.RELEASED)

        self.context.transact(give_back, "release")

    def fail(self, error: Exception) -> None:
        known = isinstance(error, ChunkmillError)
        said = str(error) if known else type(error).__name__
        logger.error(
            "ChunkBatch %s, attempt %s failed: %s",
            self.lease.chunk_batch_id,
            self.lease.attempt,
            error.brief if isinstance(error, ProviderError) else said,
            exc_info=None if known else error,
        )

        def end(conn: sa.Connection) -> None:
            provider_inputs.remove_own(conn, self.lease)
            code = error.code if isinstance(error, ChunkmillError) else "worker_error"
            if chunk_batches.fail_if_held(conn, self.lease, code=code, error=said, retryable=True):
                usage.book(conn, self.lease, self.account, usage.Outcome.FAILED, said)

        self.context.transact(end, "fail")

    def _charge(self, conn: sa.Connection, contents: int, tokens: int) -> None:
        charges.book_tokens(
            conn,
            charges.price_today(conn, self.context.model(self.space)),
            route=Route.OPENAI_SYNC,
            space_id=self.space.id,
            job_id=self.lease.job_id,
            provider_batch_id=0,
            contents=contents,
            tokens=tokens,
        )

    @property
    def _refused(self) -> int:
        """Known vectors of cut texts that this job does not take."""
        return len(self.work.truncated) if self.lease.on_long is OnLong.REJECT else 0

    @property
    def _embedded(self) -> int:
        return self.work.known - self._refused + self.done
