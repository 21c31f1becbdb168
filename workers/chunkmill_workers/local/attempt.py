"""What one attempt at a ChunkBatch has done, and how it gets into the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.planning import too_long_reason
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import ChunkBatchState
from chunkmill.errors import ChunkmillError, LeaseLost
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.work import chunk_batches, usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.spaces.registry import Space
from chunkmill.store.read import Work, count_vectors, still_wanted
from chunkmill.store.write import relax_durability, write_vectors
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import fingerprint

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Vectors that wait to be written, as `write_vectors` takes them."""

    hashes: Sequence[bytes]
    n_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    vectors: NDArray[np.float32]

    def only(self, wanted: set[bytes]) -> Rows:
        keep = np.array([content_hash in wanted for content_hash in self.hashes], dtype=bool)
        hashes = [content_hash for content_hash in self.hashes if content_hash in wanted]
        return Rows(hashes, self.n_tokens[keep], self.truncated[keep], self.vectors[keep])


@dataclass(frozen=True, slots=True)
class Written:
    """``hashes`` have a vector now, ``new`` of them by this write."""

    hashes: Sequence[bytes]
    new: int


class VectorsLost(Exception):
    """Postgres crashed, and the last fraction of a second of what it had accepted is gone."""


class Attempt:
    """What one attempt has done so far, and what of it is not written yet.

    Its counts change after a commit, never inside a transaction, which may be run again.
    """

    def __init__(self, context: WorkerContext, lease: Lease) -> None:
        self.lease = lease
        self._context = context
        self._usage: usage.Usage | None = None
        self._refused: list[DeadContent] = []
        self._dead: list[DeadContent] = []
        self._done = 0
        self._written: list[bytes] = []
        self._truncated_here = 0
        self._clear()

    def open(self, conn: sa.Connection, space: Space) -> None:
        """Open its account, so that one that dies before its first write is known too."""
        self._usage = usage.Usage(space.spec.provider, self._context.name)
        usage.book(conn, self.lease, self._usage)

    def begin(self, space: Space, engine: Engine, work: Work) -> None:
        self._space, self._engine, self._work = space, engine, work
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
        assert self._usage is not None  # noqa: S101 - begun
        self._usage = replace(
            self._usage,
            tokens=self._usage.tokens + result.tokens,
            engine_seconds=self._usage.engine_seconds + result.seconds,
            at_risk=max(self._usage.at_risk, len(self._hashes) + result.under_way),
        )
        COUNTS.add_all(
            (
                (m.TOKEN_BATCHES, result.tokens > 0),
                (m.TOKENS, result.tokens),
                (m.PADDED_TOKENS, result.padded_tokens),
                (m.ENGINE_SECONDS, result.seconds),
                (m.TOKENIZE_SECONDS, result.tokenize_seconds),
            )
        )
        COUNTS.touch(m.LAST_PROGRESS)

    def flush(self) -> None:
        """Commit what is there. It stays even when the lease is lost: a late vector is a right vector."""

        def write(conn: sa.Connection, written: Written) -> bool:
            return chunk_batches.record_progress_if_held(conn, self.lease, self._embedded + len(written.hashes))

        if not self._commit(write, "write vectors"):
            raise self._superseded()

    def complete(self) -> None:
        """The last vectors, the dead list, the completion and the bill, in one transaction.

        Raises :class:`VectorsLost` where a crash of Postgres took back what was written before.
        """
        n_truncated = len(self._work.truncated) - len(self._refused) + self._truncated_here

        def end(conn: sa.Connection, written: Written) -> bool:
            # Flushes do not wait for the disk, and a crash may have taken one back that this process counts on.
            if count_vectors(conn, self._space, self._written) < len(self._written):
                raise VectorsLost
            embedded = self._embedded + len(written.hashes)
            done = chunk_batches.complete_if_held(conn, self.lease, n_embedded=embedded, n_truncated=n_truncated)
            if done:
                dead = [*self._dead, *self._refused]
                dead_chunks.add_contents(conn, dead, job_id=self.lease.job_id, collection_id=self.lease.collection_id)
            return done

        if not self._commit(end, "complete", usage.Outcome.COMPLETED):
            raise self._superseded()

    def release(self, *, because: ChunkmillError | None = None) -> bool:
        return self._end(
            lambda conn: chunk_batches.release_if_held(conn, self.lease, because=because), usage.Outcome.RELEASED
        )

    def fail(self, *, code: str, error: str, retryable: bool) -> ChunkBatchState | None:
        return self._end(
            lambda conn: chunk_batches.fail_if_held(conn, self.lease, code=code, error=error, retryable=retryable),
            usage.Outcome.FAILED,
            evidence=error,
        )

    def _end(
        self, transition: Callable[[sa.Connection], T], outcome: usage.Outcome, *, evidence: str | None = None
    ) -> T:
        """Run the transition that ends the attempt without its last vectors; it is booked if it was still ours."""

        def end(conn: sa.Connection) -> T:
            ended = transition(conn)
            if ended and self._usage:
                usage.book(conn, self.lease, self._usage, outcome, evidence)
            return ended

        return self._context.transact(end, outcome)

    def _commit(
        self, then: Callable[[sa.Connection, Written], bool], what: str, outcome: usage.Outcome | None = None
    ) -> bool:
        """Write what waits, let ``then`` move the ledger, and book both; False where ``then`` found the lease lost."""
        rows = self._pending()
        assert self._usage is not None  # noqa: S101 - begun
        before = self._usage

        def run(conn: sa.Connection) -> tuple[bool, Written, usage.Usage]:
            relax_durability(conn)
            written = self._write(conn, rows)
            booked = replace(
                before,
                contents=before.contents + written.new,
                recomputed=before.recomputed + len(written.hashes) - written.new,
            )
            ours = then(conn, written)
            return ours, written, usage.book(conn, self.lease, booked, outcome if ours else None)

        started = time.perf_counter()
        ours, written, self._usage = self._context.transact(run, what)
        COUNTS.add_all(
            (
                (m.WRITES, 1),
                (m.WRITE_SECONDS, time.perf_counter() - started),
                (m.CONTENTS, written.new),
                (m.RECOMPUTED, len(written.hashes) - written.new),
            )
        )
        COUNTS.touch(m.LAST_PROGRESS)
        self._written += written.hashes
        self._clear()
        return ours

    def _write(self, conn: sa.Connection, rows: Rows | None) -> Written:
        if rows is None:
            return Written((), 0)
        wanted = still_wanted(conn, rows.hashes, since=self._work.deletions)
        if wanted is not None:
            rows = rows.only(wanted)
        made_by = fingerprint(self._engine, self.lease.on_long, rows.vectors.shape[1])
        new = write_vectors(conn, self._space, made_by, rows.hashes, rows.n_tokens, rows.truncated, rows.vectors)
        return Written(rows.hashes, new)

    def _pending(self) -> Rows | None:
        if not self._hashes:
            return None
        return Rows(
            self._hashes,
            np.concatenate(self._n_tokens),
            np.concatenate(self._truncated),
            np.concatenate(self._vectors),
        )

    @property
    def _embedded(self) -> int:
        return self._work.known - len(self._refused) + len(self._written)

    def _superseded(self) -> LeaseLost:
        return LeaseLost(f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} was superseded")

    def _clear(self) -> None:
        self._hashes: list[bytes] = []
        self._n_tokens: list[NDArray[np.int32]] = []
        self._truncated: list[NDArray[np.bool_]] = []
        self._vectors: list[NDArray[np.float32]] = []
