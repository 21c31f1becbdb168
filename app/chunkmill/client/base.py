"""What the parts of the client share: connections, transactions, doorbells."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from chunkmill.broker import Broker, publish_errors
from chunkmill.client.asking.cache import VectorCache
from chunkmill.client.door import UNUSABLE, at_the_door, translated
from chunkmill.client.ends import Futures
from chunkmill.client.finish import end_or_leave
from chunkmill.client.stopping import end_if_stopped
from chunkmill.domain.doorbells import SMALLEST_WINDOW
from chunkmill.domain.spaces import OnLong, Precision, SpaceSpec
from chunkmill.errors import ClientClosed
from chunkmill.ledger.jobs import jobs
from chunkmill.ledger.work.doorbells import ring_due
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.spaces.requested import requested_spec
from chunkmill.telemetry import tracing

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

QUIET_SECONDS = 10.0
"""How many seconds the client does not try to ring after it could not, because each try may take seconds to fail."""


class ClientPart:
    """The base of the client's parts: its connections, its transactions and its doorbells."""

    def __init_subclass__(cls) -> None:
        """Wrap every public method of a part, so that it raises only errors of Chunkmill
        (:mod:`chunkmill.client.door`).
        """
        super().__init_subclass__()
        for name, member in list(vars(cls).items()):
            if inspect.isfunction(member) and not name.startswith("_") and name != "close":
                setattr(cls, name, at_the_door(member))

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings) -> None:
        self._db = db
        self._broker = broker
        self._settings = settings
        self._quiet_until = 0.0
        self._futures = Futures(db)
        self._closing = threading.Event()
        self._query_cache = VectorCache(
            settings.query_cache_mb * 1024 * 1024,
            settings.query_cache_seconds,
            ("query", "document") if settings.query_cache_documents else ("query",),
        )

    def _require_open(self) -> None:
        """Raise :class:`ClientClosed` if the client is closed. A running call checks this before each transaction,
        because the pool would make new connections for it."""
        if self._closing.is_set():
            raise ClientClosed(
                "the client is closed. Make another one; one client serves all threads of a process, and is closed "
                "when no call needs it any more."
            )

    def _while_open(self, items: Iterable[Item]) -> Iterable[Item]:
        """The items, until the client is closed."""
        for item in items:
            self._require_open()
            yield item

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        end_if_stopped()
        self._require_open()
        with store_errors(self._db), self._db.begin() as conn:
            yield conn

    def _space(
        self,
        model: str | None,
        on_long: OnLong,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
    ) -> registry.Space:
        """The space that the arguments describe. It is registered if it is new.

        A space that this process knows is not looked up again, so it may have been dropped meanwhile. Code that uses it
        checks whether it is still there, and calls :func:`forget_space` if it is not.
        """
        return self._registered(self._spec(model, on_long, dimensions=dimensions, precision=precision))

    def _registered(self, spec: SpaceSpec) -> registry.Space:
        """The space of ``spec``, as :meth:`_space` returns it."""
        known = known_spaces(self._db)
        if (space := known.get(spec)) is None:
            with self._transaction() as conn:
                space = registry.register(conn, spec, storage=self._settings.vector_storage)
            known[spec] = space
        return space

    def _spec(
        self, model: str | None, on_long: OnLong, *, dimensions: int | None, precision: Precision | str | None
    ) -> SpaceSpec:
        def registered() -> list[SpaceSpec]:
            with self._transaction() as conn:
                return [space.spec for space in registry.all_spaces(conn)]

        return requested_spec(
            self._settings, model, on_long=on_long, dimensions=dimensions, precision=precision, registered=registered
        )

    def _take_up(self, job_ids: Iterable[int]) -> None:
        """Finish those of the jobs that have nothing left to do, and ring for the others."""
        with store_errors(self._db), self._db.connect() as conn:
            for job_id in job_ids:
                with conn.begin():
                    space = registry.VectorTable(jobs.space_id(conn, job_id))
                end_or_leave(conn, job_id, space)
            self._ring(conn)

    def _ring(self, conn: sa.Connection) -> None:
        if time.monotonic() < self._quiet_until:
            return
        try:
            with tracing.span("ring") as span, conn.begin():
                rung = ring_due(
                    conn,
                    self._broker,
                    queued=self._broker.queued_doorbells(),
                    window=min(SMALLEST_WINDOW, self._settings.doorbell_window),  # the poller rings for the rest
                    repair_seconds=self._settings.doorbell_repair_seconds,
                )
                span.set({"doorbells": rung})
        except publish_errors() as error:
            logger.warning("cannot ring (%s: %s); the poller will ring when Redis is back", type(error).__name__, error)
            self._quiet_until = time.monotonic() + QUIET_SECONDS


_KNOWN_SPACES: WeakKeyDictionary[sa.Engine, dict[SpaceSpec, registry.Space]] = WeakKeyDictionary()


def known_spaces(db: sa.Engine) -> dict[SpaceSpec, registry.Space]:
    """The spaces that clients with these connections have registered or found."""
    return _KNOWN_SPACES.setdefault(db, {})


def forget_space(db: sa.Engine, space: registry.Space) -> None:
    """Look for a space anew in the next call, because it is gone."""
    known = known_spaces(db)
    for spec in [spec for spec, kept in list(known.items()) if kept.id == space.id]:
        known.pop(spec, None)


@contextlib.contextmanager
def store_errors(db: sa.Engine) -> Iterator[None]:
    """Raise :class:`StoreUnavailable` instead of SQLAlchemy's errors about a Postgres that cannot be used."""
    try:
        yield
    except UNUSABLE as error:
        raise translated(str(db.url), error) from error
