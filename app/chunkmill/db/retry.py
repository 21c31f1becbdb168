"""Runs a whole transaction again if Postgres could not take it: it was away or full, or there was a deadlock."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import TypeVar

import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import refusal
from chunkmill.telemetry.counts import COUNTS
from chunkmill.telemetry.metrics import POSTGRES_RETRIES

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

# Classes and codes of SQLSTATE whose causes pass by themselves or with an operator's help: a lost connection, a
# deadlock or serialization failure, a lack of disk, memory or connections, a server that stops or starts, an I/O error,
# a lock or statement that took too long, and a standby that is about to become the primary.
_TRANSIENT = ("08", "40", "53", "57P01", "57P02", "57P03", "57014", "58", "55P03", "25006")


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed if it is run again from its start."""
    if isinstance(error, sa.exc.DBAPIError):
        if error.connection_invalidated:
            return True
        error = error.orig or error
    if isinstance(error, sa.exc.TimeoutError):
        return True  # no connection of the pool became free
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:  # the server did not send it: the connection could not be made, or it broke
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate.startswith(_TRANSIENT)


def transact(
    db: sa.Engine,
    work: Callable[[sa.Connection], T],
    *,
    what: str,
    give_up: threading.Event | None = None,
    tries: int | None = None,
) -> T:
    """Run ``work`` in a transaction of its own. Run it again, with growing pauses, as long as Postgres cannot take it.

    ``work`` must change only the database, and must be correct if it runs again after a commit whose answer was lost.
    The log calls it ``what``. Raises an error that is not :func:`is_transient` at once, and the last error once
    ``give_up`` is set or all ``tries`` have failed.
    """
    event = give_up or threading.Event()
    failures = 0
    while True:
        try:
            with db.begin() as conn:
                result = work(conn)
        except Exception as error:
            failures += 1
            if not is_transient(error) or event.is_set() or failures == tries:
                raise
            COUNTS.add(POSTGRES_RETRIES)
            if failures == 1:
                logger.warning("%s: Postgres did not take it (%s); trying again until it does", what, refusal(error))
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures - 1, 10))
            event.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 - it only spreads the workers
            continue
        if failures:
            logger.info("%s: done, after %s tries", what, failures + 1)
        return result
