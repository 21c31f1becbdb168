"""The dead list: chunks that got no vector. List, retry, drop."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.arguments import as_number
from chunkmill.domain.results import DeadDetails, DeadEntry, DroppedDead, RetriedDead
from chunkmill.errors import NotFound
from chunkmill.gateway import seen
from chunkmill.gateway.asked import Query, read_exact, require_known, wrong
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.shapes import answer, large_answer, list_of, object_of, schema_of
from chunkmill.ledger.dead import dead_chunks
from chunkmill.ledger.dead.dead_chunks import DeadFilter

MOST_LISTED = 1_000
MOST_IDS = 10_000
BODY_BYTES = 1 << 20
LISTED: dict[str, Schema] = {
    "collection": {"type": "string"},
    "job_id": {"type": "integer"},
    "code": {"type": "string", "description": "Only entries with this reason, such as `too_long`."},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": MOST_LISTED},
}
DETAILS: dict[str, Schema] = {"with_text": {"type": "boolean", "default": False}}
CHOSEN: Schema = {
    "type": "object",
    "description": "Either ids, or job_id or code or both.",
    "properties": {
        "ids": {"type": "array", "items": {"type": "integer"}, "maxItems": MOST_IDS},
        "job_id": {"type": "integer"},
        "code": {"type": "string"},
    },
    "additionalProperties": False,
}


async def list_dead(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, LISTED)
    limit = query.number("limit", MOST_LISTED, least=1, most=MOST_LISTED) or MOST_LISTED
    job_id, name, code = query.number("job_id"), query.text("collection"), query.text("code")
    if job_id is not None:
        await seen.job(gateway, caller, str(job_id))
    names: list[str | None] = [None]
    if name is not None:
        names = [(await seen.collection(gateway, caller, name)).name]
    elif caller.collections is not None and job_id is None:
        names = list(await seen.read(gateway, lambda conn: seen.seen_by(conn, caller)) or ())
    listed: list[DeadEntry] = []
    codes: Counter[str] = Counter()
    for one in names:
        listed += await gateway.client.dead(job_id, one, code, limit)
        codes.update(await gateway.client.dead_codes(job_id, one, code))
    listed.sort(key=lambda entry: entry.id, reverse=True)
    return await large_answer({"dead": listed[:limit], "codes": dict(codes.most_common())}, len(listed))


async def one_dead(gateway: Gateway, request: Request, caller: Caller) -> Response:
    with_text = Query(request, DETAILS).flag("with_text")
    dead_id = seen.number_in_path(request.path_params["id"], "entry of the dead list")
    await _require_seen(gateway, caller, [dead_id])
    return answer(await gateway.client.dead_chunk(dead_id, with_text=with_text))


async def retry(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await gateway.client.retry_dead(**await _chosen(gateway, request, caller)))


async def drop(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return answer(await gateway.client.drop_dead(**await _chosen(gateway, request, caller)))


async def _chosen(gateway: Gateway, request: Request, caller: Caller) -> dict[str, Any]:
    body = await read_exact(request, BODY_BYTES)
    require_known(body, CHOSEN["properties"])
    ids, job_id, code = body.get("ids"), body.get("job_id"), body.get("code")
    if ids is not None:
        if not isinstance(ids, list) or len(ids) > MOST_IDS:
            raise wrong("ids", f"it must be a list of at most {MOST_IDS:,} numbers")
        ids = [as_number("an id in ids", dead_id) for dead_id in ids]
        await _require_seen(gateway, caller, ids)
    elif job_id is not None:
        await seen.job(gateway, caller, str(as_number("job_id", job_id, least=0)))
    elif caller.collections is not None:
        raise wrong("job_id", "a key that sees some collections only has to name a job, or ids")
    return {"ids": ids, "job_id": job_id, "code": code}


async def _require_seen(gateway: Gateway, caller: Caller, ids: list[int]) -> None:
    """Raise :class:`NotFound` if one of the entries belongs to a collection that the caller may not see."""
    if caller.collections is None:
        return

    def work(conn: sa.Connection) -> int | None:
        names = seen.seen_by(conn, caller) or {}
        listed = dead_chunks.entries(conn, DeadFilter(ids=tuple(ids)))
        visible = {entry.id for entry in listed if entry.collection in names}
        return next((dead_id for dead_id in ids if dead_id not in visible), None)

    hidden = await seen.read(gateway, work)
    if hidden is not None:
        raise NotFound(f"there is no dead chunk {hidden}; `chunkmill dead list` shows those that exist.")


ENDPOINTS = [
    Endpoint(
        "GET",
        "/v1/dead",
        list_dead,
        Scope.JOBS,
        "The newest entries of the dead list, and how many there are of each code.",
        answer=object_of(
            dead=list_of(DeadEntry), codes={"type": "object", "additionalProperties": {"type": "integer"}}
        ),
        parameters=LISTED,
    ),
    Endpoint(
        "GET",
        "/v1/dead/{id}",
        one_dead,
        Scope.JOBS,
        "All that is known of one dead chunk.",
        answer=schema_of(DeadDetails),
        parameters=DETAILS,
    ),
    Endpoint(
        "POST",
        "/v1/dead/retry",
        retry,
        Scope.JOBS,
        "Embed the texts of dead chunks after all.",
        body=CHOSEN,
        answer=schema_of(RetriedDead),
    ),
    Endpoint(
        "POST",
        "/v1/dead/drop",
        drop,
        Scope.JOBS,
        "Take chunks off the dead list and out of their collections.",
        body=CHOSEN,
        answer=schema_of(DroppedDead),
    ),
]
