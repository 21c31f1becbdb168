"""Re-embeddings: move a collection to another model without a gap, look how far it is, and come back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.gates import Gates
from chunkmill.domain.reembedding import KEEP_DAYS, RAMP, STEP_HOURS, Quote, Reembedding
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import NotFound
from chunkmill.gateway import seen
from chunkmill.gateway.asked import Query, read_optional, require_known, wrong
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.lasting import lasting, timeout_in, timeout_schema
from chunkmill.gateway.routes.judging import golden_tokens, paid_by
from chunkmill.gateway.shapes import answer, list_of, object_of, schema_of
from chunkmill.ledger.reembedding import lives

BODY_BYTES = 64 << 10
MOST_LISTED = 200
LONGEST_S = 110.0
"""How many seconds a flip may wait for vectors in one request, so that no proxy cuts it off. Ask again for more."""
JUDGE_S = 600.0

_GATES: Schema = {
    "type": "object",
    "description": "What the new space must show. A gate that is null is left out.",
    "properties": {
        "missing": {"type": "integer", "minimum": 0, "default": 0},
        "canary": {"type": "boolean", "default": True},
        "recall": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "ndcg_loss": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "queries": {"type": "integer", "minimum": 2},
        "p95_ratio": {"type": ["number", "null"], "minimum": 0},
        "price": {"type": ["string", "number", "null"], "description": "US dollars for a million tokens."},
    },
    "additionalProperties": False,
}
_RAMP: Schema = {
    "type": "array",
    "items": {"type": "integer", "minimum": 1, "maximum": 100},
    "description": "Growing percentages of the search sessions. It flips at the end if the last is 100, or if it is "
    "empty.",
    "default": list(RAMP),
}
BEGIN: Schema = {
    "type": "object",
    "properties": {
        "to": {"type": "string", "description": "The model, such as `org/model@revision`."},
        "dry_run": {"type": "boolean", "default": False, "description": "Only say what it would take."},
        "on_long": {"enum": [word.value for word in OnLong], "default": OnLong.TRUNCATE.value},
        "dimensions": {"type": ["integer", "null"], "minimum": 1},
        "precision": {"enum": [*(word.value for word in Precision), None]},
        "gates": _GATES,
        "ramp": _RAMP,
        "step_hours": {"type": "number", "minimum": 0, "default": STEP_HOURS},
        "keep_days": {"type": "number", "minimum": 0, "default": KEEP_DAYS},
        "priority": {"enum": [word.value for word in Priority], "default": Priority.LOW.value},
        "route": {"enum": [word.value for word in Route], "default": Route.AUTO.value},
        "max_usd": {"type": ["string", "null"], "description": "The most US dollars that it may cost."},
    },
    "required": ["to"],
    "additionalProperties": False,
}
FLIP: Schema = {
    "type": "object",
    "properties": {
        "missing": {"type": ["integer", "null"], "minimum": 0, "description": "Chunks that may be missing afterwards."},
        "timeout_s": {"type": "number", "minimum": 0, "maximum": LONGEST_S, "default": 60},
    },
    "additionalProperties": False,
}
RESUME: Schema = {
    "type": "object",
    "properties": {"gates": _GATES, "ramp": _RAMP},
    "additionalProperties": False,
}
JUDGE: Schema = {
    "type": "object",
    "properties": {"timeout_s": timeout_schema(JUDGE_S)},
    "additionalProperties": False,
}
NOTHING: Schema = {"type": "object", "additionalProperties": False}
LISTED: dict[str, Schema] = {
    "collection": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 20},
}


async def begin(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """201 if it is begun, or goes on as asked before; 200 for a quote."""
    named = await seen.collection_in_path(gateway, request, caller)
    body = await read_optional(request, BODY_BYTES, BEGIN["properties"])
    if "to" not in body:
        raise wrong("to", "it is required")
    if not isinstance(body.get("dry_run", False), bool):
        raise wrong("dry_run", "it must be true or false")
    if "gates" in body:
        body["gates"] = gates_of(body["gates"], Gates())
    await gateway.models.require_usable(body["to"], caller)
    made = await gateway.client.reembed(named.name, **body)
    return answer(made, 200 if isinstance(made, Quote) else 201)


async def list_reembeddings(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, LISTED)
    limit = query.number("limit", 20, least=1, most=MOST_LISTED) or 20
    name = query.text("collection")
    chosen = None if name is None else [(await seen.collection(gateway, caller, name)).id]

    def work(conn: sa.Connection) -> list[Reembedding]:
        mine = seen.seen_by(conn, caller)
        return latest(conn, chosen or (None if mine is None else list(mine.values())), limit)

    return answer({"reembeddings": await seen.read(gateway, work)})


def latest(conn: sa.Connection, collection_ids: Sequence[int] | None, limit: int) -> list[Reembedding]:
    """The latest re-embeddings of these collections, or of all; none on the schema of the last release."""
    if not lives.are_kept(conn):
        return []
    return [life.shown() for life in lives.latest(conn, collection_ids, limit)]


async def one(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await seen_reembedding(gateway, caller, request.path_params["id"]))


async def flip(gateway: Gateway, request: Request, caller: Caller) -> Response:
    which, asked = await _to_flip(gateway, request, caller)
    return answer(await gateway.client.flip(which, **asked))


async def rollback(gateway: Gateway, request: Request, caller: Caller) -> Response:
    which, asked = await _to_flip(gateway, request, caller)
    return answer(await gateway.client.rollback(which, **asked))


async def judge(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen_reembedding(gateway, caller, request.path_params["id"])
    seconds = timeout_in(await read_optional(request, BODY_BYTES, JUDGE["properties"]), JUDGE_S)
    collection = await seen.collection(gateway, caller, named.collection)

    async def judged() -> Reembedding:
        tokens = await golden_tokens(gateway, collection.id)
        usd = tokens * (gateway.price(named.from_model) + gateway.price(named.to_model))
        async with paid_by(gateway, caller, tokens=2 * tokens, usd=usd) as spent:
            return await gateway.client.judge_reembedding(named.id, timeout=seconds, on_spent=spent)

    return await lasting(gateway, judged())


async def pause(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await gateway.client.pause_reembedding(await _named(gateway, request, caller)))


async def resume(gateway: Gateway, request: Request, caller: Caller) -> Response:
    named = await seen_reembedding(gateway, caller, request.path_params["id"])
    body = await read_optional(request, BODY_BYTES, RESUME["properties"])
    gates = gates_of(body["gates"], named.limits) if "gates" in body else None
    return answer(await gateway.client.resume_reembedding(named.id, gates=gates, ramp=body.get("ramp")))


async def cancel(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await gateway.client.cancel_reembedding(await _named(gateway, request, caller)))


async def finish(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await gateway.client.finish_reembedding(await _named(gateway, request, caller)))


async def seen_reembedding(gateway: Gateway, caller: Caller, given: str) -> Reembedding:
    """The re-embedding with the number in a path. Raises :class:`NotFound` if the caller may not see its collection."""
    number = seen.number_in_path(given, "re-embedding")
    named = await gateway.client.reembedding(number)
    names = await seen.read(gateway, lambda conn: seen.seen_by(conn, caller))
    if names is not None and named.collection not in names:
        raise NotFound(f"there is no re-embedding {number}; `chunkmill reembed list` shows the latest.")
    return named


def gates_of(given: object, before: Gates) -> Gates:
    """The gates of a body, and those of ``before`` that it leaves out. Raises :class:`Refusal`."""
    if not isinstance(given, Mapping):
        raise wrong("gates", "it must be an object")
    require_known(given, _GATES["properties"])
    changes = dict(given)
    if changes.get("price") is not None:
        price = changes["price"]
        try:
            changes["price"] = Decimal(price if isinstance(price, str) else repr(price))
        except InvalidOperation:
            raise wrong("gates.price", 'it must be an amount of US dollars, such as "0.02"') from None
    return dataclasses.replace(before, **changes)


async def _named(gateway: Gateway, request: Request, caller: Caller) -> int:
    named = await seen_reembedding(gateway, caller, request.path_params["id"])
    await read_optional(request, BODY_BYTES, ())
    return named.id


async def _to_flip(gateway: Gateway, request: Request, caller: Caller) -> tuple[int, dict[str, Any]]:
    named = await seen_reembedding(gateway, caller, request.path_params["id"])
    body = await read_optional(request, BODY_BYTES, FLIP["properties"])
    asked: dict[str, Any] = {"missing": body.get("missing")}
    if "timeout_s" in body:
        asked["timeout"] = timeout_in(body, 0.0, most=LONGEST_S)
    return named.id, asked


def _action(word: str, handler: Any, summary: str, body: Schema = NOTHING) -> Endpoint:
    return Endpoint(
        "POST", f"/v1/reembeddings/{{id}}/{word}", handler, Scope.ADMIN, summary, body=body,
        answer=schema_of(Reembedding),
    )  # fmt: skip


ENDPOINTS = [
    Endpoint(
        "POST",
        "/v1/collections/{collection}/reembed",
        begin,
        Scope.ADMIN,
        "Begin to move a collection to another model, or say what that would take.",
        body=BEGIN,
        answer={"anyOf": [dict(schema_of(Reembedding)), dict(schema_of(Quote))]},
    ),
    Endpoint(
        "GET",
        "/v1/reembeddings",
        list_reembeddings,
        Scope.SEARCH,
        "The latest re-embeddings, newest first.",
        answer=object_of(reembeddings=list_of(Reembedding)),
        parameters=LISTED,
    ),
    Endpoint(
        "GET",
        "/v1/reembeddings/{id}",
        one,
        Scope.SEARCH,
        "One re-embedding: its state, its gates, and how each space was searched.",
        answer=schema_of(Reembedding),
    ),
    _action("judge", judge, "Check its gates now, and note what they said.", JUDGE),
    _action("flip", flip, "Make the new space the active one now.", FLIP),
    _action("rollback", rollback, "Make the space active again that the collection left.", FLIP),
    _action("pause", pause, "Let it stay in its state and its share."),
    _action("resume", resume, "Go on, with other gates or another ramp.", RESUME),
    _action("cancel", cancel, "Give it up before its flip."),
    _action("finish", finish, "Drop the space that the collection left. There is no way back after that."),
]
