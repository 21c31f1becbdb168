"""The producer's own transaction, as the outbox writes into it: one of SQLAlchemy or of psycopg."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from chunkmill.db.connect import refusal, sqlstate
from chunkmill.errors import InvalidInput, StoreUnavailable

DATABASE = """
SELECT CAST(extract(epoch FROM pg_catalog.pg_postmaster_start_time()) AS text),
       CAST((SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()) AS text)
"""
"""What tells the database of a connection from all others: when its server was started, and its number there."""


class OuterTransaction(ABC):
    """A transaction that somebody else has begun and will end. What is written into it is written in a savepoint, so
    that an error leaves the transaction as it was."""

    @abstractmethod
    def rows(self, statement: str, parameters: Mapping[str, object] | None = None) -> Sequence[Sequence[Any]]:
        """Run a statement with named parameters (``:name``). Its rows, if it returns any."""

    @abstractmethod
    def savepoint(self) -> contextlib.AbstractContextManager[object]:
        """If the block raises, what was run in it is rolled back."""

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """A savepoint, out of which the driver's errors come as :class:`StoreUnavailable`."""
        try:
            with self.savepoint():
                yield
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            raise _refused(error) from error
        except sa.exc.SQLAlchemyError as error:
            raise InvalidInput(
                f"within is a transaction that cannot be used ({type(error).__name__}): it has failed or has ended. "
                "Roll it back, and enqueue in a new one."
            ) from error


class _SQLAlchemyTransaction(OuterTransaction):
    def __init__(self, conn: sa.Connection) -> None:
        self._conn = conn

    def rows(self, statement: str, parameters: Mapping[str, object] | None = None) -> Sequence[Sequence[Any]]:
        result = self._conn.execute(_text(statement), parameters or {})
        return result.all() if result.returns_rows else ()

    def savepoint(self) -> contextlib.AbstractContextManager[object]:
        return self._conn.begin_nested()


class _PsycopgTransaction(OuterTransaction):
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def rows(self, statement: str, parameters: Mapping[str, object] | None = None) -> Sequence[Sequence[Any]]:
        with self._connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(_compiled(statement).encode(), parameters or {})
            return cursor.fetchall() if cursor.description else ()

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        # Out of a transaction, `transaction()` would begin one and commit it.
        if self._connection.info.transaction_status is TransactionStatus.IDLE:
            self._connection.execute("SELECT 1", prepare=False)
        with self._connection.transaction():
            yield


def as_transaction(given: object) -> OuterTransaction:
    """The transaction that ``given`` is in. Raises :class:`InvalidInput` if it is not a connection, or commits each
    statement."""
    orm = sys.modules.get("sqlalchemy.orm")  # a program that has a session has imported it
    if orm is not None and isinstance(given, orm.Session | orm.scoped_session):
        try:
            given = given.connection()
        except sa.exc.SQLAlchemyError as error:
            raise InvalidInput(
                f"within is a session that has no connection to Postgres ({type(error).__name__}). Bind it to an "
                "engine of the database that Chunkmill uses, and end a transaction that has failed."
            ) from error
    if isinstance(given, sa.Connection):
        if given.dialect.name != "postgresql":
            raise InvalidInput(
                f"within is a connection to {given.dialect.name}, and Chunkmill's tables are in Postgres."
            )
        if given.closed:
            raise InvalidInput("within is a connection that is closed.")
        if given.get_execution_options().get("isolation_level") == "AUTOCOMMIT" or _commits_each(given):
            raise _commits()
        return _SQLAlchemyTransaction(given)
    if isinstance(given, psycopg.Connection):
        if given.closed:
            raise InvalidInput("within is a connection that is closed.")
        status = given.info.transaction_status
        if status is TransactionStatus.IDLE and given.autocommit:
            raise _commits()
        if status is TransactionStatus.INERROR:
            raise InvalidInput("within is a transaction that has failed. Roll it back before you enqueue in a new one.")
        return _PsycopgTransaction(given)
    advice = ""
    if isinstance(given, psycopg.AsyncConnection):
        advice = (
            " A connection of psycopg for asyncio cannot be used. Open a psycopg.Connection and call `enqueue` in a "
            "thread (asyncio.to_thread), or use an AsyncSession or an AsyncConnection of SQLAlchemy."
        )
    elif type(given).__module__.startswith("sqlalchemy.ext.asyncio"):
        advice = " With an AsyncSession: await session.run_sync(lambda s: client.enqueue(..., within=s))."
    raise InvalidInput(
        f"within is of type {type(given).__name__}; it must be a Session or a Connection of SQLAlchemy, or a "
        f"Connection of psycopg, with a transaction of yours.{advice}"
    )


def _commits_each(conn: sa.Connection) -> bool:
    """Whether the engine of the connection was made with ``isolation_level="AUTOCOMMIT"``."""
    return bool(getattr(conn.connection.dbapi_connection, "autocommit", False))


def _commits() -> InvalidInput:
    return InvalidInput(
        "within is a connection that commits each statement (autocommit), so there is no transaction to enqueue in. "
        "Begin one: `with connection.transaction():` in psycopg, `with engine.begin() as connection:` in SQLAlchemy."
    )


def _refused(error: sa.exc.DBAPIError | psycopg.Error) -> StoreUnavailable:
    code = sqlstate(error)
    said = f"Postgres refused to enqueue within your transaction ({code or type(error).__name__}): {refusal(error)}."
    if code == "42501":
        said += " The role of your connection needs the rights of a producer: GRANT chunkmill_producers TO your_role;"
    elif code == "25P02":
        said = "within is a transaction that has failed. Roll it back, and enqueue in a new one."
    elif code in ("40001", "40P01"):
        said += " Roll your transaction back and run all of it again."
    return StoreUnavailable(said)


@lru_cache(maxsize=64)
def _text(statement: str) -> sa.TextClause:
    return sa.text(statement)


@lru_cache(maxsize=64)
def _compiled(statement: str) -> str:
    """The statement with the placeholders of psycopg."""
    return str(sa.text(statement).compile(dialect=PGDialect_psycopg()))  # type: ignore[no-untyped-call]
