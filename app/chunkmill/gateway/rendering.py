"""Answers with many vectors, written in slices, so that none holds the event loop for more than some milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray
from starlette.responses import Response, StreamingResponse

Rows = NDArray[np.float32]
Write = Callable[[int, Rows], bytes]
"""``write(first, rows)`` is the JSON of a slice of the vectors, with commas between the rows. ``first`` is the position
of its first row. The rows are ``(n, d)``, contiguous and little-endian."""

SLICE_NUMBERS = 1 << 16
"""How many numbers a slice of floats has. orjson writes 25 million a second: 2.6 ms."""
SLICE_ROWS = 512
"""How many rows of base64 a slice has, of at most ``SLICE_BYTES`` together: 1 ms."""
SLICE_BYTES = 1 << 22


def written(
    vectors: Rows, write: Write, *, base64: bool, head: bytes, tail: bytes, headers: Mapping[str, str]
) -> Response:
    """The answer that consists of ``head``, the vectors as ``write`` writes them, and ``tail``.

    It is sent whole if the vectors are few. More of them are sent in slices, between which the loop does other things.
    """
    n_rows, n_columns = vectors.shape
    if base64:
        step = max(1, min(SLICE_ROWS, SLICE_BYTES // max(1, 4 * n_columns)))
    else:
        step = max(1, SLICE_NUMBERS // max(1, n_columns))
    if n_rows <= step:
        body = b"".join((head, write(0, vectors), tail))
        return Response(body, media_type="application/json", headers=dict(headers))
    parts = _parts(vectors, write, step, head, tail)
    return StreamingResponse(_in_turns(parts), media_type="application/json", headers=dict(headers))


def float_rows(first: int, rows: Rows) -> bytes:
    """``[0.1,…],[0.2,…]``: the shortest decimals that read as the same float32."""
    return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def base64_rows(first: int, rows: Rows) -> bytes:
    """``"…","…"``: each row as base64 of its little-endian float32."""
    return b",".join(b'"%b"' % pybase64.b64encode(row) for row in rows)


def float_items(first: int, rows: Rows) -> bytes:
    """OpenAI's items, with floats."""
    return b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, _floats(row))
        for index, row in enumerate(rows, first)
    )


def base64_items(first: int, rows: Rows) -> bytes:
    """OpenAI's items, with base64."""
    return b",".join(
        b'{"object":"embedding","index":%d,"embedding":"%b"}' % (index, pybase64.b64encode(row))
        for index, row in enumerate(rows, first)
    )


def _floats(row: Rows) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)


def _parts(vectors: Rows, write: Write, step: int, head: bytes, tail: bytes) -> Iterator[bytes]:
    n_rows = len(vectors)
    for first in range(0, n_rows, step):
        before = head if first == 0 else b","
        after = tail if first + step >= n_rows else b""
        yield b"".join((before, write(first, vectors[first : first + step]), after))


async def _in_turns(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
        await asyncio.sleep(0)  # to send a part does not wait while the socket takes it
