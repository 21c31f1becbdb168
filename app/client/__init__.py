"""The producer's API. Everything here begins its own transactions; nothing here imports torch."""

from __future__ import annotations

from types import TracebackType

from app.broker import Broker
from app.client.dead import DeadList
from app.client.jobs import Jobs
from app.client.money import Money
from app.client.retention import Retention
from app.client.vectors import Vectors
from app.db.connect import create_db, migrate, require_migrated
from app.environment import Environment
from app.telemetry import tracing


class Client(Jobs, Money, DeadList, Vectors, Retention):
    """Enqueue chunks, follow jobs, search. Thread-safe; make one per process.

    Errors are those of ``app.errors``; a wrong argument is refused before anything is written.
    """

    @classmethod
    def from_env(cls) -> Client:
        """A client for ``DATABASE_URL`` and ``REDIS_URL``; both unset, for the embedded stack, started if down.

        Raises :class:`InvalidSetting` for a wrong setting and :class:`StoreUnavailable` when Postgres cannot be
        reached or needs ``chunkmill migrate``. The embedded database is migrated here.
        """
        environment = Environment.load(start_embedded=True)
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

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. The embedded stack stays up for the next caller: ``chunkmill down`` stops it."""
        self._db.dispose()
        self._broker.close()
