"""Jobs: enqueue a body of any length, follow, cancel, retry, explain."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import quote

import sqlalchemy as sa
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chunkmill.domain.costs import Estimate
from chunkmill.domain.results import Attempt, DeadEntry, Explanation, Job
from chunkmill.domain.spaces import OnLong
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidChunk
from chunkmill.gateway import seen
from chunkmill.gateway.asked import Query, wrong
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint, Schema
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.ndjson import ChunkLines, refused_line
from chunkmill.gateway.page import session
from chunkmill.gateway.paths import path_to
from chunkmill.gateway.shapes import answer, dumped, large_answer, list_of, object_of, plain, schema_of
from chunkmill.gateway.streams import StreamedResponse
from chunkmill.ledger.jobs import jobs
from chunkmill.spaces import registry

logger = logging.getLogger(__name__)

MOST_LISTED = 1_000
ENQUEUE: dict[str, Schema] = {
    "collection": {"type": "string", "description": "Where the chunks go. It is created if it is new."},
    "model": {"type": "string"},
    "route": schema_of(Route),
    "priority": schema_of(Priority),
    "on_long": schema_of(OnLong),
    "on_invalid": {
        "enum": ["raise", "skip"],
        "description": "`raise` writes nothing if a line is wrong. `skip` commits as the body comes, and puts bad "
        "chunks on the dead list.",
    },
    "dimensions": {"type": "integer", "minimum": 1},
    "precision": {"enum": ["float", "int8"]},
    "deadline": {"type": "string", "description": "Seconds from now, or a moment with its time zone."},
    "replace": {
        "type": "string",
        "description": "`true` deletes the chunks of the collection that the body does not have. A filter, which is a "
        "JSON object, deletes only chunks that pass it. Nothing is deleted before the whole body was read.",
    },
    "allow_empty": {"type": "boolean", "description": "A body without a chunk may replace all."},
    "max_refused": {
        "type": "number",
        "minimum": 0,
        "description": "With `on_invalid=skip`: how many chunks may be bad, or below 1 which share of them. If there "
        "are more, nothing is written.",
    },
}
ESTIMATE: dict[str, Schema] = {
    name: schema for name, schema in ENQUEUE.items() if name not in ("priority", "allow_empty", "max_refused")
}
LISTED: dict[str, Schema] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 20},
    "before": {"type": "integer", "description": "Only jobs with a smaller id: the `next` of the page before."},
    "collection": {"type": "string"},
    "idempotency_key": {"type": "string", "description": "The job of this key alone."},
}
LIMIT: dict[str, Schema] = {"limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": MOST_LISTED}}
CHUNK: Schema = {
    "type": "object",
    "description": "One line of the body.",
    "properties": {"id": {"type": ["string", "integer"]}, "text": {"type": "string"}, "metadata": {"type": "object"}},
    "required": ["id", "text"],
    "additionalProperties": False,
}


async def enqueue(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """Enqueue the chunks of the body. It is read no faster than it is enqueued."""
    query = Query(request, ENQUEUE)
    name = await seen.collection_to_fill(gateway, caller, query.required("collection"))
    dimensions, precision = query.number("dimensions", least=1), query.text("precision")
    model = await _model(gateway, caller, query.text("model"), dimensions, precision)
    skips = _on_invalid(query) == "skip"
    key = _stored_key(caller, request.headers.get("idempotency-key"))
    if key is not None and caller.collections is not None:
        await _require_own_key(gateway, caller, key)
    lines = ChunkLines(request, skips=skips)
    with gateway.streams.one_more():
        try:
            job = await gateway.client.enqueue(
                lines.chunks(),
                collection=name,
                model=model,
                route=query.text("route") or Route.AUTO,
                priority=query.text("priority") or Priority.NORMAL,
                idempotency_key=key,
                on_long=query.text("on_long") or OnLong.TRUNCATE,
                on_invalid="skip" if skips else "raise",
                dimensions=dimensions,
                precision=precision,
                deadline=query.deadline("deadline"),
                replace=_replaced(query),
                allow_empty=query.flag("allow_empty"),
                max_refused=_most_refused(query),
            )
        except InvalidChunk as error:
            raise refused_line(lines.line_of(error.position), error.problem) from None
        except ClientDisconnect:
            # Nobody reads this answer, unless the caller closed one direction only; the log has it too.
            refusal = Refusal(400, "body_incomplete", f"the body ended early. {await _kept(gateway, key, skips=skips)}")
            logger.info("enqueue into %r: %s", name, refusal.message)
            raise refusal from None
        except Refusal as refusal:
            if skips:
                refusal.message = f"{refusal.message} {await _kept(gateway, key, skips=True)}"
            raise
    return answer(_shown(caller, job), headers={"location": path_to("/v1/jobs/{id}", {"id": job.id})})


async def estimate(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """What an enqueue of the body would do. It is read no faster than its texts are counted."""
    query = Query(request, ESTIMATE)
    name = query.text("collection")
    if name is not None:
        name = await seen.collection_to_fill(gateway, caller, name)
    dimensions, precision = query.number("dimensions", least=1), query.text("precision")
    lines = ChunkLines(request, skips=(on_invalid := _on_invalid(query)) == "skip")
    with gateway.streams.one_more():
        try:
            estimated = await gateway.client.estimate(
                lines.chunks(),
                collection=name,
                model=await _model(gateway, caller, query.text("model"), dimensions, precision),
                route=query.text("route") or Route.AUTO,
                on_long=query.text("on_long") or OnLong.TRUNCATE,
                on_invalid=on_invalid,
                dimensions=dimensions,
                precision=precision,
                deadline=query.deadline("deadline"),
                replace=_replaced(query),
            )
        except InvalidChunk as error:
            raise refused_line(lines.line_of(error.position), error.problem) from None
        except ClientDisconnect:
            raise Refusal(400, "body_incomplete", "the body ended early. Send it again.") from None
    return answer(estimated)


def _on_invalid(query: Query) -> Literal["raise", "skip"]:
    given = query.text("on_invalid")
    if given not in (None, "raise", "skip"):
        raise wrong("on_invalid", "it must be raise or skip")
    return "skip" if given == "skip" else "raise"


async def _model(
    gateway: Gateway, caller: Caller, name: str | None, dimensions: int | None, precision: str | None
) -> str | None:
    """The model to enqueue for; None is the default one. Raises :class:`Refusal` if the caller may not use it.

    An admin may name any model. Others may not: a name may be a folder of this machine, and each space is a table.
    """
    if caller.may(Scope.ADMIN) and caller.models is None:
        return name
    model = await gateway.models.find(name, caller)

    def is_registered(conn: sa.Connection) -> bool:
        return any(
            space.spec.model in (model.target, model.spec.model)
            and space.spec.dimensions == (dimensions or model.spec.dimensions)
            and str(space.spec.precision) == (precision or str(model.spec.precision))
            for space in registry.all_spaces(conn)
        )

    if (dimensions or precision) and not await seen.read(gateway, is_registered):
        param = "dimensions" if dimensions else "precision"
        message = "no space has these vectors yet, and only a key with the scope admin may make one."
        raise Refusal(403, "space_not_allowed", message, param=param)
    return None if name is None else model.target


def _replaced(query: Query) -> bool | dict[str, Any]:
    given = query.text("replace")
    return query.object("replace") or {} if given is not None and given.startswith("{") else query.flag("replace")


def _most_refused(query: Query) -> int | float | None:
    given = query.text("max_refused")
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        raise wrong("max_refused", "it must be a number") from None
    return int(number) if number.is_integer() and not given.startswith("0.") else number


async def _kept(gateway: Gateway, key: str | None, *, skips: bool) -> str:
    """What an enqueue whose body ended early has left, and what to do."""
    if not skips:
        return "Nothing was written. Send the whole body again."
    if key is None:
        return (
            "What was committed before stays in a job that GET /v1/jobs lists. Send the whole body again with an "
            "Idempotency-Key, which completes a job that was cut off."
        )
    job = await seen.read(gateway, lambda conn: jobs.with_key(conn, key))
    if job is None:
        return "Nothing was written. Send the whole body again with the same Idempotency-Key."
    return (
        f"{job.chunks:,} chunks are committed in job {job.id}. Send the whole body again with the same "
        "Idempotency-Key: it completes this job, and no text is embedded twice."
    )


def _stored_key(caller: Caller, key: str | None) -> str | None:
    """The key under which the job is kept. A caller with collections of its own has keys of its own, so that it neither
    meets nor learns of the jobs of others; all other callers share theirs with producers in Python."""
    if key is None:
        return None
    stored = key if caller.collections is None else f"{_own(caller)}{key}"
    if not key.strip() or len(stored) > 200:
        raise wrong("Idempotency-Key", f"it must have 1 to {200 - len(stored) + len(key)} characters")
    return stored


def _own(caller: Caller) -> str:
    # Escaped, so that no tenant and key together look like those of another tenant.
    return f"{quote(caller.tenant, safe='')}/"


async def _require_own_key(gateway: Gateway, caller: Caller, key: str) -> None:
    """Raise :class:`Refusal` if the key has a job that the caller may not see. The client's error names its
    collection."""

    def is_hidden(conn: sa.Connection) -> bool:
        names, job = seen.seen_by(conn, caller), jobs.with_key(conn, key)
        return names is not None and job is not None and job.collection not in names

    if await seen.read(gateway, is_hidden):
        message = "this Idempotency-Key was used before, for something else. Use another one."
        raise Refusal(409, "idempotency_conflict", message, param="Idempotency-Key", should_retry=False)


def _shown(caller: Caller, job: Job) -> dict[str, Any]:
    """A job as JSON, with the key as the caller knows it."""
    shown: dict[str, Any] = plain(job)
    if caller.collections is not None and job.idempotency_key is not None:
        shown["idempotency_key"] = job.idempotency_key.removeprefix(_own(caller))
    return shown


async def list_jobs(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = Query(request, LISTED)
    limit, before = query.number("limit", 20, least=1, most=MOST_LISTED) or 20, query.number("before")
    key, name = query.text("idempotency_key"), query.text("collection")
    chosen = None if name is None else await seen.collection(gateway, caller, name)

    def work(conn: sa.Connection) -> list[Job]:
        mine = seen.seen_by(conn, caller)
        if key is not None:
            job = jobs.with_key(conn, _stored_key(caller, key) or "")
            hidden = job is None or (mine is not None and job.collection not in mine)
            return [] if job is None or hidden or (chosen and job.collection != chosen.name) else [job]
        ids = [chosen.id] if chosen else None if mine is None else list(mine.values())
        return jobs.page(conn, limit=limit, before=before, collections=ids)

    listed = await seen.read(gateway, work)
    more = listed[-1].id if len(listed) == limit else None
    return await large_answer({"jobs": [_shown(caller, job) for job in listed], "next": more}, len(listed))


async def get_job(gateway: Gateway, request: Request, caller: Caller) -> Response:
    Query(request, ())
    return answer(_shown(caller, await seen.job(gateway, caller, request.path_params["id"])))


async def cancel(gateway: Gateway, request: Request, caller: Caller) -> Response:
    job = await seen.job(gateway, caller, request.path_params["id"])
    return answer(_shown(caller, await gateway.client.cancel(job.id)))


async def retry(gateway: Gateway, request: Request, caller: Caller) -> Response:
    job = await seen.job(gateway, caller, request.path_params["id"])
    return answer(_shown(caller, await gateway.client.retry(job.id)))


async def explain(gateway: Gateway, request: Request, caller: Caller) -> Response:
    job = await seen.job(gateway, caller, request.path_params["id"])
    explanation = await gateway.client.explain(job.id)
    # What the lanes have lost this month is for admins, as in GET /v1/lanes.
    return answer(explanation if caller.may(Scope.ADMIN) else replace(explanation, lanes=()))


async def attempts(gateway: Gateway, request: Request, caller: Caller) -> Response:
    job = await seen.job(gateway, caller, request.path_params["id"])
    made = await gateway.client.attempts(job.id)
    return await large_answer({"attempts": made}, len(made))


async def dead(gateway: Gateway, request: Request, caller: Caller) -> Response:
    limit = Query(request, LIMIT).number("limit", MOST_LISTED, least=1, most=MOST_LISTED) or MOST_LISTED
    job = await seen.job(gateway, caller, request.path_params["id"])
    listed = await gateway.client.dead(job.id, limit=limit)
    codes = await gateway.client.dead_codes(job.id)
    return await large_answer({"dead": listed, "codes": codes}, len(listed))


async def events(gateway: Gateway, request: Request, caller: Caller) -> Response:
    """The job's progress as server-sent events. The row is the truth, so a reconnect misses nothing that matters."""
    Query(request, ())
    job = await seen.job(gateway, caller, request.path_params["id"])
    if job.state.is_final and request.headers.get("last-event-id") == "end":
        return Response(status_code=204)  # which tells an EventSource not to connect again
    gateway.streams.require_room()
    key = session.key_of(request)

    async def parts() -> AsyncGenerator[bytes, None]:
        following = gateway.streams.follow(job.id, gateway.client.job, leaving=lambda: gateway.is_leaving)
        try:
            yield b"retry: 2000\n\n"
            async for news in following:
                if news is None:
                    if await gateway.keys.caller(key) is None:
                        return  # it was revoked, or has expired
                    yield b": still here\n\n"
                    continue
                data = dumped(_shown(caller, news))
                yield b"event: progress\ndata: " + data + b"\n\n"
                if news.state.is_final:
                    yield b"id: end\nevent: end\ndata: " + data + b"\n\n"
        finally:
            await following.aclose()

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return await StreamedResponse.of(parts(), media_type="text/event-stream", headers=headers)


_JOB = schema_of(Job)
ENDPOINTS = [
    Endpoint(
        "POST",
        "/v1/jobs",
        enqueue,
        Scope.JOBS,
        "Enqueue the chunks of the body, one JSON object on each line.",
        body=CHUNK,
        body_media_type="application/x-ndjson",
        answer=_JOB,
        parameters=ENQUEUE,
    ),
    Endpoint(
        "POST",
        "/v1/estimate",
        estimate,
        Scope.ADMIN,
        "Say what an enqueue of the body would embed, and what it would cost on each route.",
        body=CHUNK,
        body_media_type="application/x-ndjson",
        answer=schema_of(Estimate),
        parameters=ESTIMATE,
    ),
    Endpoint(
        "GET",
        "/v1/jobs",
        list_jobs,
        Scope.JOBS,
        "The latest jobs, newest first.",
        answer=object_of(jobs=list_of(Job), next=schema_of(int | None)),
        parameters=LISTED,
    ),
    Endpoint("GET", "/v1/jobs/{id}", get_job, Scope.JOBS, "One job with its progress.", answer=_JOB),
    Endpoint("POST", "/v1/jobs/{id}/cancel", cancel, Scope.JOBS, "Cancel a job. Written vectors stay.", answer=_JOB),
    Endpoint(
        "POST",
        "/v1/jobs/{id}/retry",
        retry,
        Scope.JOBS,
        "Embed what a failed or cancelled job left without a vector.",
        answer=_JOB,
    ),
    Endpoint(
        "GET",
        "/v1/jobs/{id}/events",
        events,
        Scope.JOBS,
        "Follow a job: an event `progress` for each change, and `end` at its end, each with the job as its data.",
        answer={"type": "string"},
        media_type="text/event-stream",
    ),
    Endpoint(
        "GET",
        "/v1/jobs/{id}/dead",
        dead,
        Scope.JOBS,
        "The chunks of a job that got no vector, with the reasons.",
        answer=object_of(
            dead=list_of(DeadEntry), codes={"type": "object", "additionalProperties": {"type": "integer"}}
        ),
        parameters=LIMIT,
    ),
    Endpoint(
        "GET",
        "/v1/jobs/{id}/explain",
        explain,
        Scope.JOBS,
        "Why a job is embedded where it is, and what it waits for.",
        answer=schema_of(Explanation),
    ),
    Endpoint(
        "GET",
        "/v1/jobs/{id}/attempts",
        attempts,
        Scope.JOBS,
        "All attempts at a job's ChunkBatches, the oldest first.",
        answer=object_of(attempts=list_of(Attempt)),
    ),
]
