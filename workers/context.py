"""What the task threads of one worker process share."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field
from typing import ClassVar

import sqlalchemy as sa

from app.db.connect import create_db, require_migrated
from app.settings import Settings
from workers.engines import Engines
from workers.lease import LeaseKeeper


@dataclass
class WorkerContext:
    """Built once per process by ``workers.celery`` before the first task."""

    settings: Settings
    db: sa.Engine
    engines: Engines
    leases: LeaseKeeper
    name: str
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the worker is told to go: tasks release what they hold at the next TokenBatch."""

    _current: ClassVar[WorkerContext | None] = None

    @classmethod
    def start(cls, settings: Settings, device: str) -> WorkerContext:
        """Connect, load the default model and start the lease keeper."""
        db = create_db(
            settings.require_database_url(), role="worker", pool_size=settings.embedding_parallel_batches + 2
        )
        require_migrated(db)
        context = cls(
            settings=settings,
            db=db,
            engines=Engines(settings, device),
            leases=LeaseKeeper(db, settings.lease_seconds),
            name=f"{socket.gethostname()}:{os.getpid()}",
        )
        context.engines.load_default(db)
        context.leases.start()
        cls._current = context
        return context

    @classmethod
    def current(cls) -> WorkerContext:
        if cls._current is None:
            raise RuntimeError("no worker context: start the worker with `celery -A workers worker -Q gpu`")
        return cls._current

    def close(self) -> None:
        self.leases.stop()
        self.db.dispose()
