"""Looks into the store for all calls of one event loop: what waits is read in one statement, and takes no thread.

There is no timer. If the connection is idle, a call is looked up at once; calls that come while it is busy are looked
up together. If a call cannot be answered, because the connection is not open yet or was lost, it is told so and reads
the store in a transaction of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psycopg
import sqlalchemy as sa
from psycopg import pq

from chunkmill.client.steps import Signal
from chunkmill.db.connect import open_alone
from chunkmill.domain.embedded import EmbeddedText
from chunkmill.domain.reasons import reason_of
from chunkmill.spaces.registry import Space
from chunkmill.store import read

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0
"""How many seconds after an error no connection is tried."""
MOST_HASHES = 4_096
"""How many texts one statement looks for."""

_BYTEA, _BYTEA_ARRAY, _INT8, _TEXT = 17, 1001, 20, 25
_ARRAY = struct.Struct("!iiIii")
_SIZE, _NUMBER = struct.Struct("!i"), struct.Struct("!q")


@dataclass(slots=True, eq=False)
class Lookup:
    """What one call looks for. The signal is given when ``stored`` has the result, or if this lookup cannot be made."""

    space: Space
    hashes: Sequence[bytes]
    signal: Signal = field(default_factory=Signal)
    stored: list[tuple[bytes, EmbeddedText]] | None = None
    """The texts that have a vector, each with it; None if it is not known."""


class Lookups:
    """Use it in its event loop only. It has one connection, which does not belong to the client's pool."""

    def __init__(self, db: sa.Engine) -> None:
        self._db = db
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Lookup] = deque()
        self._under_way: list[Lookup] = []
        self._results: list[pq.abc.PGresult] = []
        self._connection: psycopg.Connection[object] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._is_closed = False

    def ask(self, space: Space, hashes: Sequence[bytes]) -> Lookup:
        """Look for these texts, of which there are at most ``MOST_HASHES``."""
        lookup = Lookup(space, hashes)
        if self._connection is None:
            self._open()
            lookup.signal.give()
        else:
            self._waiting.append(lookup)
            if not self._under_way:
                self._next()
        return lookup

    def doubt(self, lookup: Lookup) -> None:
        """Report that the answer takes too long. If the texts are in the statement that runs, the connection is given
        up.
        """
        if lookup in self._under_way:
            self._lose("it does not answer")
        with contextlib.suppress(ValueError):
            self._waiting.remove(lookup)

    async def close(self) -> None:
        self._is_closed = True
        if self._opening is not None:
            await asyncio.wait([self._opening])
        self._drop()

    def _open(self) -> None:
        if self._is_closed or self._opening is not None or time.monotonic() < self._not_before:
            return
        self._opening = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            connection = await asyncio.to_thread(open_alone, self._db)
        except Exception as error:  # noqa: BLE001 - each call looks for itself meanwhile, and says what is wrong
            self._not_before = time.monotonic() + AGAIN_SECONDS
            logger.info("for now each call reads the store in a transaction of its own: %s", reason_of(error))
            return
        finally:
            self._opening = None
        if self._is_closed:
            connection.close()
            return
        connection.pgconn.nonblocking = 1
        self._connection = connection
        self._loop.add_reader(connection.fileno(), self._guarded, self._read)

    def _next(self) -> None:
        """Send the next statement, for all calls that wait for texts of the same space as the first one."""
        if self._waiting and self._connection is not None:
            self._guarded(self._send, self._connection.pgconn)

    def _send(self, pgconn: pq.abc.PGconn) -> None:
        space, left, hashes = self._waiting[0].space, deque[Lookup](), dict[bytes, None]()
        for lookup in self._waiting:
            if lookup.space == space and len(hashes) + len(lookup.hashes) <= MOST_HASHES:
                self._under_way.append(lookup)
                hashes |= dict.fromkeys(lookup.hashes)
            else:
                left.append(lookup)
        self._waiting = left
        pgconn.send_query_params(
            read.stored_query(space, "$1", "$2", "$3").encode(),
            [_array(hashes), _NUMBER.pack(space.id), space.spec.fingerprint.encode()],
            [_BYTEA_ARRAY, _INT8, _TEXT],
            [pq.Format.BINARY, pq.Format.BINARY, pq.Format.TEXT],
            pq.Format.BINARY,
        )
        self._flush()

    def _flush(self) -> None:
        if self._connection is None:
            return
        fd = self._connection.fileno()
        if self._connection.pgconn.flush():
            self._loop.add_writer(fd, self._guarded, self._flush)
        else:
            self._loop.remove_writer(fd)

    def _read(self) -> None:
        if self._connection is None:
            return
        pgconn = self._connection.pgconn
        pgconn.consume_input()
        while not pgconn.is_busy():
            while pgconn.notifies():
                pass  # nothing is listened for, but notifications must not fill this connection's memory
            result = pgconn.get_result()
            if result is not None:
                self._results.append(result)
                continue
            if self._under_way:
                self._answer()
            break

    def _answer(self) -> None:
        asked, self._under_way = self._under_way, []
        results, self._results = self._results, []
        if len(results) == 1 and results[0].status == pq.ExecStatus.TUPLES_OK:
            stored = dict(map(read.stored_row, _rows(results[0])))
            for lookup in asked:
                lookup.stored = [
                    (content_hash, stored[content_hash]) for content_hash in lookup.hashes if content_hash in stored
                ]
        # After an error, for example because the space was dropped, each call reads the store itself, and handles the
        # error.
        self._next()
        for lookup in asked:
            lookup.signal.give()

    def _guarded(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except psycopg.Error as error:
            self._lose(reason_of(error))

    def _lose(self, why: str) -> None:
        """Tell all waiting calls to read the store in transactions of their own, and connect anew a little later."""
        logger.info("the connection that looks into the store was lost: %s", why)
        self._not_before = time.monotonic() + AGAIN_SECONDS
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            fd = connection.pgconn.socket if connection.pgconn.status == pq.ConnStatus.OK else -1
            if fd >= 0:
                self._loop.remove_reader(fd)
                self._loop.remove_writer(fd)
            connection.close()
        left = [*self._under_way, *self._waiting]
        self._under_way, self._results = [], []
        self._waiting.clear()
        for lookup in left:
            lookup.signal.give()


def _array(hashes: dict[bytes, None]) -> bytes:
    """A ``bytea[]`` as Postgres reads it."""
    head = _ARRAY.pack(1, 0, _BYTEA, len(hashes), 1)
    return head + b"".join(_SIZE.pack(len(content_hash)) + content_hash for content_hash in hashes)


def _rows(result: pq.abc.PGresult) -> list[tuple[bytes, int, bool, bytes]]:
    """Hash, tokens, whether the text was cut, and the vector as ``vector_send`` writes it."""

    def value(row: int, column: int) -> bytes:
        return result.get_value(row, column) or b""

    return [
        (value(row, 0), int.from_bytes(value(row, 1), "big", signed=True), value(row, 2) == b"\1", value(row, 3))
        for row in range(result.ntuples)
    ]
