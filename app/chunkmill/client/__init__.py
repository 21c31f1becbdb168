"""The producer's API. Each method begins its own transactions, and nothing here imports torch."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any, overload

import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client.asking import sockets
from chunkmill.client.asking.listener import listener_of
from chunkmill.client.batching import Batchers
from chunkmill.client.bridges import Bridges
from chunkmill.client.chunks import Chunks
from chunkmill.client.collections import Collections
from chunkmill.client.comparing import Comparisons
from chunkmill.client.counting import counting_of
from chunkmill.client.dead import DeadList
from chunkmill.client.ends import ends_of
from chunkmill.client.hybrid import GoldenQueries
from chunkmill.client.maps import Maps
from chunkmill.client.money import Money
from chunkmill.client.reembedding import Reembeddings
from chunkmill.client.retention import Retention
from chunkmill.client.searches import Searches
from chunkmill.db.connect import create_db, migrate, require_migrated
from chunkmill.embedded.environment import Environment
from chunkmill.settings import Settings
from chunkmill.system.forks import renew_in_child
from chunkmill.telemetry import tracing
from chunkmill.telemetry.logging import without_passwords

__all__ = ["Client", "GoldenQueries"]

_mutex = threading.Lock()
"""Held while a thread decides whether it is the one that closes a client."""
renew_in_child(sys.modules[__name__], "_mutex")


class Client(
    Batchers, Money, DeadList, Comparisons, Searches, Bridges, Maps, Chunks, Collections, Reembeddings, Retention
):
    """Enqueues chunks, follows jobs and searches. Make one per process.

    All threads may use it at once, and each call gets its own answer. A call that waits for a worker or for a job has
    no connection meanwhile, so any number of threads may wait. Ten calls at a time have a connection: an enqueue and an
    estimate keep theirs while they read their chunks, and all other calls for their transactions. A call that gets none
    within 30 s raises :class:`StoreUnavailable`. One further connection, which all clients of the process to the same
    database share, listens for the answers of workers: from the first call that waits for one until none has waited for
    30 s, or all these clients are closed. A second connection listens in the same way for the ends of jobs. An iterable
    or a function that is given to a call runs in the thread of that call. Close the client when no call runs any more.
    :class:`AsyncClient` is for asyncio.

    A process that is forked from one with a client, as under ``gunicorn --preload``, may use that client too: it makes
    connections of its own. Do not fork while a call is under way in the same thread.

    ``Client(database_url=…, redis_url=…)`` is a client for these servers, so that one process may have clients of
    several installations. Every other setting may be given by its name too, in lower case, such as
    ``embedding_model="all-MiniLM-L6-v2"``; those that are not given are read from the environment. Without addresses
    the servers are those of the environment, as for :meth:`from_env`, or with ``chunkmill_home`` those of the embedded
    stack in that folder.

    A client is a context manager, so ``with Client(…) as client:`` closes it at the end. A method that is called after
    that raises :class:`ClientClosed`, and so does a call of another thread at its next transaction.

    It raises the errors of ``chunkmill.errors``. A wrong argument is refused before anything is written.
    """

    @overload
    def __init__(
        self, *, database_url: str | None = None, redis_url: str | None = None, **settings: object
    ) -> None: ...

    @overload
    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings, /) -> None: ...

    def __init__(
        self, *made: Any, database_url: str | None = None, redis_url: str | None = None, **settings: object
    ) -> None:
        # Parts of Chunkmill that already have connections, such as the gateway, pass them in.
        super().__init__(*(made or _connected(database_url, redis_url, settings)))
        self._is_left = False

    @classmethod
    def from_env(cls) -> Client:
        """A client for ``DATABASE_URL`` and ``REDIS_URL``. If both are unset it is a client for the embedded stack,
        which ``chunkmill up`` has started. Its schema is migrated if it is older.

        Raises :class:`InvalidSetting` if a setting is wrong or no server is known, and :class:`StoreUnavailable` if
        Postgres cannot be reached or needs ``chunkmill migrate``.
        """
        return cls()

    def __repr__(self) -> str:
        """One line with the servers, without their passwords."""
        database, broker = self._settings.require_database_url(), self._settings.require_redis_url()
        return without_passwords(f"Client(database={database!r}, redis={broker!r})")

    def __enter__(self) -> Client:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The embedded stack stays up for the next caller; ``chunkmill down`` stops it.

        Closing a client again does nothing.
        """
        self._closing.set()
        with _mutex:
            if self._is_left:
                return
            self._is_left = True
        counting_of(self._db).leave(self._db)
        listener_of(self._db).leave(self._db)
        self._futures.close()
        ends_of(self._db).leave(self._db)
        sockets.leave(self._db)
        # If a call of another thread still uses a connection, this pool gets it back when that call ends.
        sa.event.listen(self._db.pool, "checkin", _close_connection)
        self._db.dispose()
        self._broker.close()


def _close_connection(connection: object, entry: sa.pool.ConnectionPoolEntry) -> None:
    entry.invalidate()


def _connected(
    database_url: str | None, redis_url: str | None, settings: dict[str, object]
) -> tuple[sa.Engine, Broker, Settings]:
    """Connections to the servers that the arguments name. Postgres was asked whether this release can use it."""
    addresses = {"database_url": database_url, "redis_url": redis_url}
    given: dict[str, Any] = settings | {name: url for name, url in addresses.items() if url is not None}
    environment = Environment.load(**given)
    known = environment.settings
    tracing.configure("chunkmill-client")
    if environment.is_embedded:
        migrate(known.require_database_url())
    db = create_db(known.require_database_url(), role="client")
    try:
        require_migrated(db)
        return db, Broker.connect(known), known
    except BaseException:
        db.dispose()
        raise
