"""Renews the leases of a process from a thread of its own, and marks those that are lost.

The watchdog learns here which ChunkBatches make no progress.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from chunkmill.db.connect import refusal
from chunkmill.errors import LeaseLost
from chunkmill.ledger.work import chunk_batches
from chunkmill.ledger.work.chunk_batches import Lease

logger = logging.getLogger(__name__)

REMEMBERED_JOBS = 256
"""How many jobs a worker remembers to have served. As many can have a bell in Redis by the default of
``DOORBELL_WINDOW``, and a job that is forgotten is served as one that is new to the worker."""
FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""The number that Linux gives to the machine's own namespace at every boot."""


def owner_name(pid: int) -> str:
    """The owner that a process writes into its leases: ``host:pid``. Its supervisor computes the same name.

    In a container it is ``host/namespace:pid``, because containers may share the host's name and each counts its
    processes from 1.
    """
    host = socket.gethostname()
    with contextlib.suppress(FileNotFoundError):  # not Linux
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        if namespace != FIRST_PID_NAMESPACE:
            host += f"/{namespace}"
    return f"{host}:{pid}"


class HeldLease:
    """A lease while its ChunkBatch is worked on."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.lost = threading.Event()
        self.moved_at: float | None = time.monotonic()
        """When its thread last made progress, by ``time.monotonic``. None while it waits for Postgres."""
        self.asked_at = self.moved_at
        """When its thread last began to wait for Postgres."""

    def moved(self) -> None:
        """Note that the work has made progress."""
        self.moved_at = time.monotonic()

    def check(self) -> None:
        """Raise :class:`LeaseLost` if another worker has the ChunkBatch now. Call it between two stages of the work."""
        if self.lost.is_set():
            raise LeaseLost(
                f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} lost its lease. The vectors "
                "that it has written stay, and the next attempt goes on from them."
            )


class Keeper:
    """A thread that renews the leases of a process three times in each ``LEASE_SECONDS``, all in one statement.

    A subclass says in ``renew`` what is held and how it is renewed.
    """

    def __init__(self, db: sa.Engine, lease_seconds: float, *, name: str) -> None:
        self._db = db
        self._lease_seconds = lease_seconds
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def renew(self) -> None:
        """Renew everything that is held, once. Raises what Postgres raises."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        pause = self._lease_seconds / 3
        while not self._stop.wait(pause):
            try:
                self.renew()
                pause = self._lease_seconds / 3
            except Exception as error:  # noqa: BLE001 - a worker whose keeper ended would lose everything that it holds
                # Postgres may be back before the lease ends. If not, the guarded writes notice it.
                if pause > self._lease_seconds / 30:
                    logger.warning("leases could not be renewed, trying again: %s", refusal(error))
                pause = self._lease_seconds / 30


class LeaseKeeper(Keeper):
    """Renews the leases of ChunkBatches, and marks those that are lost."""

    def __init__(self, db: sa.Engine, lease_seconds: float) -> None:
        super().__init__(db, lease_seconds, name="lease-keeper")
        self._held: dict[int, HeldLease] = {}
        self._served: dict[int, float] = {}
        """When something of a job was last held, by ``time.monotonic``, the latest last."""
        self._mine = threading.local()

    @contextlib.contextmanager
    def holding(self, lease: Lease) -> Iterator[HeldLease]:
        """Renew ``lease`` until the block ends."""
        held = HeldLease(lease)
        with self._mutex:
            self._held[lease.chunk_batch_id] = held
        self._mine.held = held
        try:
            yield held
        finally:
            self._mine.held = None
            with self._mutex:
                if self._held.get(lease.chunk_batch_id) is held:
                    del self._held[lease.chunk_batch_id]
                self._served.pop(lease.job_id, None)
                self._served[lease.job_id] = time.monotonic()
                if len(self._served) > REMEMBERED_JOBS:
                    del self._served[next(iter(self._served))]

    @contextlib.contextmanager
    def at_postgres(self) -> Iterator[None]:
        """While the block waits for Postgres, what this thread holds does not count as standing still."""
        held: HeldLease | None = getattr(self._mine, "held", None)
        if held is None:
            yield
            return
        held.asked_at, held.moved_at = time.monotonic(), None
        try:
            yield
        finally:
            held.moved()

    def stands_still(self) -> None:
        """What this thread holds counts as standing still since it began to wait for Postgres.

        Postgres is not away, but ends each try. So the watchdog has to see it if the tries do not end.
        """
        held: HeldLease | None = getattr(self._mine, "held", None)
        if held is not None:
            held.moved_at = held.asked_at

    @property
    def n_held(self) -> int:
        """How many ChunkBatches are held now."""
        with self._mutex:
            return len(self._held)

    def served(self) -> dict[int, float]:
        """How many seconds ago something of each job was last held here; 0 if something is held now."""
        with self._mutex:
            now = time.monotonic()
            ago = {job_id: now - at for job_id, at in self._served.items()}
            return ago | {held.lease.job_id: 0.0 for held in self._held.values()}

    def stillest(self) -> tuple[float, int]:
        """How many seconds the stillest ChunkBatch has made no progress, and its id; (0.0, 0) if none is held."""
        with self._mutex:
            held = [(lease.moved_at, chunk_batch_id) for chunk_batch_id, lease in self._held.items()]
        now = time.monotonic()
        return max(((now - at, chunk_batch_id) for at, chunk_batch_id in held if at is not None), default=(0.0, 0))

    def renew(self) -> None:
        """Renew all leases once. A lease that another worker has by now is marked lost."""
        with self._mutex:
            held = dict(self._held)
        if not held:
            return
        with self._db.begin() as conn:
            still_ours = chunk_batches.renew_if_held(
                conn, [lease.lease for lease in held.values()], lease_seconds=self._lease_seconds
            )
        for chunk_batch_id, lease in held.items():
            if chunk_batch_id not in still_ours:
                lease.lost.set()
