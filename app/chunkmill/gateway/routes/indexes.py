"""What searches of a collection need and find: its serving index, its keywords, outdated chunks. And how they went."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.results import Index, Keywords, Outdated, SearchCounts
from chunkmill.gateway import seen
from chunkmill.gateway.asked import Query, read_optional, wrong
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.lasting import lasting
from chunkmill.gateway.shapes import answer, list_of, object_of, schema_of

BODY_BYTES = 64 << 10
_LONG = "An answer that takes longer than 15 seconds begins with blank lines, and its status is 200."
INDEX: Schema = {
    "type": "object",
    "properties": {
        "space": {
            "type": "string",
            "description": f"Another space of the collection than the active one, as in a search. {_LONG}",
        }
    },
    "additionalProperties": False,
}
KEYWORDS: Schema = {
    "type": "object",
    "properties": {
        "language": {
            "type": "string",
            "description": f"A text search configuration of Postgres, such as english or simple. {_LONG}",
        }
    },
    "required": ["language"],
    "additionalProperties": False,
}
OUTDATED: Schema = {
    "type": "object",
    "properties": {
        "serve": {
            "type": "boolean",
            "description": f"Whether replaced chunks are found by their old vectors from now on. {_LONG}",
        }
    },
    "required": ["serve"],
    "additionalProperties": False,
}
COUNTED: dict[str, Schema] = {
    "hours": {"type": "number", "minimum": 0, "default": 24, "description": "How many of the last hours."}
}


async def index(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_optional(request, BODY_BYTES, INDEX["properties"])
    return await lasting(gateway, gateway.client.index(named.name, space=_text(body, "space")))


async def keywords(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    named = await seen.collection_in_path(gateway, request, caller)
    return answer({"keywords": await gateway.client.keywords(named.name)})


async def make_keywords(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen.collection_in_path(gateway, request, caller)
    language = _text(await read_optional(request, BODY_BYTES, KEYWORDS["properties"]), "language")
    if language is None:
        raise wrong("language", "it is required")

    async def made() -> dict[str, Keywords | None]:
        return {"keywords": await gateway.client.keywords(named.name, language=language)}

    return await lasting(gateway, made())


async def drop_keywords(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    named = await seen.collection_in_path(gateway, request, caller)
    return answer({"dropped": await gateway.client.drop_keywords(named.name)})


async def outdated(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    named = await seen.collection_in_path(gateway, request, caller)
    return answer(await gateway.client.outdated(named.name))


async def serve_outdated(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen.collection_in_path(gateway, request, caller)
    serve = (await read_optional(request, BODY_BYTES, OUTDATED["properties"])).get("serve")
    if not isinstance(serve, bool):
        raise wrong("serve", "it must be true or false")
    return await lasting(gateway, gateway.client.outdated(named.name, serve=serve))


async def search_counts(gateway: Gateway, request: Request, caller: Caller) -> Response:
    given = Query(request, COUNTED).text("hours")
    named = await seen.collection_in_path(gateway, request, caller)
    try:
        hours = 24.0 if given is None else float(given)
    except ValueError:
        raise wrong("hours", "it must be a number") from None
    return answer({"counts": await gateway.client.search_counts(named.name, hours=hours)})


def _text(body: dict[str, Any], field: str) -> str | None:
    given = body.get(field)
    if given is not None and not isinstance(given, str):
        raise wrong(field, "it must be a text")
    return given


_PATH = "/v1/collections/{collection}"
_KEYWORDS = object_of(keywords=schema_of(Keywords | None))
ENDPOINTS = [
    Endpoint(
        "POST",
        _PATH + "/index",
        index,
        Scope.ADMIN,
        "Build now what searches of the collection need.",
        body=INDEX,
        answer=schema_of(Index),
    ),
    Endpoint(
        "GET",
        _PATH + "/keywords",
        keywords,
        Scope.SEARCH,
        "The keywords of a collection, which hybrid searches read; null if it has none.",
        answer=_KEYWORDS,
    ),
    Endpoint(
        "POST",
        _PATH + "/keywords",
        make_keywords,
        Scope.ADMIN,
        "Give a collection keywords. The answer comes when all chunks have them.",
        body=KEYWORDS,
        answer=_KEYWORDS,
    ),
    Endpoint(
        "DELETE",
        _PATH + "/keywords",
        drop_keywords,
        Scope.ADMIN,
        "Delete the keywords of a collection. Its searches then go by vectors alone.",
        answer=object_of(dropped={"type": "boolean"}),
    ),
    Endpoint(
        "GET",
        _PATH + "/outdated",
        outdated,
        Scope.SEARCH,
        "Whether searches find replaced chunks by their old vectors until they have their new ones.",
        answer=schema_of(Outdated),
    ),
    Endpoint(
        "POST",
        _PATH + "/outdated",
        serve_outdated,
        Scope.ADMIN,
        "Let searches find replaced chunks by their old vectors, or end that.",
        body=OUTDATED,
        answer=schema_of(Outdated),
    ),
    Endpoint(
        "GET",
        _PATH + "/searches",
        search_counts,
        Scope.SEARCH,
        "How the searches with a session went in each space of a collection.",
        answer=object_of(counts=list_of(SearchCounts)),
        parameters=COUNTED,
    ),
]
