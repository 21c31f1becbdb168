"""What the task threads of a worker on queue ``gpu`` share."""

from __future__ import annotations

import os
from typing import ClassVar

import sqlalchemy as sa

from chunkmill.broker import QUEUE
from chunkmill.db.connect import create_db, require_migrated
from chunkmill.errors import CanaryFailed
from chunkmill.settings import Settings
from chunkmill.spaces.registry import Space
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.local.canary import CanaryCheck
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.local.suspects import Workroom
from chunkmill_workers.process.context import QueueContext
from chunkmill_workers.process.lease import LeaseKeeper, owner_name


class WorkerContext(QueueContext):
    """A worker with models of its own, on queue ``gpu``."""

    queue: ClassVar[str] = QUEUE

    def __init__(self, settings: Settings, db: sa.Engine, engines: Engines, leases: LeaseKeeper, *, name: str) -> None:
        super().__init__(settings, db, leases, name=name)
        self.engines = engines
        self.workroom = Workroom()
        self.broken: str | None = None
        """Why the device runs nothing any more, if that is so. The watchdog then ends the worker."""
        self._canary = CanaryCheck(self.begin, self.name)

    @classmethod
    def start(cls, settings: Settings, device: str) -> WorkerContext:
        """Connect, load the default model, check its canary and start the lease keeper."""
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
        context.become_current()
        return context

    def engine_for(self, space: Space) -> Engine:
        """The engine whose vectors belong into ``space``: it has the space's files and passes its canary.

        Raises what :meth:`Engines.for_space` raises, and :class:`CanaryFailed` if the golden vectors differ too much
        from the space's. Then ``engines.unserved`` lists the space.
        """
        engine = self.engines.for_space(space)
        try:
            self._canary.require(engine, space)
        except CanaryFailed as drift:
            self.engines.leave(space.id, drift)
            raise
        return engine

    def ready_engine(self, space: Space, *, use: bool = True) -> Engine | None:
        """What :meth:`engine_for` would return at once. None if it would load the model or embed the golden texts.

        Without ``use`` the engine does not count as used.
        """
        engine = self.engines.loaded(space, use=use)
        return engine if engine is not None and self._canary.has_passed(engine, space) else None
