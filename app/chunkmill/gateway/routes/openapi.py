"""The description of the API, for programs and for people."""

from __future__ import annotations

import functools
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.gateway import openapi
from chunkmill.gateway.caller import Caller
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.page import session
from chunkmill.gateway.page.rendering import html
from chunkmill.gateway.shapes import answer


@functools.cache
def _endpoints() -> tuple[Endpoint, ...]:
    from chunkmill.gateway.routes import all_endpoints  # this module is one of those that it joins

    return tuple(endpoint for endpoint in all_endpoints() if endpoint.is_listed)


@functools.cache
def _document() -> dict[str, Any]:
    return openapi.document(_endpoints())


async def describe(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(_document())


async def docs(gateway: Gateway, request: Request, caller: Caller) -> Response:
    topics: dict[str, list[Endpoint]] = {}
    for endpoint in _endpoints():
        topics.setdefault(openapi.topic(endpoint), []).append(endpoint)
    schemas = _document()["components"]["schemas"]
    return html(
        "docs.html",
        topics=topics,
        schemas=schemas,
        scopes=openapi.SCOPES,
        document=_document()["info"],
        path_parameters=openapi.path_parameters,
        named=openapi.NAMED,
        type_of=_type_of,
        is_known=await session.caller_of(gateway, request) is not None,
    )


def _type_of(schema: Schema) -> str:
    """A short word for a schema, such as ``text``, ``list of Job`` or ``number or null``."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " · ".join(map(str, schema["enum"]))
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(_type_of, schema[several])))
    kind = schema.get("type", "any JSON")
    if kind == "array":
        return f"list of {_type_of(schema.get('items', {}))}"
    if isinstance(kind, list):
        return " or ".join(kind)
    return {"string": str(schema.get("format", "text"))}.get(kind, str(kind))


ENDPOINTS = [
    Endpoint(
        "GET",
        "/openapi.json",
        describe,
        None,
        "This API as an OpenAPI 3.1 document.",
        answer={"type": "object", "description": "An OpenAPI document."},
    ),
    Endpoint("GET", "/docs", docs, None, "This API as a page.", answer={"type": "string"}, media_type="text/html"),
]
