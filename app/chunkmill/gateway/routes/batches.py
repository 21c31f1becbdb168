"""``/v1/batches``: a batch is a job whose lines are embedded by workers."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response

from chunkmill.domain.served import FILE_SECONDS, BatchOrder, FileKind, ServedState, window_seconds
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import NotFound
from chunkmill.gateway.batches import results
from chunkmill.gateway.batches.uploads import expiry
from chunkmill.gateway.bodies import read_object
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.fields import invalid, text_field, word_field
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.replies import Reply
from chunkmill.gateway.routes.files import EXPIRY_SCHEMA, in_thread, limit_of, list_schema, page_of, unix
from chunkmill.ledger.access import spends
from chunkmill.ledger.served import batches, files, lines
from chunkmill.ledger.served.batches import ServedBatch

MAX_BODY_BYTES = 256 * 1024
ENDPOINT = "/v1/embeddings"
MAX_PAIRS, MAX_NAME, MAX_VALUE = 16, 64, 512
"""OpenAI's bounds of ``metadata``."""
MAX_KEY = 255


async def create_batch(gateway: Gateway, request: Request, caller: Caller) -> Response:
    body = await read_object(request, MAX_BODY_BYTES)
    name, asked = _checked(body)
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= MAX_KEY:
        raise invalid("Idempotency-Key", f"must have 1 to {MAX_KEY} characters.")

    def create(conn: sa.Connection) -> ServedBatch:
        if asked.route.is_paid:
            spends.require_some_left(conn)
        file = files.find(conn, caller.tenant, name, hold=True)
        if file is None and key is None:
            raise _no_file(name)
        if file is not None and file.kind is not FileKind.INPUT:
            raise invalid("input_file_id", "is a file of results. A batch needs one with the purpose 'batch'.")
        batch, is_new = batches.create(
            conn, tenant=caller.tenant, idempotency_key=key, asked=asked, models=caller.models, input_file=name
        )
        if is_new and file is None:
            raise _no_file(name)  # a key that was used before is answered even after the file was deleted
        if not is_new and (batch.asked, batch.input_file) != (asked, name):
            message = f"this Idempotency-Key belongs to {batch.name}, for which something else was asked."
            raise Refusal(409, "idempotency_conflict", message, should_retry=False)
        return batch

    batch = await in_thread(gateway.db, create)
    _wake(gateway)
    return Reply(_shown(batch))


async def list_batches(gateway: Gateway, request: Request, caller: Caller) -> Response:
    limit = limit_of(request, default=20, most=100)

    def look(conn: sa.Connection) -> list[ServedBatch]:
        after = None
        if (name := request.query_params.get("after")) is not None:
            before = batches.find(conn, caller.tenant, name)
            if before is None:
                raise invalid("after", "is not the id of a batch.", "invalid_value")
            after = before.id
        return batches.page(conn, caller.tenant, after=after, limit=limit + 1)

    return Reply(page_of([_shown(batch) for batch in await in_thread(gateway.db, look)], limit))


async def show_batch(gateway: Gateway, request: Request, caller: Caller) -> Response:
    def look(conn: sa.Connection) -> ServedBatch:
        batch = _find(conn, request, caller)
        if batch.state is not ServedState.IN_PROGRESS or not batch.is_stale:
            return batch
        try:
            space, collection_id = results.place_of(conn, batch)
        except NotFound:
            return batch
        completed, failed = lines.count(conn, batch.id, space, collection_id)
        batches.set_counts(conn, batch, n_completed=completed, n_failed=failed)
        return _find(conn, request, caller)

    return Reply(_shown(await in_thread(gateway.db, look)))


async def cancel_batch(gateway: Gateway, request: Request, caller: Caller) -> Response:
    def cancel(conn: sa.Connection) -> ServedBatch:
        batch = _find(conn, request, caller)
        is_cancelled = batches.cancel_if_open(conn, batch.id)
        batch = _find(conn, request, caller)
        if not is_cancelled and batch.state is not ServedState.CANCELLING:
            message = f"Cannot cancel a batch with status '{batch.state}'."
            raise Refusal(409, "batch_has_ended", message, should_retry=False)
        return batch

    batch = await in_thread(gateway.db, cancel)
    _wake(gateway)
    return Reply(_shown(batch))


def _wake(gateway: Gateway) -> None:
    if gateway.batches is not None:
        gateway.batches.wake()


def _find(conn: sa.Connection, request: Request, caller: Caller) -> ServedBatch:
    name = request.path_params["batch_id"]
    batch = batches.find(conn, caller.tenant, name)
    if batch is None:
        raise Refusal(404, "batch_not_found", f"No batch found with id '{name[:100]}'.", param="batch_id")
    return batch


def _no_file(name: str) -> Refusal:
    message = f"Cannot find file {name[:100]}, or this API key does not have access to it."
    return Refusal(400, "file_not_found", message, param="input_file_id")


def _checked(body: dict[str, Any]) -> tuple[str, BatchOrder]:
    """The name of the input file, and what is asked. Raises :class:`Refusal`."""
    input_file, endpoint, window = (
        _required(body, name) for name in ("input_file_id", "endpoint", "completion_window")
    )
    if endpoint != ENDPOINT:
        raise invalid("endpoint", f"must be '{ENDPOINT}'.", "invalid_value")
    seconds = window_seconds(window)
    if seconds is None:
        raise invalid("completion_window", "must be from '1h' to '7d', such as '24h'.", "invalid_value")
    output_expiry = body.get("output_expires_after")
    return input_file, BatchOrder(
        endpoint=endpoint,
        window=window,
        seconds=seconds,
        metadata=_metadata(body.get("metadata")),
        output_seconds=FILE_SECONDS if output_expiry is None else expiry("output_expires_after", output_expiry),
        route=word_field(body, "route", meanings={str(route): route for route in Route}) or Route.AUTO,
        priority=word_field(body, "priority", meanings={str(priority): priority for priority in Priority})
        or Priority.NORMAL,
    )


def _required(body: dict[str, Any], name: str) -> str:
    value = text_field(body, name)
    if value is None:
        message = f"Missing required parameter: '{name}'."
        raise Refusal(400, "missing_required_parameter", message, param=name)
    return value.replace("\0", "")


def _metadata(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) > MAX_PAIRS:
        raise invalid("metadata", f"must be an object with at most {MAX_PAIRS} pairs.")
    for name, value in given.items():
        if len(name) > MAX_NAME or not isinstance(value, str) or len(value) > MAX_VALUE:
            raise invalid(
                "metadata", f"must have names of at most {MAX_NAME} and strings of at most {MAX_VALUE} characters."
            )
    if "\\u0000" in json.dumps(given):
        raise invalid("metadata", "holds a NUL character, which cannot be stored.")
    return given


def _shown(batch: ServedBatch) -> dict[str, Any]:
    errors = None if batch.errors is None else {"object": "list", "data": batch.errors}
    return {
        "id": batch.name,
        "object": "batch",
        "endpoint": batch.asked.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": batch.input_file,
        "completion_window": batch.asked.window,
        "status": batch.state,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": unix(batch.created_at),
        "expires_at": unix(batch.expires_at),
        **{f"{state}_at": unix(moment) for state, moment in batch.at.items()},
        "request_counts": {"total": batch.n_total, "completed": batch.n_completed, "failed": batch.n_failed},
        "usage": {
            "input_tokens": batch.n_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.n_tokens,
        },
        "metadata": batch.asked.metadata,
    }


_METADATA = {
    "type": ["object", "null"],
    "maxProperties": MAX_PAIRS,
    "propertyNames": {"maxLength": MAX_NAME},
    "additionalProperties": {"type": "string", "maxLength": MAX_VALUE},
}
_TIMES = {f"{state}_at": {"type": ["integer", "null"]} for state in ServedState if state != ServedState.VALIDATING}
BATCH_SCHEMA = {
    "type": "object",
    "required": [
        "id", "object", "endpoint", "input_file_id", "completion_window", "status", "created_at", "request_counts",
    ],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "batch"},
        "endpoint": {"const": ENDPOINT},
        "model": {"type": ["string", "null"]},
        "errors": {
            "type": ["object", "null"],
            "properties": {
                "object": {"const": "list"},
                "data": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "code": {"type": "string"},
                            "message": {"type": "string"},
                            "line": {"type": ["integer", "null"]},
                            "param": {"type": ["string", "null"]},
                        },
                    },
                },
            },
        },
        "input_file_id": {"type": "string"},
        "completion_window": {"type": "string"},
        "status": {"enum": [str(state) for state in ServedState]},
        "output_file_id": {"type": ["string", "null"]},
        "error_file_id": {"type": ["string", "null"]},
        "created_at": {"type": "integer"},
        "expires_at": {"type": "integer"},
        **_TIMES,
        "request_counts": {
            "type": "object",
            "properties": {name: {"type": "integer"} for name in ("total", "completed", "failed")},
        },
        "usage": {"type": "object"},
        "metadata": _METADATA,
    },
}  # fmt: skip
_BODY = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"const": ENDPOINT},
        "completion_window": {"type": "string", "description": "From 1h to 7d, such as 24h."},
        "metadata": _METADATA,
        "output_expires_after": EXPIRY_SCHEMA,
        "route": {"enum": [str(route) for route in Route], "default": "auto"},
        "priority": {"enum": [str(priority) for priority in Priority], "default": "normal"},
    },
}

ENDPOINTS = [
    Endpoint("POST", "/v1/batches", create_batch, Scope.BATCHES, "Create a batch.", body=_BODY, answer=BATCH_SCHEMA),
    Endpoint(
        "GET",
        "/v1/batches",
        list_batches,
        Scope.BATCHES,
        "List batches, the newest first.",
        answer=list_schema(BATCH_SCHEMA),
        parameters={
            "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
            "after": {"type": "string"},
        },
    ),
    Endpoint("GET", "/v1/batches/{batch_id}", show_batch, Scope.BATCHES, "Show a batch.", answer=BATCH_SCHEMA),
    Endpoint(
        "POST",
        "/v1/batches/{batch_id}/cancel",
        cancel_batch,
        Scope.BATCHES,
        "Cancel a batch. What is embedded by then stays.",
        answer=BATCH_SCHEMA,
    ),
]
