"""The description of the API says what the endpoints do."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest

from chunkmill.gateway.caller import Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.openapi import document, topic
from chunkmill.gateway.routes import all_endpoints, collections, dead, jobs, money
from chunkmill.gateway.routes import openapi as own

LISTED = [endpoint for endpoint in all_endpoints() if endpoint.is_listed]
OURS = [*jobs.ENDPOINTS, *dead.ENDPOINTS, *collections.ENDPOINTS, *money.ENDPOINTS, *own.ENDPOINTS]
DOCUMENT = document(LISTED)
NAMED = {"ids": lambda endpoint: f"{endpoint.method} {endpoint.path}"}


def operation(endpoint: Endpoint) -> dict[str, Any]:
    path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
    return DOCUMENT["paths"][path][endpoint.method.lower()]  # type: ignore[no-any-return]


@pytest.mark.parametrize("endpoint", OURS, **NAMED)
def test_each_endpoint_says_what_it_takes_and_gives(endpoint: Endpoint) -> None:
    described = operation(endpoint)
    assert described["summary"].endswith(".")
    assert set(described["responses"]["200"]["content"]) == {endpoint.media_type}
    assert described["responses"]["default"] == {"$ref": "#/components/responses/Error"}
    if endpoint.method in ("POST", "PATCH", "PUT"):
        takes_nothing = endpoint.path.endswith(("/cancel", "/retry", "/resume")) and "/dead/" not in endpoint.path
        assert ("requestBody" in described) is not takes_nothing


@pytest.mark.parametrize("endpoint", LISTED, **NAMED)
def test_each_endpoint_names_its_parameters_and_its_scope(endpoint: Endpoint) -> None:
    described = operation(endpoint)
    in_path = {p["name"] for p in described.get("parameters", ()) if p["in"] == "path"}
    assert in_path == set(re.findall(r"\{(\w+)", endpoint.path))
    assert {p["name"] for p in described.get("parameters", ()) if p["in"] == "query"} == set(endpoint.parameters)
    if endpoint.scope is None:
        assert described["security"] == []
    else:
        assert [*described["security"][0].values()] == [[endpoint.scope.value]]
        assert set().union(*described["security"]) == set(DOCUMENT["components"]["securitySchemes"])


def test_the_document_is_whole() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    ids = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids)) == len(LISTED)
    for schema in every(DOCUMENT, "schema"):
        jsonschema.Draft202012Validator.check_schema(schema)
    for name, schema in DOCUMENT["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["description"], name
    for reference in every(DOCUMENT, "$ref"):
        place: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_the_pages_of_browsers_are_not_in_it() -> None:
    assert not [path for path in DOCUMENT["paths"] if path == "/" and "get" in DOCUMENT["paths"][path]]
    assert not [path for path in DOCUMENT["paths"] if path.startswith("/page")]
    assert {endpoint.scope for endpoint in OURS} >= {Scope.SEARCH, Scope.JOBS, Scope.ADMIN}
    assert topic(jobs.ENDPOINTS[0]) == "jobs"


def every(value: Any, key: str) -> list[Any]:
    """All that stands under ``key`` anywhere in a document."""
    if isinstance(value, list):
        return [one for item in value for one in every(item, key)]
    if not isinstance(value, dict):
        return []
    return [*([value[key]] if key in value else []), *(one for item in value.values() for one in every(item, key))]
