"""The output and the error file of a batch, written line by line from its vectors whenever they are downloaded.

What a line holds depends on what is stored alone, so that two downloads are equal to the last byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import sqlalchemy as sa

from chunkmill.domain.served import FileKind
from chunkmill.domain.vectors import shorten
from chunkmill.errors import NotFound
from chunkmill.gateway.errors import TYPES
from chunkmill.gateway.rendering import base64_items, float_items
from chunkmill.ledger.served import lines
from chunkmill.ledger.served.batches import ServedBatch
from chunkmill.ledger.served.lines import NEVER_EXECUTED, NO_INPUTS, OK, Inputs, Line
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space


def stream(db: sa.Engine, batch: ServedBatch, kind: FileKind) -> Iterator[bytes]:
    """The file, slice by slice, each in a transaction of its own. Raises :class:`NotFound` if it is deleted."""
    after = -1
    while True:
        with db.begin() as conn:
            of_slice = lines.read(conn, batch.id, after=after)
            if not of_slice:
                return
            if kind is FileKind.OUTPUT:
                answered = [line for line in of_slice if line.status == OK]
                inputs = _inputs(conn, batch, answered)
        if kind is FileKind.OUTPUT:
            yield b"".join(output_line(batch, line, inputs[line.line]) for line in answered)
        else:
            yield b"".join(error_line(batch, line) for line in of_slice if line.status != OK)
        after = of_slice[-1].line


def _inputs(conn: sa.Connection, batch: ServedBatch, answered: Sequence[Line]) -> dict[int, Inputs]:
    space, collection_id = place_of(conn, batch)
    inputs = lines.read_inputs(conn, space, collection_id, answered)
    if any(len(inputs.get(line.line, NO_INPUTS).positions) != line.n_inputs for line in answered):
        raise NotFound(f"the results of batch {batch.name} were deleted while they were read.")
    return inputs


def place_of(conn: sa.Connection, batch: ServedBatch) -> tuple[Space, int]:
    """The space and the id of a batch's collection. Raises :class:`NotFound` if it was dropped."""
    collection = collections.resolve(conn, batch.name, is_hidden=True)
    if collection is None:
        raise NotFound(f"the results of batch {batch.name} were deleted.")
    return registry.get(conn, collection.space_id), collection.id


def output_line(batch: ServedBatch, line: Line, inputs: Inputs) -> bytes:
    """A line of the output file, with its end."""
    size = line.dimensions or inputs.vectors.shape[1]
    vectors = np.ascontiguousarray(shorten(inputs.vectors, size, normalize=inputs.normalize), "<f4")
    tokens = sum(inputs.n_tokens)
    rest: dict[str, Any] = {"model": batch.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    if inputs.truncated:
        rest["truncated"] = inputs.truncated
    name = _suffix(batch, line).encode()
    return b"".join(
        (
            b'{"id":"batch_req_%b","custom_id":%b,"response":' % (name, orjson.dumps(line.custom_id)),
            b'{"status_code":%d,"request_id":"req_%b","body":{"object":"list","data":[' % (OK, name),
            (base64_items if line.is_base64 else float_items)(0, vectors),
            b'],%b},"error":null}\n' % orjson.dumps(rest)[1:],
        )
    )


def error_line(batch: ServedBatch, line: Line) -> bytes:
    """A line of the error file, with its end: an HTTP error, or why it was never executed."""
    if line.status == NEVER_EXECUTED or line.status is None:
        return _line(batch, line, None, {"code": line.code, "message": line.message})
    error = {
        "message": line.message,
        "type": TYPES.get(line.status, "server_error"),
        "param": line.param,
        "code": line.code,
    }
    request_id = f"req_{_suffix(batch, line)}"
    response = {"status_code": line.status, "request_id": request_id, "body": {"error": error}}
    return _line(batch, line, response, None)


def _line(batch: ServedBatch, line: Line, response: object, error: object) -> bytes:
    return orjson.dumps(
        {
            "id": f"batch_req_{_suffix(batch, line)}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def _suffix(batch: ServedBatch, line: Line) -> str:
    """What the ids of a line's answer end with. It is the same in each download."""
    return f"{batch.name.removeprefix('batch_')}{line.line:05x}"
