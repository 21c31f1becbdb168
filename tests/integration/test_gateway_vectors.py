"""A real model behind a gateway: every way to ask gives the vectors that ``client.embed`` gives."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkmill import Client
from chunkmill.gateway.inputs import cl100k
from chunkmill.settings import Settings
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.responder import EmbedResponder
from tests.support.gateways import RunningGateway, running_gateway

TEXTS = ["a cat sat on the mat", "", "日本語 text é", "word " * 400]
"""One of them is empty, and one is cut."""


@pytest.fixture
def gateway(settings: Settings, context: WorkerContext) -> Iterator[RunningGateway]:
    responder = EmbedResponder(context)
    responder.start()
    with running_gateway(settings) as running:
        yield running
    responder.stop()


def test_every_way_to_ask_gives_the_same_vectors(gateway: RunningGateway, client: Client) -> None:
    asked = client.embed_texts(TEXTS, blank=True)

    def openai_form(given: object, **options: object) -> NDArray[np.float32]:
        answer = gateway.http.post("/v1/embeddings", json={"input": given, **options}).json()
        assert answer["usage"]["prompt_tokens"] == asked.tokens.sum()
        assert answer["truncated"] == [3]
        rows = [item["embedding"] for item in answer["data"]]
        return np.array([np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows])

    ways = {
        "float": openai_form(TEXTS),
        "base64": openai_form(TEXTS, encoding_format="base64"),
        "texts": gateway.http.post("/embed", json={"texts": TEXTS}).json()["embeddings"],
        "inputs": gateway.http.post("/", json={"inputs": TEXTS}).json(),
        "cohere": gateway.http.post("/v2/embed", json={"texts": TEXTS}).json()["embeddings"]["float"],
        "ollama": gateway.http.post("/api/embed", json={"input": TEXTS}).json()["embeddings"],
    }
    for way, vectors in ways.items():
        assert np.abs(np.asarray(vectors, np.float32) - asked.vectors).max() <= 1e-6, way

    words = [text for text in TEXTS if text]  # an empty text has no token, and LangChain asks for it apart
    of_words = asked.vectors[[i for i, text in enumerate(TEXTS) if text]]
    ids = [cl100k().encode_ordinary(text) for text in words]
    answer = gateway.http.post("/v1/embeddings", json={"input": ids}).json()
    assert np.abs(np.array([item["embedding"] for item in answer["data"]]) - of_words).max() <= 1e-6
    empty = gateway.http.post("/v1/embeddings", json={"input": ""}).json()
    assert np.abs(np.array(empty["data"][0]["embedding"]) - asked.vectors[1]).max() <= 1e-6
