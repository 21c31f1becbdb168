"""Binary COPY: rows in Postgres' own wire format. Rows of a fixed width are encoded without a Python loop."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence

import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import raw
from chunkmill.system.numbers import NDArray, np

HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
TRAILER = b"\xff\xff"
HASH_BYTES = 32
BYTEA_OID = 17


@contextlib.contextmanager
def copy_in(conn: sa.Connection, target: str) -> Iterator[psycopg.Copy]:
    """Run ``COPY target FROM STDIN`` in the transaction of ``conn``. ``target`` is a table, also with its columns.

    Raises SQLAlchemy's errors, as any other statement on ``conn`` does. So a deadlock is run again, and a connection
    that broke or leads to a read-only server is dropped.
    """
    statement = f"COPY {target} FROM STDIN (FORMAT BINARY)"
    try:
        with raw(conn).cursor() as cursor, cursor.copy(statement) as copy:
            yield copy
    except psycopg.Error as error:
        # It has no public name, but it is what SQLAlchemy itself calls with each error of psycopg.
        conn._handle_dbapi_exception(error, statement, None, None, None)


def copy_binary(conn: sa.Connection, target: str, payload: bytes | memoryview) -> None:
    """Run ``COPY target FROM STDIN`` with rows in Postgres' binary form, as ``copy_in`` does."""
    with copy_in(conn, target) as copy:
        copy.write(HEADER)
        copy.write(payload)
        copy.write(TRAILER)


def encode_rows(rows: Iterable[Sequence[bytes]]) -> bytes:
    """Encode rows of variable width. Each field is in Postgres' binary form (jsonb is ``b"\\x01" + text``)."""
    parts: list[bytes] = []
    append = parts.append
    for row in rows:
        append(len(row).to_bytes(2, "big"))
        for value in row:
            append(len(value).to_bytes(4, "big"))
            append(value)
    return b"".join(parts)


def encode_hash_array(hashes: Sequence[bytes]) -> bytes:
    """Encode digests of 32 bytes as one ``bytea[]``: dimensions, flags, element type, length, lower bound, elements."""
    elements = np.zeros(len(hashes), dtype=[("len", ">i4"), ("hash", f"V{HASH_BYTES}")])
    elements["len"] = HASH_BYTES
    elements["hash"] = np.frombuffer(b"".join(hashes), dtype=f"V{HASH_BYTES}")
    return struct.pack(">5i", 1, 0, BYTEA_OID, len(hashes), 1) + elements.tobytes()


def encode_vectors(
    hashes: Sequence[bytes],
    n_tokens: NDArray[np.int32],
    truncated: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    *,
    half: bool,
) -> memoryview:
    """Encode rows ``(content_hash bytea, n_tokens int4, truncated bool, embedding vector|halfvec)``.

    ``hashes``: n digests of 32 bytes; ``n_tokens``: ``(n,)``; ``truncated``: ``(n,)``; ``vectors``:
    ``(n, d)``. Every row has the same width, so the whole payload is one structured array.
    """
    n, dimensions = vectors.shape
    element = ">f2" if half else ">f4"
    row = np.dtype(
        [
            ("fields", ">i2"),
            ("hash_len", ">i4"),
            ("hash", f"V{HASH_BYTES}"),
            ("n_tokens_len", ">i4"),
            ("n_tokens", ">i4"),
            ("truncated_len", ">i4"),
            ("truncated", "u1"),
            ("embedding_len", ">i4"),
            ("dimensions", ">u2"),
            ("unused", ">u2"),
            ("embedding", element, (dimensions,)),
        ]
    )
    rows = np.zeros(n, dtype=row)
    rows["fields"] = 4
    rows["hash_len"] = HASH_BYTES
    rows["hash"] = np.frombuffer(b"".join(hashes), dtype=f"V{HASH_BYTES}")
    rows["n_tokens_len"] = 4
    rows["n_tokens"] = n_tokens
    rows["truncated_len"] = 1
    rows["truncated"] = truncated
    rows["embedding_len"] = 4 + dimensions * np.dtype(element).itemsize
    rows["dimensions"] = dimensions
    rows["embedding"] = vectors
    return rows.view(np.uint8).data
