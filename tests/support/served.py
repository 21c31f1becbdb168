"""What tests of the served Batch API share: a stand-in for a worker's bulk work, and input files."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import openai
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadContent
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.read import read_work
from chunkmill.store.write import write_vectors
from tests.support.gateways import RunningGateway, tokens_of, vector_of
from tests.support.waiting import PATIENCE, until

MODEL = "all-MiniLM-L6-v2"


class BulkWorker(threading.Thread):
    """Embeds ChunkBatches with ``vector_of`` while ``may`` is set. A text in ``dead`` goes to the dead list.

    ``embedded`` has each text as often as it was embedded, in order.
    """

    def __init__(self, db: sa.Engine, *, dead: Mapping[str, str] | None = None, lease_seconds: float = 60.0) -> None:
        super().__init__(name="bulk worker", daemon=True)
        self._lease_seconds = lease_seconds
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
            lease = due and chunk_batches.claim_if_due(conn, due, owner="bulk:1", lease_seconds=self._lease_seconds)
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
            if not chunk_batches.complete_if_held(conn, lease, n_embedded=work.known + len(alive), n_truncated=0):
                return True  # its lease was over
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
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class TwoTenants:
    """A key for each of two tenants. That of the second may use one model only."""

    KEYS: ClassVar = {
        "cmk_first": Caller(1, "first", "north", frozenset({Scope.BATCHES})),
        "cmk_second": Caller(2, "second", "south", frozenset({Scope.BATCHES}), models=frozenset({"another"})),
        "cmk_third": Caller(3, "third", "north", frozenset({Scope.EMBED})),
    }

    async def caller(self, key: str) -> Caller | None:
        return self.KEYS.get(key)


def openai_client(gateway: RunningGateway, key: str) -> openai.OpenAI:
    return openai.OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0, timeout=PATIENCE)


def upload(api: openai.OpenAI, *lines: Mapping[str, Any] | bytes, **more: Any) -> str:
    content = b"".join(line if isinstance(line, bytes) else jsonl(line) for line in lines)
    return api.files.create(file=("lines.jsonl", content), purpose="batch", **more).id


def start(api: openai.OpenAI, *lines: Mapping[str, Any] | bytes, **more: Any) -> Any:
    given: dict[str, Any] = {"endpoint": "/v1/embeddings", "completion_window": "24h", **more}
    return api.batches.create(input_file_id=upload(api, *lines), **given)


def ended(api: openai.OpenAI, batch_id: str) -> Any:
    final = ("completed", "failed", "expired", "cancelled")
    until(lambda: api.batches.retrieve(batch_id).status in final, pause=0.02)
    return api.batches.retrieve(batch_id)


def lines_of(api: openai.OpenAI, file_id: str) -> dict[str, Any]:
    read = [json.loads(text) for text in api.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in read}) == len(read)
    return {line["custom_id"]: line for line in read}


def rows(db: sa.Engine, query: str, **values: object) -> list[Any]:
    with db.begin() as conn:
        result = conn.execute(sa.text(query), values)
        return list(result.all()) if result.returns_rows else []


def texts(db: sa.Engine) -> set[str]:
    return {row.text for row in rows(db, "SELECT text FROM contents")}


def clean_up(client: Client, db: sa.Engine, settings: Settings) -> None:
    """Two rounds of a poller: the first deletes files and chunks, the second what these left."""
    poller = Poller(db, client._broker, settings)
    for _ in range(2):
        poller._files_at = poller._dropped_at = -1.0
        poller.round()
