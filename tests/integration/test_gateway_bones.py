"""What every route of a gateway has, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.client import Client
from chunkmill.settings import Settings
from tests.support.gateways import RunningGateway, running_gateway, stand_in_worker, tokens_of, vector_of


@pytest.fixture
def gateway(settings: Settings) -> Iterator[RunningGateway]:
    with running_gateway(settings) as running:
        yield running


def test_a_gateway_answers_on_its_socket(gateway: RunningGateway) -> None:
    answer = gateway.http.get("/live")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_path_that_does_not_exist_is_refused_in_the_form_of_openai(gateway: RunningGateway) -> None:
    answer = gateway.http.get("/nowhere")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_the_stand_in_answers_what_a_client_asks(client: Client, db: sa.Engine) -> None:
    long = "word " * 300
    with stand_in_worker(db) as worker:
        embedded = client.embed_texts(["a b", long], kind="query")
    assert np.array_equal(embedded.vectors[0], vector_of("a b", "query", 384))
    assert embedded.tokens.tolist() == [tokens_of("a b"), 256]
    assert embedded.truncated.tolist() == [False, True]
    assert worker.asked == [("a b", long)]
