"""The producer's API. Each method begins its own transactions, and nothing here imports torch."""

from __future__ import annotations

from types import TracebackType

from chunkmill.broker import Broker
from chunkmill.client.asking import sockets
from chunkmill.client.asking.listener import listener_of
from chunkmill.client.bridges import Bridges
from chunkmill.client.chunks import Chunks
from chunkmill.client.collections import Collections
from chunkmill.client.comparing import Comparing
from chunkmill.client.counting import counting_of
from chunkmill.client.dead import DeadList
from chunkmill.client.hybrid import GoldenQueries
from chunkmill.client.jobs import Jobs
from chunkmill.client.maps import Maps
from chunkmill.client.money import Money
from chunkmill.client.reembedding import Reembeddings
from chunkmill.client.retention import Retention
from chunkmill.client.searches import Searches
from chunkmill.db.connect import create_db, migrate, require_migrated
from chunkmill.embedded.environment import Environment
from chunkmill.telemetry import tracing
from chunkmill.telemetry.logging import without_passwords

__all__ = ["Client", "GoldenQueries"]


class Client(Jobs, Money, DeadList, Comparing, Searches, Bridges, Maps, Chunks, Collections, Reembeddings, Retention):
    """Enqueues chunks, follows jobs and searches. Make one per process.

    All threads may use it at once, and each call gets its own answer. A call that waits for a worker or for a job has
    no connection meanwhile, so any number of threads may wait. Ten calls at a time have a connection: an enqueue and an
    estimate keep theirs while they read their chunks, and all other calls for their transactions. A call that gets none
    within 30 s raises :class:`StoreUnavailable`. One further connection, which all clients of the process to the same
    database share, listens for the answers of workers: from the first call that waits for one until none has waited
    for 30 s, or all these clients are closed. An iterable or a function that is given to a call runs in the thread
    of that call. Close the client when no call runs any more. :class:`AsyncClient` is for asyncio.

    A process that is forked from one with a client, as under ``gunicorn --preload``, may use that client too: it makes
    connections of its own. Do not fork while a call is under way in the same thread.

    It raises the errors of ``chunkmill.errors``. A wrong argument is refused before anything is written.
    """

    @classmethod
    def from_env(cls) -> Client:
        """A client for ``DATABASE_URL`` and ``REDIS_URL``. If both are unset it is a client for the embedded stack,
        which ``chunkmill up`` has started. Its schema is migrated if it is older.

        Raises :class:`InvalidSetting` if a setting is wrong or no server is known, and :class:`StoreUnavailable` if
        Postgres cannot be reached or needs ``chunkmill migrate``.
        """
        environment = Environment.load()
        settings = environment.settings
        tracing.configure("chunkmill-client")
        if environment.is_embedded:
            migrate(settings.require_database_url())
        db = create_db(settings.require_database_url(), role="client")
        try:
            require_migrated(db)
        except BaseException:
            db.dispose()
            raise
        return cls(db, Broker.connect(settings), settings)

    def __repr__(self) -> str:
        """One line with the servers, without their passwords."""
        database, broker = self._settings.require_database_url(), self._settings.require_redis_url()
        return without_passwords(f"Client(database={database!r}, redis={broker!r})")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The embedded stack stays up for the next caller; ``chunkmill down`` stops it."""
        counting_of(self._db).leave(self._db)
        listener_of(self._db).leave(self._db)
        sockets.leave(self._db)
        self._db.dispose()
        self._broker.close()
