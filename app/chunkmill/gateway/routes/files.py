"""``/v1/files``: the input files that callers upload, and the output and error files of their batches."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chunkmill.client.base import store_errors
from chunkmill.domain.served import FileKind
from chunkmill.gateway.batches import results, uploads
from chunkmill.gateway.caller import Caller, Scope
from chunkmill.gateway.endpoint import Endpoint
from chunkmill.gateway.errors import Refusal
from chunkmill.gateway.fields import invalid
from chunkmill.gateway.gateway import Gateway
from chunkmill.gateway.replies import Reply
from chunkmill.ledger.served import batches, files
from chunkmill.ledger.served.files import PIECE_BYTES, ServedFile

MOST_FILES = 10_000
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.ASCII)

T = TypeVar("T")


async def create_file(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return Reply(_shown(await uploads.receive(gateway.db, request, caller.tenant)))


async def list_files(gateway: Gateway, request: Request, caller: Caller) -> Response:
    query = request.query_params
    order, purpose = query.get("order", "desc"), query.get("purpose")
    if order not in ("asc", "desc"):
        raise invalid("order", "must be 'asc' or 'desc'.", "invalid_value")
    kinds = [kind for kind in FileKind if purpose in (None, kind.purpose)]
    limit = limit_of(request, default=MOST_FILES, most=MOST_FILES)

    def look(conn: sa.Connection) -> list[ServedFile]:
        after = None
        if (name := query.get("after")) is not None:
            before = files.find(conn, caller.tenant, name)
            if before is None:
                raise invalid("after", "is not the id of a file that is still there.", "invalid_value")
            after = before.id
        return files.page(conn, caller.tenant, kinds=kinds, after=after, limit=limit + 1, is_ascending=order == "asc")

    return Reply(page_of([_shown(file) for file in await in_thread(gateway.db, look)], limit))


async def show_file(gateway: Gateway, request: Request, caller: Caller) -> Response:
    return Reply(_shown(await _find(gateway, request, caller)))


async def delete_file(gateway: Gateway, request: Request, caller: Caller) -> Response:
    def delete(conn: sa.Connection) -> str:
        file = files.find(conn, caller.tenant, request.path_params["file_id"])
        if file is None or not files.delete(conn, file.id):
            raise _not_found(request)
        return file.name

    name = await in_thread(gateway.db, delete)
    return Reply({"id": name, "object": "file", "deleted": True})


async def read_file(gateway: Gateway, request: Request, caller: Caller) -> Response:
    file = await _find(gateway, request, caller)
    first, end, is_part = _wanted(request, file)
    headers = {
        "accept-ranges": "bytes",
        "content-length": str(end - first),
        "content-disposition": 'attachment; filename="content.jsonl"',
    }
    if is_part:
        headers["content-range"] = f"bytes {first}-{end - 1}/{file.n_bytes}"
    if file.kind is FileKind.INPUT:
        pieces: Iterator[bytes] = files.read_pieces(gateway.db, file.id, first=first // PIECE_BYTES)
        skipped = first % PIECE_BYTES
    else:
        batch_id = file.served_batch_id
        assert batch_id is not None, "a result has a batch"  # noqa: S101
        batch = await in_thread(gateway.db, lambda conn: batches.get(conn, batch_id))
        if batch is None:
            raise _not_found(request)
        pieces, skipped = results.stream(gateway.db, batch, file.kind), first
    # The first piece is read before the answer begins, so that what fails at once is told.
    content = _part_of(pieces, skipped, end - first)
    begin = await asyncio.to_thread(lambda: list(itertools.islice(content, 1)))
    return StreamingResponse(
        itertools.chain(begin, content),
        status_code=206 if is_part else 200,
        headers=headers,
        media_type="application/octet-stream",
    )


def _part_of(pieces: Iterator[bytes], skipped: int, size: int) -> Iterator[bytes]:
    """``size`` bytes of the pieces, behind the first ``skipped``."""
    for piece in pieces:
        part = piece[skipped : skipped + size]
        skipped = max(0, skipped - len(piece))
        size -= len(part)
        if part:
            yield part
        if not size:
            return


def _wanted(request: Request, file: ServedFile) -> tuple[int, int, bool]:
    """``(first, end, is_part)``: which bytes are asked for. What is not one range of bytes asks for all."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or not (match[1] or match[2]):
        return 0, file.n_bytes, False
    if match[1]:
        first, end = int(match[1]), min(int(match[2] or file.n_bytes) + 1, file.n_bytes)
        if match[2] and int(match[2]) < first:
            return 0, file.n_bytes, False
    else:
        first, end = max(0, file.n_bytes - int(match[2])), file.n_bytes
    if first >= end:
        raise Refusal(
            416,
            "range_not_satisfiable",
            f"the file has {file.n_bytes:,} bytes.",
            headers={"content-range": f"bytes */{file.n_bytes}"},
        )
    return first, end, True


async def _find(gateway: Gateway, request: Request, caller: Caller) -> ServedFile:
    name = request.path_params["file_id"]
    file = await in_thread(gateway.db, lambda conn: files.find(conn, caller.tenant, name))
    if file is None:
        raise _not_found(request)
    return file


def _not_found(request: Request) -> Refusal:
    return Refusal(404, "file_not_found", f"No such File object: {request.path_params['file_id'][:100]}", param="id")


def _shown(file: ServedFile) -> dict[str, Any]:
    return {
        "id": file.name,
        "object": "file",
        "bytes": file.n_bytes,
        "created_at": unix(file.created_at),
        "expires_at": unix(file.expires_at),
        "filename": file.filename,
        "purpose": file.kind.purpose,
        "status": "processed",
        "status_details": None,
    }


async def in_thread(db: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    """What ``work`` returns, which runs in a transaction in a thread."""

    def run() -> T:
        with store_errors(db), db.begin() as conn:
            return work(conn)

    return await asyncio.to_thread(run)


def unix(moment: datetime | None) -> int | None:
    """Seconds since 1970."""
    return None if moment is None else int(moment.timestamp())


def limit_of(request: Request, *, default: int, most: int) -> int:
    """The query parameter ``limit``. Raises :class:`Refusal`."""
    given = request.query_params.get("limit", str(default))
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= most):
        raise invalid("limit", f"must be a whole number from 1 to {most}.", "invalid_value")
    return int(given)


def page_of(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list, from one item more than the page has."""
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > limit,
    }


FILE_SCHEMA = {
    "type": "object",
    "required": ["id", "object", "bytes", "created_at", "filename", "purpose", "status"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "file"},
        "bytes": {"type": "integer"},
        "created_at": {"type": "integer", "description": "Seconds since 1970."},
        "expires_at": {"type": ["integer", "null"]},
        "filename": {"type": "string"},
        "purpose": {"enum": ["batch", "batch_output"]},
        "status": {"const": "processed"},
        "status_details": {"type": "null"},
    },
}
EXPIRY_SCHEMA = {
    "type": "object",
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"const": "created_at"},
        "seconds": {"type": "integer", "minimum": uploads.LEAST_SECONDS, "maximum": uploads.MOST_SECONDS},
    },
}


def list_schema(item: dict[str, Any]) -> dict[str, Any]:
    """The schema of a page."""
    return {
        "type": "object",
        "required": ["object", "data", "has_more"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "first_id": {"type": ["string", "null"]},
            "last_id": {"type": ["string", "null"]},
            "has_more": {"type": "boolean"},
        },
    }


_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "A file whose name ends with .jsonl."},
        "purpose": {"const": "batch"},
        "expires_after": EXPIRY_SCHEMA,
    },
}
_DELETED = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "object": {"const": "file"}, "deleted": {"const": True}},
}

ENDPOINTS = [
    Endpoint("POST", "/v1/files", create_file, Scope.BATCHES, "Upload a file.", body=_UPLOAD, answer=FILE_SCHEMA),
    Endpoint(
        "GET",
        "/v1/files",
        list_files,
        Scope.BATCHES,
        "List files, the newest first.",
        answer=list_schema(FILE_SCHEMA),
        parameters={
            "purpose": {"type": "string"},
            "limit": {"type": "integer", "minimum": 1, "maximum": MOST_FILES, "default": MOST_FILES},
            "order": {"enum": ["asc", "desc"], "default": "desc"},
            "after": {"type": "string"},
        },
    ),
    Endpoint("GET", "/v1/files/{file_id}", show_file, Scope.BATCHES, "Show a file.", answer=FILE_SCHEMA),
    Endpoint(
        "DELETE",
        "/v1/files/{file_id}",
        delete_file,
        Scope.BATCHES,
        "Delete a file; with the output file of a batch also its texts and vectors.",
        answer=_DELETED,
    ),
    Endpoint(
        "GET",
        "/v1/files/{file_id}/content",
        read_file,
        Scope.BATCHES,
        "Download a file, or a range of its bytes.",
        answer={"type": "string", "format": "binary"},
        media_type="application/octet-stream",
    ),
]
