"""What the task threads of one worker process share, whichever queue they serve."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Self, TypeVar

import sqlalchemy as sa

from chunkmill.db.connect import limit_error, limit_of, refusal
from chunkmill.db.retry import LIMIT_SECONDS, LIMIT_TRIES, is_transient, transact
from chunkmill.errors import StoreLimit
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.work.chunk_batches import Lease
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.telemetry import tracing
from chunkmill_workers.process.lease import LeaseKeeper

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAID_LIMIT_TRIES, PAID_LIMIT_SECONDS = 200, 900.0
"""As ``LIMIT_TRIES`` and ``LIMIT_SECONDS``, for the write of an answer that is paid for."""


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

    def transact(
        self, work: Callable[[sa.Connection], T], what: str, *, give_up: bool = False, is_paid: bool = False
    ) -> T:
        """Run ``work`` in a transaction, and run it again for as long as Postgres is away or refuses.

        With ``give_up`` it stops trying when the worker is told to leave. Raises :class:`StoreLimit` if a setting of
        Postgres, such as ``statement_timeout``, ends the transaction again and again. That takes longer if it
        ``is_paid``, because what it would write is then lost and paid again.
        """
        tries, seconds = (PAID_LIMIT_TRIES, PAID_LIMIT_SECONDS) if is_paid else (LIMIT_TRIES, LIMIT_SECONDS)
        with tracing.span(what), self.leases.at_postgres():
            return transact(
                self.db,
                work,
                what=what,
                give_up=self.stopping if give_up else None,
                limit_tries=tries,
                limit_seconds=seconds,
                on_limit=self.leases.stands_still,
            )

    @contextlib.contextmanager
    def begin(self, what: str = "a transaction of this worker") -> Iterator[sa.Connection]:
        """Begin a transaction that is not run again. Raises :class:`StoreLimit` if a setting of Postgres ends it."""
        try:
            with self.leases.at_postgres(), self.db.begin() as conn:
                yield conn
        except sa.exc.DBAPIError as error:
            if limit_of(error) is None:
                raise
            raise limit_error(what, error) from error

    def finish_job(self, lease: Lease) -> None:
        """End the job if this was its last ChunkBatch. It is tried once, because the poller ends jobs too.

        The anti-join of a large job may take longer than Postgres allows a worker.
        """
        try:
            with tracing.span("finish job"), self.begin("finish job") as conn:
                finish_if_done(conn, lease.job_id, registry.VectorTable(lease.space_id))
        except Exception as error:
            if not is_transient(error) and not isinstance(error, StoreLimit):
                raise
            logger.warning(
                "the poller will end job %s, because this worker could not: %s", lease.job_id, refusal(error)
            )

    @property
    def answer_seconds(self) -> float:
        """How much longer than usual a drain may take, because an answer is on its way that is paid for."""
        return 0.0

    def book_abandoned(self) -> None:
        """Book what this worker leaves without an answer. It raises nothing, because the leases come next."""

    def close(self) -> None:
        """Stop renewing leases and close the connections. What is still held waits until its lease ends."""
        self.leases.stop()
        self.db.dispose()


@contextlib.contextmanager
def saying_limits() -> Iterator[None]:
    """Log a limit of Postgres that a task cannot keep even where the ledger should say so.

    What the task holds goes to other workers when its lease ends.
    """
    try:
        yield
    except StoreLimit as limit:
        logger.error("%s", limit)  # noqa: TRY400 - the message says what to do; a traceback would hide it
