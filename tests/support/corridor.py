"""The paid routes in one process: a client, the poller's rounds and the steps, against the test server.

Only Celery is missing, which carries nothing but a number; ``tests/acceptance/test_openai.py`` runs everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db
from chunkmill.domain.results import Job
from chunkmill.domain.states import Route
from chunkmill.openai.http import Provider
from chunkmill.poller.poller import Poller
from chunkmill.settings import Settings
from chunkmill_workers.provider.context import ProviderContext
from chunkmill_workers.provider.health import Form, Health
from chunkmill_workers.provider.plain import request_chunk_batch
from chunkmill_workers.provider.steps import advance_provider_batch
from tests.openai_server import OpenAIServer, vector_for
from tests.support.waiting import PATIENCE, until

MODEL = "text-embedding-3-small"
DIMENSIONS = 8
QUICK = {
    "openai_gather_seconds": 0.0,
    "openai_poll_seconds": 0.1,
    "openai_adopt_seconds": 0.4,
    "openai_timeout_seconds": PATIENCE,
    "lease_seconds": PATIENCE,
    "embedding_model": MODEL,
    "embedding_dimensions": DIMENSIONS,
}


def settings_for(settings: Settings, server: OpenAIServer, **changes: Any) -> Settings:
    """Return ``settings`` with the test server as the provider and with short waits."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return Settings.from_env(
        **{**given, **QUICK, "openai_api_key": server.key, "openai_base_url": server.url, **changes}
    )


class Trusting(Health):
    """Sends no probes and pauses no lane, so that a test counts its own requests and waits for no pause."""

    def proves(self, form: Form, *, since: float = 0.0) -> bool:
        return True

    def pause(self, route: Route) -> int | None:
        return None


class Corridor:
    """``trusting=False`` is for tests of probes, and of lanes that fail."""

    def __init__(self, settings: Settings, server: OpenAIServer, *, trusting: bool = True) -> None:
        self.settings = settings
        self.trusting = trusting
        self.server = server
        url = settings.require_database_url()
        self.db = create_db(url, role="test")
        self.broker = Broker.connect(settings)
        self.client = Client(create_db(url, role="client"), self.broker, settings)
        self.context = self.worker()
        self.poller = Poller(self.db, self.broker, settings)

    def worker(self) -> ProviderContext:
        """Return the context of one more worker of the queue, in this process."""
        context = ProviderContext(
            self.settings, create_db(self.settings.require_database_url(), role="w"), Provider(self.settings)
        )
        if self.trusting:
            context.health = Trusting()
        context.leases.start()
        context.steps.start()
        return context

    def enqueue(self, n: int, *, text: str = "text {}", **more: Any) -> Job:
        chunks = ((f"chunk-{i}", text.format(i)) for i in range(n))
        return self.client.enqueue(chunks, **{"collection": "docs", "route": "openai", **more})

    def turn(self) -> None:
        """Run one round of the poller and each step that is due now."""
        self.poller.round()
        for provider_batch_id in self.due("provider_batches", "state <> 'closed'"):
            advance_provider_batch(self.context, provider_batch_id)
        for chunk_batch_id in self.due("chunk_batches", "state = 'available' AND route = 'openai-sync'"):
            request_chunk_batch(self.context, chunk_batch_id)

    def due(self, table: str, which: str) -> list[int]:
        with self.db.begin() as conn:
            rows = conn.execute(sa.text(f"SELECT id FROM {table} WHERE {which} AND not_before <= now() ORDER BY id"))
            return list(rows.scalars())

    def run_until(self, done: Callable[[], object]) -> None:
        def done_after_a_turn() -> object:
            self.turn()
            return done()

        if not done():
            batches = "SELECT id, state, failures, error FROM provider_batches"
            until(done_after_a_turn, lambda: self.rows(batches), pause=0.02)

    def finish(self, *jobs: Job, closed: bool = True) -> list[Job]:
        """Run turns until the jobs have ended and, with ``closed``, their remote files are deleted. Return the jobs."""
        self.run_until(lambda: all(self.client.job(job.id).state.is_final for job in jobs))
        if closed:
            self.run_until(lambda: not self.rows("SELECT FROM provider_batches WHERE state <> 'closed'"))
        return [self.client.job(job.id) for job in jobs]

    def rows(self, query: str, **parameters: Any) -> list[dict[str, Any]]:
        with self.db.begin() as conn:
            return [dict(row._mapping) for row in conn.execute(sa.text(query), parameters)]

    def one(self, query: str, **parameters: Any) -> Any:
        with self.db.begin() as conn:
            return conn.execute(sa.text(query), parameters).scalar_one()

    def batches(self) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM provider_batches ORDER BY id")

    def check_vectors(self, texts: dict[str, str], collection: str = "docs") -> None:
        """Assert that every chunk has the vector that the server makes of its text."""
        vectors = self.client.vectors(collection)
        assert vectors.keys() == texts.keys()
        for chunk_id, text in texts.items():
            np.testing.assert_allclose(
                vectors[chunk_id], vector_for(text, self.settings.embedding_dimensions or DIMENSIONS), atol=1e-6
            )

    def check_paid_once(self, texts: set[str] | None = None) -> None:
        bill = self.server.bill()
        assert set(bill.values()) <= {1}, {times: list(bill.values()).count(times) for times in set(bill.values())}
        if texts is not None:
            from tests.openai_server import text_hash

            assert bill.keys() == {text_hash(text) for text in texts}

    def close(self) -> None:
        self.client.close()
        self.context.close()
        self.broker.close()
        self.db.dispose()


@contextmanager
def corridor(settings: Settings, server: OpenAIServer, *, trusting: bool = True, **changes: Any) -> Iterator[Corridor]:
    made = Corridor(settings_for(settings, server, **changes), server, trusting=trusting)
    try:
        yield made
    finally:
        made.close()
