"""Fixtures of the server's own tests: one server for a module, as new for each test."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.openai_server.asking import Asking
from tests.openai_server.config import Config
from tests.openai_server.helper import OpenAIServer
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: OpenAIServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0, timeout=PATIENCE) as made:
        yield made


@pytest.fixture
def asking(server: OpenAIServer, client: openai.OpenAI, request: pytest.FixtureRequest) -> Asking:
    server.calm()
    server.control(**Config().as_json())
    return Asking(server, client, [f"{request.node.name} {number}" for number in range(10)])
