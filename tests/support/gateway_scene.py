"""A gateway with two of everything: collections, jobs, and callers who may see one of them each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import sqlalchemy as sa

from chunkmill import Chunk, Client, Job
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.states import JobState
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work import chunk_batches
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store.write import write_vectors
from tests.support.gateways import KEY, RunningGateway, running_gateway, vector_of

DOCS = "docs"
ODD = "a/b %2F c?d"
"""A collection whose name needs every escape of a path."""
ALIAS = "live/docs"
"""An alias of ``DOCS``."""
DOCS_ONLY, ODD_ONLY, SEARCH_ONLY, JOBS_ONLY = "cmk_docs", "cmk_odd", "cmk_search", "cmk_jobs"
ODD_MODEL, ADMIN_OF_MODEL = "cmk_odd_model", "cmk_admin_of_model"
CALLERS = {
    KEY: Caller(None, "everything", "one", frozenset(Scope)),
    DOCS_ONLY: Caller(1, "docs", "two", frozenset(Scope), collections=frozenset({ALIAS, "new of two"})),
    ODD_ONLY: Caller(2, "odd", "three", frozenset({Scope.SEARCH, Scope.JOBS}), collections=frozenset({ODD})),
    SEARCH_ONLY: Caller(3, "search", "two", frozenset({Scope.SEARCH})),
    JOBS_ONLY: Caller(4, "jobs", "three", frozenset({Scope.JOBS}), models=frozenset({"all-MiniLM-L6-v2"})),
    ODD_MODEL: Caller(5, "model", "four", frozenset({Scope.JOBS}), models=frozenset({"another-model"})),
    ADMIN_OF_MODEL: Caller(6, "admin", "five", frozenset({Scope.ADMIN}), models=frozenset({"another-model"})),
}


class Ring:
    async def caller(self, key: str) -> Caller | None:
        return CALLERS.get(key)


@dataclass(frozen=True, slots=True)
class GatewayScene:
    running: RunningGateway
    settings: Settings
    client: Client
    db: sa.Engine
    jobs: Mapping[str, Job]
    """Collection → the job that filled it."""
    clients: Mapping[str | None, httpx2.Client]

    @property
    def http(self) -> httpx2.Client:
        return self.running.http

    def ask(self, key: str | None, method: str, path: str, **rest: Any) -> httpx2.Response:
        return self.clients[key].request(method, path, **rest)

    def embed(self, job_id: int) -> None:
        """Give every text of a job its vector of :func:`vector_of`, and complete it."""
        with self.db.begin() as conn:
            due = conn.execute(
                sa.text("SELECT id FROM chunk_batches WHERE job_id = :job AND state = 'available' ORDER BY id"),
                {"job": job_id},
            )
            ids = list(due.scalars())
        for chunk_batch_id in ids:
            with self.db.begin() as conn:
                conn.execute(
                    sa.text("UPDATE chunk_batches SET not_before = now() WHERE id = :id"), {"id": chunk_batch_id}
                )
                lease = chunk_batches.claim_if_due(conn, chunk_batch_id, owner="host:1", lease_seconds=60)
                assert lease is not None
                space = registry.get(conn, jobs.space_id(conn, job_id))
                rows = conn.execute(
                    sa.text(
                        "SELECT c.content_hash, c.text FROM contents c JOIN chunk_batches b "
                        "ON c.content_hash = ANY(b.content_hashes) WHERE b.id = :id ORDER BY c.content_hash"
                    ),
                    {"id": chunk_batch_id},
                ).all()
                texts = [row.text.decode() if isinstance(row.text, bytes) else row.text for row in rows]
                vectors = np.stack([vector_of(text, "document", space.spec.dimensions) for text in texts])
                n = len(rows)
                write_vectors(
                    conn,
                    space,
                    space.spec.fingerprint,
                    [content_hash(text) for text in texts],
                    np.ones(n, np.int32),
                    np.zeros(n, np.bool_),
                    vectors,
                )
                chunk_batches.complete_if_held(conn, lease, n_embedded=n, n_truncated=0)
        with self.db.begin() as conn:
            finish_if_done(conn, job_id, registry.VectorTable(jobs.space_id(conn, job_id)))


def of(collection: str, rest: str = "") -> str:
    """The path of a collection."""
    return f"/v1/collections/{quote(collection, safe='')}{rest}"


@contextlib.contextmanager
def gateway_scene(settings: Settings) -> Iterator[GatewayScene]:
    db = create_db(settings.require_database_url(), role="test")
    client = Client(create_db(settings.require_database_url(), role="client"), Broker.connect(settings), settings)
    try:
        with contextlib.ExitStack() as stack, running_gateway(settings, keys=Ring()) as running:
            filled = {
                name: client.enqueue(
                    [Chunk(f"{i}", f"{name} number {i}", {"n": i, "of": name}) for i in range(6)], collection=name
                )
                for name in (DOCS, ODD)
            }
            client.set_alias(ALIAS, DOCS)
            # Each takes 0.2 s to make.
            clients = {key: stack.enter_context(running.client(key)) for key in (None, *CALLERS)}
            scene = GatewayScene(running, settings, client, db, filled, clients)
            for job in filled.values():
                scene.embed(job.id)
                assert client.job(job.id).state is JobState.COMPLETED
            yield scene
    finally:
        client.close()
        db.dispose()
