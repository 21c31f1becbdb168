"""One attempt at a ChunkBatch: what it has done, and how it ends in the ledger, whoever makes the vectors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import sqlalchemy as sa

from chunkmill.domain.reasons import reason_of
from chunkmill.domain.states import ChunkBatchState
from chunkmill.errors import ChunkmillError, LeaseLost
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space
from chunkmill.store.read import Work, read_work
from chunkmill_workers.process.context import QueueContext

logger = logging.getLogger(__name__)

Context = TypeVar("Context", bound=QueueContext)
T = TypeVar("T")


class Attempt(Generic[Context]):
    """The base of ``LocalAttempt`` and ``PlainAttempt``, which write vectors in their own ways.

    Its counts change after a commit and never inside a transaction, which may be run again.
    """

    def __init__(self, context: Context, lease: Lease) -> None:
        self.lease = lease
        self.dead: list[DeadContent] = []
        """Contents that this attempt found to be dead."""
        self._context = context
        self._usage: usage.Usage | None = None
        self._refused: list[DeadContent] = []
        """Contents that have a vector, which this job does not take because the text was cut."""
        self._written: list[bytes] = []
        self._n_truncated = 0
        """How many texts this attempt cut."""
        self._began = time.monotonic()

    def open(self, conn: sa.Connection, provider: str | None = None) -> tuple[Space, Work]:
        """Read what there is to do, and open the account: an attempt that dies before its first write is known too."""
        space = registry.get(conn, self.lease.space_id)
        self._usage = usage.Usage(provider or space.spec.provider, self._context.name)
        usage.book(conn, self.lease, self._usage)
        return space, read_work(conn, space, self.lease.chunk_batch_id)

    def begin(self, space: Space, work: Work) -> None:
        """Take what ``open`` read, once that is committed."""
        self.space, self.work = space, work
        self.dead = [dead_chunks.damaged_content(content_hash) for content_hash in work.damaged]
        self._refused = dead_chunks.refused_contents(self.lease.on_long, work.truncated)

    @property
    def account(self) -> usage.Usage:
        assert self._usage is not None  # noqa: S101 - the attempt is open
        return self._usage

    def release(self, *, because: ChunkmillError | None = None, delay_s: float = 0.0) -> bool:
        """Give the ChunkBatch back uncharged, due again after ``delay_s``. Returns False if the lease was lost.

        ``because`` stays on the ChunkBatch until somebody completes it, and says which worker met it.
        """
        code, error = (because.code, f"{self._context.name}: {reason_of(because)}") if because else (None, None)

        def release(conn: sa.Connection) -> bool:
            return chunk_batches.release_if_held(conn, self.lease, code=code, error=error, delay_s=delay_s)

        return self._end(release, usage.Outcome.RELEASED)

    def fail(self, *, code: str, error: str, retryable: bool) -> ChunkBatchState | None:
        """Charge the attempt. Returns the new state of the ChunkBatch, or None if the lease was lost."""

        def fail(conn: sa.Connection) -> ChunkBatchState | None:
            return chunk_batches.fail_if_held(conn, self.lease, code=code, error=error, retryable=retryable)

        return self._end(fail, usage.Outcome.FAILED, evidence=error)

    def log_end(self, what: str) -> None:
        """Log the one line of an attempt that came to its end: what it wrote, what that took, and in how many seconds.

        The job and the ChunkBatch are among the fields of every line of this thread.
        """
        numbers = {
            "texts": len(self._written),
            "tokens": self._usage.tokens if self._usage else 0,
            "seconds": round(time.monotonic() - self._began, 3),
        }
        if self._n_truncated:
            numbers["truncated"] = self._n_truncated
        if self.dead:
            numbers["dead"] = len(self.dead)
        logger.info("ChunkBatch %s", what, extra=numbers)

    def _end(
        self, transition: Callable[[sa.Connection], T], outcome: usage.Outcome, *, evidence: str | None = None
    ) -> T:
        """Run the transition that ends the attempt without completing it. If the lease was held, close its account."""

        def end(conn: sa.Connection) -> T:
            self._forget_in_flight(conn)
            ended = transition(conn)
            if ended and self._usage:
                usage.book(conn, self.lease, self._usage, outcome, evidence)
            return ended

        return self._context.transact(end, outcome)

    def _complete_if_held(self, conn: sa.Connection, written: Sequence[bytes] = ()) -> bool:
        """Complete the ChunkBatch and list its dead contents. Returns False if the lease was lost."""
        n_truncated = len(self.work.truncated) - len(self._refused) + self._n_truncated
        done = chunk_batches.complete_if_held(
            conn, self.lease, n_embedded=self._n_embedded(written), n_truncated=n_truncated
        )
        if done:
            dead = [*self.dead, *self._refused]
            dead_chunks.add_contents(conn, dead, job_id=self.lease.job_id, collection_id=self.lease.collection_id)
        return done

    def _record_progress_if_held(self, conn: sa.Connection, written: Sequence[bytes]) -> bool:
        return chunk_batches.record_progress_if_held(conn, self.lease, self._n_embedded(written))

    def _n_embedded(self, written: Sequence[bytes]) -> int:
        """How many contents have a vector that this job takes, with those that this transaction has ``written``."""
        return self.work.known - len(self._refused) + len(self._written) + len(written)

    def _book(
        self,
        conn: sa.Connection,
        written: Sequence[bytes],
        *,
        new: int,
        tokens: int = 0,
        outcome: usage.Outcome | None = None,
    ) -> usage.Usage:
        """Bring the account up to date in the transaction that has ``written`` vectors, ``new`` of which did not exist.

        Returns the account to go on from after the commit.
        """
        account = replace(
            self.account,
            contents=self.account.contents + new,
            recomputed=self.account.recomputed + len(written) - new,
            tokens=self.account.tokens + tokens,
        )
        return usage.book(conn, self.lease, account, outcome)

    def _forget_in_flight(self, conn: sa.Connection) -> None:
        """Forget what this attempt has at a provider. A local attempt has nothing there."""

    def _superseded(self) -> LeaseLost:
        return LeaseLost(f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} was superseded")
