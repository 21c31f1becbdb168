"""The addresses under ``/v1`` and the names tests know them by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.openai_server import batches, embeddings, files
from tests.openai_server.errors import ApiError
from tests.openai_server.exchange import Answer, Request
from tests.openai_server.store import Store

Endpoint = Callable[[Store, Request], Answer]


@dataclass(frozen=True)
class Route:
    name: str
    method: str
    path: re.Pattern[str]
    answer: Endpoint


def _route(name: str, method: str, path: str, answer: Endpoint) -> Route:
    return Route(name, method, re.compile("/v1" + path.replace("{id}", "(?P<id>[^/]+)")), answer)


ROUTES = (
    _route("files.create", "POST", "/files", files.create),
    _route("files.list", "GET", "/files", files.listed),
    _route("files.retrieve", "GET", "/files/{id}", files.retrieve),
    _route("files.delete", "DELETE", "/files/{id}", files.delete),
    _route("files.content", "GET", "/files/{id}/content", files.content),
    _route("batches.create", "POST", "/batches", batches.create),
    _route("batches.list", "GET", "/batches", batches.listed),
    _route("batches.retrieve", "GET", "/batches/{id}", batches.retrieve),
    _route("batches.cancel", "POST", "/batches/{id}/cancel", batches.cancel),
    _route("embeddings.create", "POST", "/embeddings", embeddings.create),
)


def find(method: str, path: str) -> tuple[Route, str]:
    """The route, and the id in the address or nothing."""
    for route in ROUTES:
        match = route.path.fullmatch(path)
        if match is not None and route.method == method:
            return route, match.groupdict().get("id", "")
    raise ApiError(404, f"Invalid URL ({method} {path})")
