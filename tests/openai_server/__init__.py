"""A real server process that speaks OpenAI's files, batches and embeddings protocol, for tests.

It is strict about what it accepts, misbehaves on demand and counts what it charged::

    with OpenAIServer() as server:
        server.control(enqueued_tokens=3_000_000, in_progress_seconds=0.2)
        server.misbehave("cut", where={"endpoint": "batches.create"}, applied=True)
        client = openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)
        ...
        assert set(server.bill().values()) == {1}

The settings are in ``config.py``, the misbehaviours in ``kinds.py``, the endpoints' names in ``routes.py``.
"""

from __future__ import annotations

from tests.openai_server.config import DEFAULT_KEY, DEFAULT_MODEL
from tests.openai_server.helper import OpenAIServer
from tests.openai_server.vectors import text_hash, vector_for

__all__ = ["DEFAULT_KEY", "DEFAULT_MODEL", "OpenAIServer", "text_hash", "vector_for"]
