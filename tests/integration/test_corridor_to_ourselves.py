"""Our own paid corridor with a gateway of ours as its provider: the protocol of both sides fits, and each text costs
once on either side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.db.connect import create_db
from chunkmill.embedded import StackStatus
from chunkmill.settings import Settings
from tests.conftest import fresh_settings
from tests.openai_server import OpenAIServer
from tests.support.corridor import MODEL, Corridor, corridor
from tests.support.gateways import RunningGateway, running_gateway, tokens_of, vector_of
from tests.support.served import MODEL as LOCAL
from tests.support.served import BulkWorker, bulk_worker, rows

DIMENSIONS = 384


@pytest.fixture
def provider(stack: StackStatus) -> Iterator[tuple[RunningGateway, BulkWorker, sa.Engine]]:
    """A gateway over a database of its own, which serves the local model under OpenAI's name."""
    with fresh_settings(stack) as given:
        chosen = {name: getattr(given, name) for name in given.model_fields_set}
        settings = Settings.from_env(**{**chosen, "gateway_model_aliases": {MODEL: LOCAL}})
        db = create_db(settings.require_database_url(), role="test")
        with running_gateway(settings) as gateway, bulk_worker(db) as worker:
            yield gateway, worker, db
        db.dispose()


@pytest.fixture
def caller(settings: Settings, provider: tuple[RunningGateway, BulkWorker, sa.Engine]) -> Iterator[Corridor]:
    gateway = provider[0]
    server = cast(OpenAIServer, SimpleNamespace(key=gateway.key, url=f"{gateway.url}/v1"))
    more: dict[str, Any] = {"embedding_dimensions": DIMENSIONS, "openai_request_inputs": 4}
    with corridor(settings, server, **more) as made:
        yield made


def test_a_job_of_route_openai_is_a_served_batch_and_each_text_costs_once_on_both_sides(
    caller: Corridor, provider: tuple[RunningGateway, BulkWorker, sa.Engine]
) -> None:
    gateway, worker, db = provider
    texts = {f"c{n}": f"text number {n % 40}" for n in range(60)}
    job = caller.client.enqueue(texts.items(), collection="docs", route="openai")
    (job,) = caller.finish(job)
    assert (job.state, job.dead, job.contents) == ("completed", 0, 40)
    vectors = caller.client.vectors("docs")
    assert vectors.keys() == texts.keys()
    for chunk_id, text in texts.items():
        np.testing.assert_allclose(vectors[chunk_id], vector_of(text, "document", DIMENSIONS), atol=1e-6)
    once = Counter(dict.fromkeys(texts.values(), 1))
    assert Counter(worker.embedded) == once
    (charged,) = caller.rows("SELECT sum(contents)::int AS contents, sum(tokens)::int AS tokens FROM charges")
    assert charged == {"contents": 40, "tokens": sum(tokens_of(text) for text in once)}
    ((served, completed, tokens),) = rows(
        db, "SELECT count(*), sum(n_completed)::int, sum(n_tokens)::int FROM served_batches WHERE state = 'completed'"
    )
    assert (served >= 1, completed, tokens) == (True, 10, charged["tokens"])
    # It has deleted its files at the provider.
    assert gateway.http.get("/v1/files").json()["data"] == []
