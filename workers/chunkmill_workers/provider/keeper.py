"""Renews the leases of all ProviderBatch steps of a process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa

from chunkmill.ledger.provider import provider_batches
from chunkmill.ledger.provider.provider_batches import Step
from chunkmill_workers.process.lease import Keeper


class StepKeeper(Keeper):
    """Renews the leases of ProviderBatch steps. A step learns from its next guarded UPDATE that it lost its lease."""

    def __init__(self, db: sa.Engine, lease_seconds: float) -> None:
        super().__init__(db, lease_seconds, name="step-keeper")
        self._held: dict[int, Step] = {}

    @contextlib.contextmanager
    def holding(self, step: Step) -> Iterator[None]:
        """Renew the step's lease until the block ends."""
        with self._mutex:
            self._held[step.id] = step
        try:
            yield
        finally:
            with self._mutex:
                self._held.pop(step.id, None)

    def renew(self) -> None:
        with self._mutex:
            held = list(self._held.values())
        if held:
            with self._db.begin() as conn:
                provider_batches.renew_if_held(conn, held, lease_seconds=self._lease_seconds)
