"""What the task threads of one worker process share, whichever queue they serve."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Self, TypeVar

import sqlalchemy as sa

from chunkmill.db.retry import transact
from chunkmill.settings import Settings
from chunkmill.telemetry import tracing
from chunkmill_workers.process.lease import LeaseKeeper

T = TypeVar("T")


class QueueContext:
    """The base of ``WorkerContext`` and ``ProviderContext``. It is built once per process, before the first task.

    ``name`` is the owner in the worker's leases.
    """

    queue: ClassVar[str]
    _current: ClassVar[Self | None] = None

    def __init__(self, settings: Settings, db: sa.Engine, leases: LeaseKeeper, *, name: str) -> None:
        self.settings = settings
        self.db = db
        self.leases = leases
        self.name = name
        self.stopping = threading.Event()
        """Set when the worker is told to leave. Tasks then release what they hold at their next step."""
        self.last_doorbell = time.monotonic()
        """When a doorbell last reached this worker, by ``time.monotonic``."""

    @classmethod
    def current(cls) -> Self:
        """The context of this process. Raises RuntimeError in a process that was not started as such a worker."""
        if cls._current is None:
            raise RuntimeError(
                f"no {cls.__name__}: start the worker with `celery -A chunkmill_workers worker -Q {cls.queue}`"
            )
        return cls._current

    def become_current(self) -> None:
        """Start the lease keeper and hand this context to the tasks of this process."""
        self.leases.start()
        type(self)._current = self

    def transact(self, work: Callable[[sa.Connection], T], what: str, *, give_up: bool = False) -> T:
        """Run ``work`` in a transaction, and run it again for as long as Postgres is away or refuses.

        With ``give_up`` it stops trying when the worker is told to leave.
        """
        with tracing.span(what), self.leases.at_postgres():
            return transact(self.db, work, what=what, give_up=self.stopping if give_up else None)

    @contextlib.contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """Begin a transaction that is not run again."""
        with self.leases.at_postgres(), self.db.begin() as conn:
            yield conn

    def close(self) -> None:
        """Stop renewing leases and close the connections. What is still held waits until its lease ends."""
        self.leases.stop()
        self.db.dispose()
