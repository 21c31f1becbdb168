"""The endpoints, by what they are about. Each module has a list ``ENDPOINTS``."""

from __future__ import annotations

from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.routes import (
    batches,
    bridges,
    cohere,
    collections,
    dead,
    embed,
    files,
    health,
    indexes,
    jobs,
    judging,
    money,
    ollama,
    openai,
    openapi,
    page,
    reembeddings,
)


def all_endpoints() -> list[Endpoint]:
    return [
        *health.ENDPOINTS,
        *openai.ENDPOINTS,
        *files.ENDPOINTS,
        *batches.ENDPOINTS,
        *embed.ENDPOINTS,
        *cohere.ENDPOINTS,
        *ollama.ENDPOINTS,
        *jobs.ENDPOINTS,
        *dead.ENDPOINTS,
        *collections.ENDPOINTS,
        *indexes.ENDPOINTS,
        *judging.ENDPOINTS,
        *bridges.ENDPOINTS,
        *reembeddings.ENDPOINTS,
        *money.ENDPOINTS,
        *openapi.ENDPOINTS,
        *page.ENDPOINTS,
    ]
