"""What tests of the served Batch API share: a stand-in for a worker's bulk work, and input files."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.spaces import registry
from chunkmill.store.read import read_work
from chunkmill.store.write import write_vectors
from tests.support.gateways import tokens_of, vector_of
from tests.support.waiting import PATIENCE

MODEL = "all-MiniLM-L6-v2"


class BulkWorker(threading.Thread):
    """Embeds ChunkBatches with ``vector_of`` while ``may`` is set. A text in ``dead`` goes to the dead list.

    ``embedded`` has each text as often as it was embedded, in order.
    """

    def __init__(self, db: sa.Engine, *, dead: Mapping[str, str] | None = None) -> None:
        super().__init__(name="bulk worker", daemon=True)
        self.may = threading.Event()
        self.may.set()
        self.dead = dict(dead or {})
        self.embedded: list[str] = []
        self._ends = threading.Event()
        self._db = db

    def run(self) -> None:
        while not self._ends.is_set():
            if not (self.may.is_set() and self.embed_next()):
                self._ends.wait(0.01)

    def embed_next(self) -> bool:
        """Embed one ChunkBatch. False if none is due."""
        with self._db.begin() as conn:
            due = conn.execute(
                sa.text(
                    "SELECT id FROM chunk_batches WHERE state = 'available' AND route = 'local' ORDER BY id LIMIT 1"
                )
            ).scalar_one_or_none()
            lease = due and chunk_batches.claim_if_due(conn, due, owner="bulk:1", lease_seconds=60)
        if not lease:
            return False
        with self._db.begin() as conn:
            space = registry.get(conn, lease.space_id)
            work = read_work(conn, space, lease.chunk_batch_id)
            alive = [(content, text) for content, text in work.texts if text not in self.dead]
            counts = np.array([tokens_of(text) for _, text in alive], np.int32)
            vectors = [vector_of(text, "document", space.spec.dimensions) for _, text in alive]
            write_vectors(
                conn,
                space,
                space.spec.fingerprint,
                [content for content, _ in alive],
                counts,
                counts > space.spec.max_tokens,
                np.stack(vectors) if vectors else np.empty((0, space.spec.dimensions), np.float32),
            )
            chunk_batches.complete_if_held(conn, lease, n_embedded=work.known + len(alive), n_truncated=0)
            refused = [
                DeadContent(content, self.dead[text], f"it is {self.dead[text]}")
                for content, text in work.texts
                if text in self.dead
            ]
            dead_chunks.add_contents(conn, refused, job_id=lease.job_id, collection_id=lease.collection_id)
        self.embedded += [text for _, text in alive]
        with self._db.begin() as conn:
            finish_if_done(conn, lease.job_id, space)
        return True

    def end(self) -> None:
        self._ends.set()
        self.join(PATIENCE)


@contextlib.contextmanager
def bulk_worker(db: sa.Engine, *, dead: Mapping[str, str] | None = None) -> Iterator[BulkWorker]:
    worker = BulkWorker(db, dead=dead)
    worker.start()
    try:
        yield worker
    finally:
        worker.end()


def line(custom_id: str, given: Any, **body: Any) -> dict[str, Any]:
    """A line of an input file, as OpenAI's documentation shows it."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": MODEL, "input": given, **body},
    }


def jsonl(*lines: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)
