"""One ChunkBatch's life, read top to bottom."""

from __future__ import annotations

import logging
import time
from enum import StrEnum

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from app.db import spaces
from app.db.spaces import Space
from app.domain.planning import too_long_reason
from app.domain.spaces import OnLong
from app.errors import CanaryFailed, ChunkmillError, LeaseLost
from app.ledger import chunk_batches, dead_chunks, usage
from app.ledger.chunk_batches import Lease
from app.ledger.dead_chunks import DeadContent
from app.ledger.finish import finish_if_done
from app.vectors.read import Work, read_work, still_wanted
from app.vectors.write import relax_durability, write_vectors
from workers.context import WorkerContext
from workers.engine.engine import Engine
from workers.engine.matryoshka import shorten
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
    if context.stopping.is_set():
        return Outcome.NOT_OURS
    with context.db.begin() as conn:
        lease = chunk_batches.claim_if_due(
            conn,
            chunk_batch_id,
            owner=context.name,
            lease_seconds=context.settings.lease_seconds,
            not_spaces=context.engines.unserved(),
        )
    if lease is None:
        return Outcome.NOT_OURS  # done, held by another, not due, or of a model that others have
    attempt = _Attempt(lease, worker=context.name)
    with context.leases.holding(lease) as held:
        try:
            _embed(context, held, attempt)
        except Stopping:
            with context.db.begin() as conn:
                if chunk_batches.release_if_held(conn, lease):
                    attempt.book(conn)
            return Outcome.RELEASED
        except LeaseLost as lost:
            logger.warning("%s", lost)
            return Outcome.LEASE_LOST
        except CanaryFailed as drift:
            _leave_to_others(context, lease, drift)
            return Outcome.RELEASED
        except Exception as error:  # noqa: BLE001 - whatever went wrong, the ledger must say so
            _record_failure(context, attempt, error)
            return Outcome.FAILED
    _finish(context, lease)
    return Outcome.COMPLETED


def _embed(context: WorkerContext, held: HeldLease, attempt: _Attempt) -> None:
    lease = held.lease
    with context.db.begin() as conn:
        space = spaces.get(conn, lease.space_id)
        work = read_work(conn, space, lease.chunk_batch_id)
    engine = context.engine_for(space)
    attempt.begin(space, engine, work)
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


def _finish(context: WorkerContext, lease: Lease) -> None:
    with context.db.begin() as conn:
        finish_if_done(conn, lease.job_id, spaces.get(conn, lease.space_id))


def _leave_to_others(context: WorkerContext, lease: Lease, drift: CanaryFailed) -> None:
    """Uncharged: it is this worker that is at fault. The reason stays with the ChunkBatch while no other takes it."""
    with context.db.begin() as conn:
        chunk_batches.release_if_held(conn, lease, because=drift)
    logger.error("ChunkBatch %s is left to other workers: %s", lease.chunk_batch_id, drift)


def _record_failure(context: WorkerContext, attempt: _Attempt, error: Exception) -> None:
    lease = attempt.lease
    code = error.code if isinstance(error, ChunkmillError) else "worker_error"
    # Another machine may have the model or the memory that this one lacks, so only a final error is final.
    retryable = not isinstance(error, ChunkmillError) or error.retryable or error.http_status < 500
    message = _without_parameters(error)
    with context.db.begin() as conn:
        state = chunk_batches.fail_if_held(
            conn, lease, code=code, error=f"{context.name}: {message}", retryable=retryable
        )
        if state is not None:
            attempt.book(conn)
    logger.error(
        "ChunkBatch %s, attempt %s of %s failed and is %s: %s",
        lease.chunk_batch_id, lease.attempt, lease.max_attempts, state or "another worker's", message,
    )  # fmt: skip
    _finish(context, lease)


def _without_parameters(error: Exception) -> str:
    """An error's message without SQL parameters, which may hold texts."""
    if isinstance(error, sa.exc.DBAPIError):
        return f"{type(error.orig).__name__}: {str(error.orig).splitlines()[0]}"
    return str(error) if isinstance(error, ChunkmillError) else f"{type(error).__name__}: {error}"


class _Attempt:
    """What one attempt has done so far, and what of it is not written yet."""

    def __init__(self, lease: Lease, *, worker: str) -> None:
        self.lease = lease
        self._worker = worker
        self._provider = ""
        self._refused: list[DeadContent] = []
        self._dead: list[DeadContent] = []
        self._done = 0
        self._written = 0
        self._truncated_here = 0
        self._tokens = 0
        self._seconds = 0.0
        self._clear()

    def begin(self, space: Space, engine: Engine, work: Work) -> None:
        self._space, self._engine, self._work = space, engine, work
        self._provider = space.spec.provider
        if self.lease.on_long is OnLong.REJECT:
            # Another job, which cuts long texts, was faster; this one refuses them all the same.
            self._refused = [DeadContent(h, "too_long", too_long_reason(n)) for h, n in work.truncated]

    @property
    def pending_rows(self) -> int:
        return len(self._hashes)

    @property
    def left(self) -> int:
        """Texts that the engine has not handed back."""
        return len(self._work.texts) - self._done

    def take(self, result: TokenBatchResult) -> None:
        self._hashes += [self._work.texts[i][0] for i in result.indices.tolist()]
        self._n_tokens.append(result.n_tokens)
        self._truncated.append(result.truncated)
        spec = self._space.spec
        self._vectors.append(shorten(result.vectors, spec.dimensions, normalize=spec.normalize))
        self._dead += [DeadContent(self._work.texts[f.index][0], f.code, f.reason) for f in result.failures]
        self._done += len(result.indices) + len(result.failures)
        self._truncated_here += int(result.truncated.sum())
        self._tokens += result.tokens
        self._seconds += result.seconds

    def flush(self, db: sa.Engine) -> None:
        """Commit what is there. It stays even when the lease is lost: a late vector is a right vector."""
        with db.begin() as conn:
            relax_durability(conn)
            self._write(conn)
            still_ours = chunk_batches.record_progress_if_held(conn, self.lease, self._embedded)
        if not still_ours:
            raise self._superseded()

    def complete(self, db: sa.Engine) -> None:
        """The last vectors, the dead list, the completion and the bill, in one transaction."""
        n_truncated = len(self._work.truncated) - len(self._refused) + self._truncated_here
        with db.begin() as conn:
            relax_durability(conn)
            self._write(conn)
            done = chunk_batches.complete_if_held(conn, self.lease, n_embedded=self._embedded, n_truncated=n_truncated)
            if done:
                dead_chunks.add_contents(conn, self.lease, [*self._dead, *self._refused])
                self.book(conn)
        if not done:
            raise self._superseded()

    def book(self, conn: sa.Connection) -> None:
        """Book what this attempt cost, in the transaction that ends it."""
        if self._provider:
            usage.book(
                conn,
                self.lease,
                usage.Usage(self._provider, self._worker, self._written, self._tokens, self._seconds),
            )

    @property
    def _embedded(self) -> int:
        return self._work.known - len(self._refused) + self._written

    def _superseded(self) -> LeaseLost:
        return LeaseLost(f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} was superseded")

    def _write(self, conn: sa.Connection) -> None:
        if self._hashes:
            hashes, n_tokens = self._hashes, np.concatenate(self._n_tokens)
            truncated, vectors = np.concatenate(self._truncated), np.concatenate(self._vectors)
            wanted = still_wanted(conn, hashes, since=self._work.deletions)
            if wanted is not None:
                keep = np.array([content_hash in wanted for content_hash in hashes], dtype=bool)
                hashes = [content_hash for content_hash in hashes if content_hash in wanted]
                n_tokens, truncated, vectors = n_tokens[keep], truncated[keep], vectors[keep]
            made_by = fingerprint(self._engine, self.lease.on_long, vectors.shape[1])
            write_vectors(conn, self._space, made_by, hashes, n_tokens, truncated, vectors)
            self._written += len(hashes)
        self._clear()

    def _clear(self) -> None:
        self._hashes: list[bytes] = []
        self._n_tokens: list[NDArray[np.int32]] = []
        self._truncated: list[NDArray[np.bool_]] = []
        self._vectors: list[NDArray[np.float32]] = []
