"""Runs a whole transaction again if Postgres could not take it: it was away or full, or there was a deadlock."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import READ_ONLY, limit_error, limit_of, refusal
from chunkmill.telemetry.counts import COUNTS
from chunkmill.telemetry.metrics import POSTGRES_RETRIES

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

# Classes and codes of SQLSTATE whose causes pass by themselves or with an operator's help: a lost connection, a
# deadlock or serialization failure, a lack of disk, memory or connections, a server that stops or starts, an I/O error,
# and a standby that is about to become the primary. What a setting such as statement_timeout ended does not pass.
_TRANSIENT = ("08", "40", "53", "57P01", "57P02", "57P03", "57P05", "58", READ_ONLY)
# Those of them under which no transaction succeeds, whatever it does.
_OUTAGE = ("08", "57P01", "57P02", "57P03", "57P05", READ_ONLY)

LIMIT_TRIES, LIMIT_SECONDS = 5, 30.0
"""How often a transaction is tried that a setting of Postgres ends, and how long after the first try a last one may
begin. A lock may be gone by then. This stays below STEP_DEADLINE_SECONDS, after which the watchdog ends a worker."""


def is_transient(error: BaseException) -> bool:
    """Whether the same transaction may succeed if it is run again from its start."""
    return _is_one_of(_TRANSIENT, error) or isinstance(error, sa.exc.TimeoutError)  # no connection became free


def is_outage(error: BaseException) -> bool:
    """Whether no transaction can succeed now: Postgres is away, or takes no writes."""
    return _is_one_of(_OUTAGE, error)


def _is_one_of(codes: tuple[str, ...], error: BaseException) -> bool:
    if limit_of(error):
        return False  # although some of these limits also end the session
    if isinstance(error, sa.exc.DBAPIError):
        if error.connection_invalidated:
            return True
        error = error.orig or error
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:  # the server did not send it: the connection could not be made, or it broke
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate.startswith(codes)


def transact(
    db: sa.Engine,
    work: Callable[[sa.Connection], T],
    *,
    what: str,
    give_up: threading.Event | None = None,
    tries: int | None = None,
    limit_tries: int = LIMIT_TRIES,
    limit_seconds: float = LIMIT_SECONDS,
    on_limit: Callable[[], None] | None = None,
) -> T:
    """Run ``work`` in a transaction of its own. Run it again, with growing pauses, as long as Postgres cannot take it.

    ``work`` must change only the database, and must be correct if it runs again after a commit whose answer was lost.
    The log calls it ``what``. Raises an error that is not :func:`is_transient` at once, and the last error once
    ``give_up`` is set or all ``tries`` have failed.

    What a setting of Postgres ends, such as ``statement_timeout``, is tried ``limit_tries`` times, and no try begins
    later than ``limit_seconds``. Then it raises :class:`StoreLimit`. ``on_limit`` is called after each such end.
    """
    event = give_up or threading.Event()
    failures = limited = 0
    began = time.monotonic()
    while True:
        try:
            with db.begin() as conn:
                result = work(conn)
        except Exception as error:
            failures += 1
            is_last = event.is_set() or failures == tries
            if limit_of(error):
                limited += 1
                if on_limit:
                    on_limit()
                if is_last or limited >= limit_tries or time.monotonic() - began > limit_seconds:
                    raise limit_error(what, error) from error
            elif is_last or not is_transient(error):
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
