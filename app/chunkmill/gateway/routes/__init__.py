"""The endpoints, by what they are about. Each module has a list ``ENDPOINTS``."""

from __future__ import annotations

from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.routes import cohere, embed, health, ollama, openai


def all_endpoints() -> list[Endpoint]:
    return [
        *health.ENDPOINTS,
        *openai.ENDPOINTS,
        *embed.ENDPOINTS,
        *cohere.ENDPOINTS,
        *ollama.ENDPOINTS,
    ]
