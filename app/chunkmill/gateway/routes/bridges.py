"""Bridges: queries of another model answered in a collection. What workers embed for one counts for the key."""

from __future__ import annotations

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.bridge.fitting import MIN_PAIRS
from chunkmill.client.bridges import MAX_QUERIES, MAX_SAMPLE
from chunkmill.domain.bridges import Bridge, BridgeQuote
from chunkmill.domain.spaces import Precision
from chunkmill.gateway import seen
from chunkmill.gateway.asked import Query, wrong
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.lasting import lasting, timeout_schema
from chunkmill.gateway.routes.judging import paid_by, read_quotable
from chunkmill.gateway.shapes import answer, list_of, object_of, schema_of
from chunkmill.spaces import bridges

LEARN_S = 3_600.0
LEARN: Schema = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "description": "The model of the queries, such as `org/model@revision`."},
        "dry_run": {
            "type": "boolean",
            "default": False,
            "description": "Only say what would be embedded, and its cost.",
        },
        "sample": {"type": "integer", "minimum": MIN_PAIRS, "maximum": MAX_SAMPLE, "default": 5_000},
        "queries": {"type": "integer", "minimum": 2, "maximum": MAX_QUERIES, "default": 500},
        "compare_old": {
            "type": "boolean",
            "default": False,
            "description": "Also judge the queries with the collection's own model.",
        },
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
        "precision": {"enum": [*(word.value for word in Precision), None]},
        "max_usd": {"type": ["string", "null"], "description": "The most US dollars that it may cost."},
        "timeout_s": timeout_schema(LEARN_S),
    },
    "required": ["model"],
    "additionalProperties": False,
}
DROPPED: dict[str, Schema] = {"name": {"type": "string", "description": "The model. It is required."}}
LISTED: dict[str, Schema] = {"collection": {"type": "string"}}


async def learn(gateway: Gateway, request: Request, caller: Caller) -> Response:
    asked = await read_quotable(gateway, request, caller, LEARN, LEARN_S)
    name = asked.collection.name
    if not isinstance(asked.body.get("compare_old", False), bool):
        raise wrong("compare_old", "it must be true or false")

    async def learnt() -> Bridge | BridgeQuote:
        quote = await gateway.client.quote_bridge(name, **asked.body)
        if asked.is_quote:
            return quote
        async with paid_by(gateway, caller, tokens=quote.tokens, usd=quote.known_usd) as spent:
            return await gateway.client.bridge(
                name, **asked.body, max_usd=asked.limit(caller, quote), timeout=asked.seconds, on_progress=spent
            )

    return await lasting(gateway, learnt())


async def list_bridges(gateway: Gateway, request: Request, caller: Caller) -> Response:
    name = Query(request, LISTED).text("collection")
    chosen = None if name is None else [(await seen.collection(gateway, caller, name)).id]

    def work(conn: sa.Connection) -> list[Bridge]:
        mine = seen.seen_by(conn, caller)
        ids = chosen or (None if mine is None else list(mine.values()))
        return bridges.of_collections(conn, ids) if bridges.are_kept(conn) else []

    return answer({"bridges": await seen.read(gateway, work)})


async def drop(gateway: Gateway, request: Request, caller: Caller) -> Response:
    name = Query(request, DROPPED).required("name")
    named = await seen.collection_in_path(gateway, request, caller)
    return answer({"dropped": await gateway.client.drop_bridge(named.name, name)})


_PATH = "/v1/collections/{collection}/bridges"
ENDPOINTS = [
    Endpoint(
        "POST",
        _PATH,
        learn,
        Scope.ADMIN,
        "Learn to answer queries of another model in a collection, or say what that would cost.",
        body=LEARN,
        answer={"anyOf": [dict(schema_of(Bridge)), dict(schema_of(BridgeQuote))]},
    ),
    Endpoint(
        "DELETE",
        _PATH,
        drop,
        Scope.ADMIN,
        "Delete the bridge of a collection for a model.",
        answer=object_of(dropped={"type": "boolean"}),
        parameters=DROPPED,
    ),
    Endpoint(
        "GET",
        "/v1/bridges",
        list_bridges,
        Scope.SEARCH,
        "The bridges of a collection, or of all, by collection and name.",
        answer=object_of(bridges=list_of(Bridge)),
        parameters=LISTED,
    ),
]
