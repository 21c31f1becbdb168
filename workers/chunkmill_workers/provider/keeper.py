"""One thread renews the leases of all steps of a process."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import sqlalchemy as sa

from chunkmill.db.connect import refusal
from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.provider.provider_batches import Step

logger = logging.getLogger(__name__)


class StepKeeper:
    """As ``chunkmill_workers.process.lease.LeaseKeeper``, for steps of ProviderBatches. A step that lost its lease is told by its next
    guarded UPDATE."""

    def __init__(self, db: sa.Engine, lease_seconds: float) -> None:
        self._db = db
        self._lease_seconds = lease_seconds
        self._held: dict[int, Step] = {}
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @contextlib.contextmanager
    def holding(self, step: Step) -> Iterator[None]:
        with self._mutex:
            self._held[step.id] = step
        try:
            yield
        finally:
            with self._mutex:
                self._held.pop(step.id, None)

    def _run(self) -> None:
        while not self._stop.wait(self._lease_seconds / 3):
            with self._mutex:
                held = list(self._held.values())
            if not held:
                continue
            try:
                with self._db.begin() as conn:
                    provider_batches.renew_if_held(conn, held, lease_seconds=self._lease_seconds)
            except Exception as error:  # noqa: BLE001 - a worker whose heartbeat ended would lose all it holds
                logger.warning("leases of ProviderBatches could not be renewed, trying again: %s", refusal(error))
