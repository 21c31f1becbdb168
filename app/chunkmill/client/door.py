"""Translates errors at the edge of the client: whatever Postgres or its driver raises inside leaves as an error of
ours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import psycopg
import sqlalchemy as sa

from chunkmill.db.connect import is_away, refusal, sqlstate, store_error, unreachable_message
from chunkmill.db.retry import is_transient
from chunkmill.errors import ChunkmillError, InvalidInput, StoreUnavailable

_UNUSABLE_SERVER = (sa.exc.OperationalError, sa.exc.InternalError, sa.exc.InterfaceError)
UNUSABLE = (*_UNUSABLE_SERVER, sa.exc.TimeoutError)
"""SQLAlchemy's errors about a Postgres that cannot be used, or about a pool without a free connection to it."""
DOOR_ERRORS = (sa.exc.SQLAlchemyError, psycopg.Error)
"""What :func:`door` translates."""

Method = TypeVar("Method", bound=Callable[..., Any])


def at_the_door(method: Method) -> Method:
    """Let a public method raise only errors of ours, and those of the caller's own iterables and functions.

    A method of a client that is closed raises :class:`ClientClosed`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._require_open()
        with door(self._db):
            return method(self, *args, **kwargs)

    return cast(Method, call)


@contextlib.contextmanager
def door(db: sa.Engine) -> Iterator[None]:
    """Raise an error of ours instead of one of SQLAlchemy or psycopg."""
    try:
        yield
    except DOOR_ERRORS as error:
        raise translated(str(db.url), error) from error


def translated(url: str, error: sa.exc.SQLAlchemyError | psycopg.Error) -> ChunkmillError:
    """The error of ours for one of SQLAlchemy or psycopg. Its words quote neither a statement nor a value."""
    if isinstance(error, sa.exc.TimeoutError):
        return StoreUnavailable("all connections of this client are in use; use one client per few threads.")
    if isinstance(error, _UNUSABLE_SERVER):
        return store_error(url, error)
    driver = getattr(error, "orig", None) or error
    code = sqlstate(error)
    if isinstance(driver, psycopg.DataError):
        return InvalidInput(f"Postgres cannot take one of the arguments ({type(driver).__name__}).")
    if code == "42501":
        return StoreUnavailable(
            f"Postgres refused: {refusal(driver)}. Use a login that may do it; docs/security.md says what each may do."
        )
    if not is_away(code):
        advice = "The same call may be made again." if is_transient(driver) else "`chunkmill doctor` shows more."
        return StoreUnavailable(f"Postgres refused ({type(driver).__name__}): {refusal(driver)}. {advice}")
    if isinstance(driver, psycopg.OperationalError | psycopg.InterfaceError):
        return StoreUnavailable(unreachable_message(url, driver))
    return StoreUnavailable(f"Postgres cannot be used ({type(driver).__name__}). `chunkmill doctor` shows more.")
