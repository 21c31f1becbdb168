"""What workers do to the ledger, done by a test, without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from chunkmill import Job
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.states import JobState
from chunkmill.ledger.dead import dead_chunks, deaths
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.spaces import registry
from chunkmill.store.read import read_work
from chunkmill.store.write import write_vectors


class Hands:
    """Claims, embeds, fails and dies as told."""

    def __init__(self, db: sa.Engine) -> None:
        self.db = db
        self.deaths = 0

    def rows(self, statement: str, **parameters: object) -> list[tuple[Any, ...]]:
        with self.db.begin() as conn:
            return [tuple(row) for row in conn.execute(sa.text(statement), parameters)]

    def due(self) -> list[int]:
        return [i for (i,) in self.rows("SELECT id FROM chunk_batches WHERE state = 'available' ORDER BY id")]

    def of_job(self, job_id: int) -> list[int]:
        """The ids of a job's ChunkBatches."""
        return [i for (i,) in self.rows("SELECT id FROM chunk_batches WHERE job_id = :job ORDER BY id", job=job_id)]

    def vectors_of(self, job_id: int) -> str:
        """The table of the vectors of a job's space."""
        with self.db.begin() as conn:
            return registry.get(conn, jobs.space_id(conn, job_id)).table_name

    def claim(self, chunk_batch_id: int, owner: str = "host:1") -> Lease:
        with self.db.begin() as conn:
            conn.execute(sa.text("UPDATE chunk_batches SET not_before = now() WHERE id = :id"), {"id": chunk_batch_id})
            lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner=owner, lease_seconds=60)
        assert lease is not None
        return lease

    def work(self, *, dead: Mapping[str, str] | None = None) -> None:
        """Embed all that is due; a text in ``dead`` goes to the dead list with its code."""
        codes = {content_hash(text): code for text, code in (dead or {}).items()}
        for chunk_batch_id in self.due():
            self.embed(self.claim(chunk_batch_id), codes)

    def write(self, space_id: int, texts: Sequence[str]) -> None:
        """Write vectors of texts, as a worker of another job may."""
        with self.db.begin() as conn:
            space, n = registry.get(conn, space_id), len(texts)
            vectors = np.ones((n, space.spec.dimensions), np.float32)
            hashes = [content_hash(text) for text in texts]
            write_vectors(
                conn, space, space.spec.fingerprint, hashes, np.ones(n, np.int32), np.zeros(n, np.bool_), vectors
            )

    def complete(self, lease: Lease, *, n_embedded: int = 0, dead: Mapping[str, str] | None = None) -> None:
        """Complete an attempt that wrote no vector, whatever it says; ``dead`` are texts with their codes."""
        with self.db.begin() as conn:
            assert chunk_batches.complete_if_held(conn, lease, n_embedded=n_embedded, n_truncated=0)
            refused = [DeadContent(content_hash(text), code, f"it is {code}") for text, code in (dead or {}).items()]
            dead_chunks.add_contents(conn, refused, job_id=lease.job_id, collection_id=lease.collection_id)

    def fail(self, lease: Lease, *, error: str = "why not", retryable: bool = True) -> None:
        with self.db.begin() as conn:
            assert chunk_batches.fail_if_held(conn, lease, code="worker_error", error=error, retryable=retryable)

    def embed(self, lease: Lease, codes: Mapping[bytes, str]) -> None:
        with self.db.begin() as conn:
            space = registry.get(conn, lease.space_id)
            work = read_work(conn, space, lease.chunk_batch_id)
            hashes = [h for h, _ in work.texts if h not in codes]
            n = len(hashes)
            vectors = np.ones((n, space.spec.dimensions), np.float32)
            write_vectors(
                conn, space, space.spec.fingerprint, hashes, np.ones(n, np.int32), np.zeros(n, np.bool_), vectors
            )
            assert chunk_batches.complete_if_held(conn, lease, n_embedded=work.known + n, n_truncated=0)
            refused = [DeadContent(h, codes[h], f"it is {codes[h]}") for h, _ in work.texts if h in codes]
            dead_chunks.add_contents(conn, refused, job_id=lease.job_id, collection_id=lease.collection_id)
        self.finish(lease.job_id)

    def finish(self, job_id: int) -> JobState | None:
        with self.db.begin() as conn:
            return finish_if_done(conn, job_id, registry.get(conn, jobs.space_id(conn, job_id)))

    def die(self, chunk_batch_id: int) -> None:
        self.deaths += 1
        owner = f"host:{self.deaths}"
        self.claim(chunk_batch_id, owner)
        with self.db.begin() as conn:
            deaths.take_back_from(conn, owner, evidence="ended by SIGSEGV")

    def kill_with(self, text: str, job: Job) -> int:
        """Every worker dies that takes ``text``, until it is buried; all else is embedded. Returns the deaths."""
        before = self.deaths
        while due := self.due():
            for chunk_batch_id in due:
                ((deadly,),) = self.rows(
                    "SELECT :hash = ANY(content_hashes) FROM chunk_batches WHERE id = :id",
                    hash=content_hash(text), id=chunk_batch_id,
                )  # fmt: skip
                if deadly:
                    self.die(chunk_batch_id)
                else:
                    self.embed(self.claim(chunk_batch_id), {})
        self.finish(job.id)
        return self.deaths - before

    def waiting(self) -> int:
        """How many connections to this database wait for a lock."""
        ((waiting,),) = self.rows(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return int(waiting)

    def ledger(self) -> list[list[tuple[Any, ...]]]:
        """All that a retry or a drop may change."""
        tables = ("jobs", "chunk_batches", "dead_chunks", "chunks", "contents")
        return [self.rows(f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables]
