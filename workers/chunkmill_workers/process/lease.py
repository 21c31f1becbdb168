"""The thread that renews all leases of a process, and says which are lost.

The watchdog sees here which ChunkBatches stand still.
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

FIRST_PID_NAMESPACE = 0xEFFFFFFC
"""Linux gives it this number at every boot; it is a machine's own."""


def owner_name(pid: int) -> str:
    """What a process of ours signs its leases with, in itself and in its supervisor: ``host:pid``.

    In a container ``host/namespace:pid``: those that share the host's name each count their processes from 1.
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
        """When its thread last got a step further, on the process's own clock; None while it waits for Postgres."""

    def moved(self) -> None:
        self.moved_at = time.monotonic()

    def check(self) -> None:
        """Raise :class:`LeaseLost` at a stage boundary when another worker has the ChunkBatch now."""
        if self.lost.is_set():
            raise LeaseLost(
                f"ChunkBatch {self.lease.chunk_batch_id}: attempt {self.lease.attempt} lost its lease. Vectors written "
                "so far stay; the attempt that follows goes on from them."
            )


class Keeper:
    """A thread that renews what a process holds every third of a lease, in one statement for all of it.

    ``renew`` says what is held and how it is renewed.
    """

    def __init__(self, db: sa.Engine, lease_seconds: float, *, name: str) -> None:
        self._db = db
        self._lease_seconds = lease_seconds
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def renew(self) -> None:
        """Renew all that is held, once. Raises what Postgres raises."""

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
            except Exception as error:  # noqa: BLE001 - a worker whose heartbeat ended would lose all it holds
                # Postgres may be back before the lease is over; if not, the guarded writes will tell.
                if pause > self._lease_seconds / 30:
                    logger.warning("leases could not be renewed, trying again: %s", refusal(error))
                pause = self._lease_seconds / 30


class LeaseKeeper(Keeper):
    """Renews the leases of ChunkBatches, and says which of them are lost."""

    def __init__(self, db: sa.Engine, lease_seconds: float) -> None:
        super().__init__(db, lease_seconds, name="lease-keeper")
        self._held: dict[int, HeldLease] = {}
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

    @contextlib.contextmanager
    def at_postgres(self) -> Iterator[None]:
        """What this thread holds does not count as standing still meanwhile, because Postgres is waited for."""
        held: HeldLease | None = getattr(self._mine, "held", None)
        if held is None:
            yield
            return
        held.moved_at = None
        try:
            yield
        finally:
            held.moved()

    @property
    def n_held(self) -> int:
        with self._mutex:
            return len(self._held)

    def stillest(self) -> tuple[float, int]:
        """Seconds since the last step of the ChunkBatch that has stood still longest, and its id; 0.0 for none."""
        with self._mutex:
            held = [(each.moved_at, chunk_batch_id) for chunk_batch_id, each in self._held.items()]
        now = time.monotonic()
        return max(((now - at, chunk_batch_id) for at, chunk_batch_id in held if at is not None), default=(0.0, 0))

    def renew(self) -> None:
        """Renew once. A lease that is no longer ours is marked lost."""
        with self._mutex:
            held = dict(self._held)
        if not held:
            return
        with self._db.begin() as conn:
            still_ours = chunk_batches.renew_if_held(
                conn, [h.lease for h in held.values()], lease_seconds=self._lease_seconds
            )
        for chunk_batch_id, lease in held.items():
            if chunk_batch_id not in still_ours:
                lease.lost.set()
