"""Books what keys use in a month: exactly for keys with a limit, and within a second for all others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from datetime import date
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.client.base import store_errors
from chunkmill.errors import ChunkmillError
from chunkmill.gateway.batching import QuestionBatcher
from chunkmill.ledger.access import usage
from chunkmill.ledger.access.usage import Demand, UsageBooking

logger = logging.getLogger(__name__)

WRITE_SECONDS = 1.0
"""How often what was used is written, if nobody reserves anything meanwhile, which writes it too."""


class Months:
    """Reservations of many requests go to Postgres together. What is given back waits for the next one, or a second."""

    def __init__(self, db: sa.Engine) -> None:
        self._db = db
        self._mutex = threading.Lock()
        self._owed: dict[tuple[int, date | None], UsageBooking] = {}
        self._reserving: QuestionBatcher[Demand, tuple[date, str | None]] = QuestionBatcher(self._reserve)
        self._writing: asyncio.Task[None] | None = None
        self._closes = asyncio.Event()

    async def reserve(self, asked: Demand) -> tuple[date, str | None]:
        """The month in which it is reserved; and None, or the limit that stands against it: ``tokens`` or ``usd``."""
        return await self._reserving(asked)

    def book(self, key_id: int, month: date | None, booked: UsageBooking) -> None:
        """Add to a month; None is the present one. It is written soon, and never raises."""
        with self._mutex:
            key = (key_id, month)
            self._owed[key] = self._owed.get(key, UsageBooking()).plus(booked)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_soon())

    async def close(self) -> None:
        """Write what is not written yet."""
        await self._reserving.close()
        self._closes.set()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await asyncio.to_thread(self._write)

    async def _write_soon(self) -> None:
        while self._owed and not self._closes.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WRITE_SECONDS):
                    await self._closes.wait()
            await asyncio.to_thread(self._write)

    def _write(self) -> None:
        if not self._owed:
            return
        try:
            self._reserve([])
        except ChunkmillError as error:
            logger.warning("what keys used is written later, because Postgres cannot be used (%s)", error.code)
        except Exception:  # it is tried again; without the line nobody would know, since no one waits for this
            logger.exception("what keys used could not be written; it is tried again with the next request")

    def _reserve(self, asked: Sequence[Demand]) -> list[tuple[date, str | None]]:
        with self._mutex:
            owed, self._owed = self._owed, {}
        try:
            with store_errors(self._db), self._db.begin() as conn:
                if owed:
                    usage.book(conn, _dated(owed, usage.this_month(conn)))
                month, verdicts = usage.reserve(conn, asked)
        except BaseException:
            with self._mutex:
                for key, booked in owed.items():
                    self._owed[key] = self._owed.get(key, UsageBooking()).plus(booked)
            raise
        return [(month, verdict) for verdict in verdicts]


def _dated(owed: dict[tuple[int, date | None], UsageBooking], month: date) -> dict[tuple[int, date], UsageBooking]:
    dated: dict[tuple[int, date], UsageBooking] = {}
    for (key_id, given), booked in owed.items():
        key = (key_id, given or month)
        dated[key] = dated.get(key, UsageBooking(0, 0, Decimal(0))).plus(booked)
    return dated
