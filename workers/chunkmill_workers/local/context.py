"""What the task threads of one worker process share."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import sqlalchemy as sa

from chunkmill.db.connect import create_db, require_migrated
from chunkmill.db.retry import transact
from chunkmill.errors import CanaryFailed
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill.telemetry import tracing
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.local.canary import CanaryCheck
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.suspects import Room
from chunkmill_workers.process.lease import LeaseKeeper, owner_name

T = TypeVar("T")


@dataclass
class WorkerContext:
    """Built once per process by ``chunkmill_workers.celery`` before the first task."""

    settings: Settings
    db: sa.Engine
    engines: Engines
    leases: LeaseKeeper
    name: str
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the worker is told to go: tasks release what they hold at the next TokenBatch."""
    room: Room = field(default_factory=Room)
    broken: str | None = None
    """What was seen of a device that runs nothing any more; the watchdog ends the worker."""
    last_doorbell: float = field(default_factory=time.monotonic)
    """When a doorbell last reached this worker, on its own clock."""

    _current: ClassVar[WorkerContext | None] = None

    def __post_init__(self) -> None:
        self._canary = CanaryCheck(self.begin, self.name)

    @classmethod
    def start(cls, settings: Settings, device: str) -> WorkerContext:
        """Connect, load the default model, hear its canary and start the lease keeper."""
        db = create_db(
            settings.require_database_url(), role="worker", pool_size=settings.embedding_parallel_batches + 2
        )
        require_migrated(db)
        context = cls(
            settings=settings,
            db=db,
            engines=Engines(settings, device),
            leases=LeaseKeeper(db, settings.lease_seconds),
            name=owner_name(os.getpid()),
        )
        context.engine_for(context.engines.load_default(db))
        context.leases.start()
        cls._current = context
        return context

    @classmethod
    def current(cls) -> WorkerContext:
        if cls._current is None:
            raise RuntimeError("no worker context: start the worker with `celery -A chunkmill_workers worker -Q gpu`")
        return cls._current

    def engine_for(self, space: Space) -> Engine:
        """The engine whose vectors belong into ``space``, in files and in numbers.

        Raises what :meth:`Engines.for_space` does, and :class:`CanaryFailed` where its golden vectors are not the
        space's; ``engines.unserved`` names the space then.
        """
        engine = self.engines.for_space(space)
        try:
            self._canary.require(engine, space)
        except CanaryFailed:
            self.engines.leave(space)
            raise
        return engine

    def transact(self, work: Callable[[sa.Connection], T], what: str, *, give_up: bool = False) -> T:
        """Run ``work`` in a transaction, again and again while Postgres is away or refuses for a while.

        With ``give_up``, no longer than until the worker is told to go.
        """
        with tracing.span(what), self.leases.at_postgres():
            return transact(self.db, work, what=what, give_up=self.stopping if give_up else None)

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction that is run once."""
        with self.leases.at_postgres(), self.db.begin() as conn:
            yield conn

    def close(self) -> None:
        self.leases.stop()
        self.db.dispose()
