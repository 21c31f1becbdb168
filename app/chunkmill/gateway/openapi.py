"""The description of the API, made from the endpoints: OpenAPI 3.1, and what the page at ``/docs`` shows."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from chunkmill.gateway.caller import Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.shapes import components

ERROR: Schema = {
    "type": "object",
    "description": "Every answer that is not a success. No message holds a text or a key.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "What was wrong, where, and what to do next."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "null"], "description": "A stable word."},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
SECURITY: Mapping[str, Mapping[str, str]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "api_key": {"type": "apiKey", "in": "header", "name": "api-key"},
    "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
SCOPES: Mapping[Scope, str] = {
    Scope.EMBED: "embed texts",
    Scope.SEARCH: "search collections and read them",
    Scope.JOBS: "enqueue chunks, follow jobs, change and delete chunks",
    Scope.BATCHES: "files and batches",
    Scope.ADMIN: "everything",
}
NAMED: Mapping[str, str] = {
    "collection": "The name or an alias of a collection, percent-encoded: `/` is `%2F`.",
    "alias": "An alias, percent-encoded.",
    "id": "The number of the job or entry.",
    "route": "A paid route: openai or openai-sync.",
}
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document of these endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        if endpoint.is_listed:
            paths.setdefault(_PARAMETER.sub(r"{\1}", endpoint.path), {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Chunkmill",
            "version": importlib.metadata.version("chunkmill"),
            "description": "Embed texts, enqueue chunks, follow jobs and search collections. Keys have scopes: "
            + "; ".join(f"`{scope}`: {what}" for scope, what in SCOPES.items())
            + ". A collection that a key may not see answers as one that does not exist.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": dict(ERROR), **components()},
            "securitySchemes": {name: dict(scheme) for name, scheme in SECURITY.items()},
            "responses": {
                "Error": {
                    "description": "A refusal",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
        },
    }


def topic(endpoint: Endpoint) -> str:
    """What the endpoint is about: the name of its module."""
    return endpoint.handler.__module__.rpartition(".")[2]


def path_parameters(path: str) -> list[str]:
    return _PARAMETER.findall(path)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Success"}
    if endpoint.answer is not None:
        success["content"] = {endpoint.media_type: {"schema": dict(endpoint.answer)}}
    operation: dict[str, Any] = {
        "operationId": f"{topic(endpoint)}_{endpoint.handler.__name__}_{endpoint.method.lower()}"
        + re.sub(r"\W+", "_", endpoint.path).rstrip("_"),
        "summary": endpoint.summary,
        "tags": [topic(endpoint)],
        "responses": {"200": success, "default": {"$ref": "#/components/responses/Error"}},
    }
    if said := inspect.getdoc(endpoint.handler):
        operation["description"] = " ".join(said.split())
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        | ({"description": NAMED[name]} if name in NAMED else {})
        for name in path_parameters(endpoint.path)
    ]
    for name, schema in endpoint.parameters.items():
        described = {"description": schema["description"]} if "description" in schema else {}
        shape = {key: value for key, value in schema.items() if key != "description"}
        parameters.append({"name": name, "in": "query", "required": False, "schema": shape} | described)
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = {endpoint.body_media_type: {"schema": dict(endpoint.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if endpoint.scope is None:
        operation["security"] = []
    else:
        operation["security"] = [{name: [endpoint.scope.value]} for name in SECURITY]
    return operation
