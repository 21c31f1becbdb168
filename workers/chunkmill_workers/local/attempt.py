"""An attempt at a ChunkBatch by an engine of this worker: it collects vectors and writes them as they are computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.domain.vectors import unfit, why_unfit
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.work import usage
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.store.read import count_vectors, still_wanted
from chunkmill.store.write import relax_durability, write_vectors
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.matryoshka import shorten
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import fingerprint
from chunkmill_workers.process.attempt import Attempt


@dataclass(frozen=True, slots=True)
class Rows:
    """Vectors that wait to be written, as `write_vectors` takes them."""

    hashes: Sequence[bytes]
    n_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    vectors: NDArray[np.float32]

    def only(self, wanted: set[bytes]) -> Rows:
        """The rows of the contents in ``wanted``."""
        keep = np.array([content_hash in wanted for content_hash in self.hashes], dtype=bool)
        hashes = [content_hash for content_hash in self.hashes if content_hash in wanted]
        return Rows(hashes, self.n_tokens[keep], self.truncated[keep], self.vectors[keep])


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Contents that have a vector now; ``new`` of these vectors did not exist before this write."""

    hashes: Sequence[bytes]
    new: int


class VectorsLost(Exception):
    """Postgres crashed and lost the last fraction of a second of the vectors that it had accepted."""


class LocalAttempt(Attempt[WorkerContext]):
    """What an attempt has computed, and which part of it is not written yet."""

    def __init__(self, context: WorkerContext, lease: Lease) -> None:
        super().__init__(context, lease)
        self._n_done = 0
        self._clear()

    def use(self, engine: Engine) -> None:
        """Note the engine that makes the vectors, because its fingerprint is written with them."""
        self._engine = engine

    @property
    def pending_rows(self) -> int:
        return len(self._hashes)

    @property
    def left(self) -> int:
        """How many texts the engine has not handed back."""
        return len(self.work.texts) - self._n_done

    def take(self, result: TokenBatchResult) -> None:
        """Keep the result of a TokenBatch until the next write."""
        hashes = [self.work.texts[i][0] for i in result.indices.tolist()]
        spec = self.space.spec
        vectors = shorten(result.vectors, spec.dimensions, normalize=spec.normalize)
        bad = unfit(vectors, half=self.space.is_half)
        self.dead += [DeadContent(hashes[row], *why_unfit(vectors[row])) for row in np.flatnonzero(bad)]
        self.dead += [DeadContent(self.work.texts[f.index][0], f.code, f.reason) for f in result.failures]
        self._hashes += [content_hash for content_hash, is_bad in zip(hashes, bad, strict=True) if not is_bad]
        self._n_tokens.append(result.n_tokens[~bad])
        self._truncated.append(result.truncated[~bad])
        self._vectors.append(vectors[~bad])
        self._n_done += len(result.indices) + len(result.failures)
        self._n_truncated += int(result.truncated[~bad].sum())
        self._usage = replace(
            self.account,
            tokens=self.account.tokens + result.tokens,
            engine_seconds=self.account.engine_seconds + result.seconds,
            at_risk=max(self.account.at_risk, len(self._hashes) + result.under_way),
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
        """Commit the vectors that wait. They stay even if the lease is lost: a late vector is a right one."""

        def record(conn: sa.Connection, written: WriteResult) -> bool:
            return self._record_progress_if_held(conn, written.hashes)

        if not self._commit(record, "write vectors"):
            raise self._superseded()

    def complete(self) -> None:
        """Commit the last vectors, the dead list, the completion and the account in one transaction.

        Raises :class:`VectorsLost` if a crash of Postgres took back what was written before.
        """

        def end(conn: sa.Connection, written: WriteResult) -> bool:
            if self._has_lost_vectors(conn):
                raise VectorsLost
            return self._complete_if_held(conn, written.hashes)

        if not self._commit(end, "complete", usage.Outcome.COMPLETED):
            raise self._superseded()

    def _commit(
        self, then: Callable[[sa.Connection, WriteResult], bool], what: str, outcome: usage.Outcome | None = None
    ) -> bool:
        """Write the vectors that wait, let ``then`` change the ledger, and book both.

        Returns False if ``then`` found that the lease is lost. The vectors are committed all the same.
        """
        rows = self._pending()

        def run(conn: sa.Connection) -> tuple[bool, WriteResult, usage.Usage]:
            relax_durability(conn)
            written = self._write(conn, rows)
            ours = then(conn, written)
            account = self._book(conn, written.hashes, new=written.new, outcome=outcome if ours else None)
            return ours, written, account

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

    def _has_lost_vectors(self, conn: sa.Connection) -> bool:
        """A flush does not wait for the disk, so a crash may have taken back vectors that this process counts on.

        Those of texts that were deleted meanwhile are not lost.
        """
        if count_vectors(conn, self.space, self._written) == len(self._written):
            return False
        wanted = still_wanted(conn, self._written, since=self.work.deletions)
        return wanted is None or count_vectors(conn, self.space, list(wanted)) < len(wanted)

    def _write(self, conn: sa.Connection, rows: Rows | None) -> WriteResult:
        if rows is None:
            return WriteResult((), 0)
        wanted = still_wanted(conn, rows.hashes, since=self.work.deletions)
        if wanted is not None:
            rows = rows.only(wanted)
        made_by = fingerprint(self._engine, self.lease.on_long, rows.vectors.shape[1])
        new = write_vectors(conn, self.space, made_by, rows.hashes, rows.n_tokens, rows.truncated, rows.vectors)
        return WriteResult(rows.hashes, new)

    def _pending(self) -> Rows | None:
        if not self._hashes:
            return None
        return Rows(
            self._hashes,
            np.concatenate(self._n_tokens),
            np.concatenate(self._truncated),
            np.concatenate(self._vectors),
        )

    def _clear(self) -> None:
        self._hashes: list[bytes] = []
        self._n_tokens: list[NDArray[np.int32]] = []
        self._truncated: list[NDArray[np.bool_]] = []
        self._vectors: list[NDArray[np.float32]] = []
