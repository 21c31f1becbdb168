"""The endpoints, by what they are about. Each module has a list ``ENDPOINTS``."""

from __future__ import annotations

from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.routes import collections, dead, health, jobs, money, openapi, page


def all_endpoints() -> list[Endpoint]:
    return [
        *health.ENDPOINTS,
        *jobs.ENDPOINTS,
        *dead.ENDPOINTS,
        *collections.ENDPOINTS,
        *money.ENDPOINTS,
        *openapi.ENDPOINTS,
        *page.ENDPOINTS,
    ]
