"""Lanes and costs."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.costs import Costs, CostsBy
from chunkmill.domain.lanes import Lane
from chunkmill.gateway.asked import Query
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.shapes import answer, list_of, object_of, schema_of

COSTS: dict[str, Schema] = {"by": schema_of(CostsBy), "since": {"type": "string", "format": "date"}}


async def lanes(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    return answer({"lanes": await gateway.client.lanes()})


async def resume(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer({"resumed": await gateway.client.resume_lane(request.path_params["route"])})


async def costs(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, COSTS)
    return answer(await gateway.client.usage(query.text("by") or CostsBy.MONTH, since=query.day("since")))


ENDPOINTS = [
    Endpoint(
        "GET",
        "/v1/lanes",
        lanes,
        Scope.ADMIN,
        "The paid lanes: running, paused, stopped or held, and why.",
        answer=object_of(lanes=list_of(Lane)),
    ),
    Endpoint(
        "POST",
        "/v1/lanes/{route}/resume",
        resume,
        Scope.ADMIN,
        "Let a stopped or paused lane take work again.",
        answer=object_of(resumed={"type": "boolean"}),
    ),
    Endpoint(
        "GET",
        "/v1/costs",
        costs,
        Scope.ADMIN,
        "What was embedded and what it cost, with the month's budget.",
        answer=schema_of(Costs),
        parameters=COSTS,
    ),
]
