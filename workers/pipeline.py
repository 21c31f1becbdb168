"""One ChunkBatch's life, read top to bottom."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from app.db import spaces
from app.db.spaces import Space
from app.errors import ChunkmillError, LeaseLost
from app.ledger import chunk_batches, dead_chunks, usage
from app.ledger.chunk_batches import Lease
from app.ledger.dead_chunks import DeadContent
from app.ledger.finish import finish_if_done
from app.vectors.read import Work, read_work
from app.vectors.write import relax_durability, write_vectors
from workers.context import WorkerContext
from workers.engine.engine import Engine
from workers.engine.results import TokenBatchResult
from workers.engines import fingerprint
from workers.lease import HeldLease

logger = logging.getLogger(__name__)

FLUSH_ROWS = 4096
FLUSH_SECONDS = 0.5
"""What a kill can cost: the TokenBatches since the last write, at most this much work of one task."""


class Outcome(StrEnum):
    NOT_OURS = "not_ours"
    COMPLETED = "completed"
    RELEASED = "released"
    LEASE_LOST = "lease_lost"
    FAILED = "failed"


class Stopping(Exception):
    """The worker was told to go."""


def run_chunk_batch(context: WorkerContext, chunk_batch_id: int) -> Outcome:
    """Claim, read, embed, write, complete. Every way out leaves the ledger true; none raises for the work's sake."""
    with context.db.begin() as conn:
        lease = chunk_batches.claim_if_due(
            conn, chunk_batch_id, owner=context.name, lease_seconds=context.settings.lease_seconds
        )
    if lease is None:
        return Outcome.NOT_OURS  # done, held by another, or not due: the doorbell was one too many
    with context.leases.holding(lease) as held:
        try:
            space = _embed(context, held)
        except Stopping:
            with context.db.begin() as conn:
                chunk_batches.release_if_held(conn, lease)
            return Outcome.RELEASED
        except LeaseLost as lost:
            logger.warning("%s", lost)
            return Outcome.LEASE_LOST
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the ledger must say so
            _record_failure(context, lease, error)
            return Outcome.FAILED
    with context.db.begin() as conn:
        finish_if_done(conn, lease.job_id, space)
    return Outcome.COMPLETED


def _embed(context: WorkerContext, held: HeldLease) -> Space:
    lease = held.lease
    with context.db.begin() as conn:
        space = spaces.get(conn, lease.space_id)
        work = read_work(conn, space, lease.chunk_batch_id)
    engine = context.engines.for_space(space)
    attempt = _Attempt(lease, space, engine, work, worker=context.name)
    texts = [text for _, text in work.texts]
    flushed_at = time.monotonic()
    for result in engine.stream(texts, on_long=lease.on_long, stop=context.stopping.is_set):
        attempt.take(result)
        held.check()
        if attempt.pending_rows >= FLUSH_ROWS or time.monotonic() - flushed_at >= FLUSH_SECONDS:
            attempt.flush(context.db)
            flushed_at = time.monotonic()
    if attempt.left:
        # The engine stopped early because the worker is going; keep what is done.
        attempt.flush(context.db)
        raise Stopping
    attempt.complete(context.db)
    return space


def _record_failure(context: WorkerContext, lease: Lease, error: Exception) -> None:
    code = error.code if isinstance(error, ChunkmillError) else "worker_error"
    # Another machine may have the model or the memory that this one lacks, so only a final error is final.
    retryable = not isinstance(error, ChunkmillError) or error.retryable or error.http_status < 500
    message = _without_parameters(error)
    with context.db.begin() as conn:
        state = chunk_batches.fail_if_held(
            conn, lease, code=code, error=f"{context.name}: {message}", retryable=retryable
        )
    logger.error(
        "ChunkBatch %s, attempt %s of %s failed and is %s: %s",
        lease.chunk_batch_id, lease.attempt, lease.max_attempts, state, message,
    )  # fmt: skip
    with context.db.begin() as conn:
        finish_if_done(conn, lease.job_id, spaces.get(conn, lease.space_id))


def _without_parameters(error: Exception) -> str:
    """An error's message without SQL parameters, which may hold texts."""
    if isinstance(error, sa.exc.DBAPIError):
        return f"{type(error.orig).__name__}: {str(error.orig).splitlines()[0]}"
    return str(error) if isinstance(error, ChunkmillError) else f"{type(error).__name__}: {error}"


@dataclass
class _Attempt:
    """What one attempt has done so far and not written yet."""

    lease: Lease
    space: Space
    engine: Engine
    work: Work
    worker: str
    dead: list[DeadContent] = field(default_factory=list)
    written: int = 0
    pending_rows: int = 0
    truncated: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _hashes: list[bytes] = field(default_factory=list)
    _n_tokens: list[NDArray[np.int32]] = field(default_factory=list)
    _truncated: list[NDArray[np.bool_]] = field(default_factory=list)
    _vectors: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.work.texts) - self.written - self.pending_rows - len(self.dead)

    def take(self, result: TokenBatchResult) -> None:
        self._hashes += [self.work.texts[i][0] for i in result.indices.tolist()]
        self._n_tokens.append(result.n_tokens)
        self._truncated.append(result.truncated)
        self._vectors.append(result.vectors)
        self.dead += [DeadContent(self.work.texts[f.index][0], f.code, f.reason) for f in result.failures]
        self.pending_rows += len(result.indices)
        self.truncated += int(result.truncated.sum())
        self.tokens += result.tokens
        self.seconds += result.seconds

    def flush(self, db: sa.Engine) -> None:
        """Commit what is there. It stays even when the lease is lost: a late vector is a right vector."""
        with db.begin() as conn:
            relax_durability(conn)
            self._write(conn)
            still_ours = chunk_batches.record_progress_if_held(conn, self.lease, self._embedded)
        if not still_ours:
            raise LeaseLost(f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} was superseded")

    def complete(self, db: sa.Engine) -> None:
        """The last vectors, the dead list, the completion and the bill, in one transaction."""
        with db.begin() as conn:
            relax_durability(conn)
            self._write(conn)
            done = chunk_batches.complete_if_held(
                conn, self.lease, n_embedded=self._embedded, n_truncated=self.work.truncated + self.truncated
            )
            if done:
                dead_chunks.add_contents(conn, self.lease, self.dead)
                usage.book(conn, self.lease, self._usage())
        if not done:
            raise LeaseLost(f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} was superseded")

    @property
    def _embedded(self) -> int:
        return self.work.known + self.written

    def _usage(self) -> usage.Usage:
        return usage.Usage(
            provider=self.space.spec.provider,
            worker=self.worker,
            contents=self.written,
            tokens=self.tokens,
            engine_seconds=self.seconds,
        )

    def _write(self, conn: sa.Connection) -> None:
        if self._hashes:
            write_vectors(
                conn,
                self.space,
                fingerprint(self.engine, self.lease.on_long),
                self._hashes,
                np.concatenate(self._n_tokens),
                np.concatenate(self._truncated),
                np.concatenate(self._vectors),
            )
        self.written += self.pending_rows
        self.pending_rows = 0
        self._hashes, self._n_tokens, self._truncated, self._vectors = [], [], [], []
