"""Jobs whose chunks are in hidden collections. A gateway makes them of the batches that it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

import sqlalchemy as sa

from chunkmill.client.base import store_errors
from chunkmill.client.enqueue import EnqueueRequest, enqueue
from chunkmill.client.jobs import Jobs
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Priority, Route
from chunkmill.ledger.jobs import routing
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space


class HiddenJobs(Jobs):
    """``Client``'s methods for jobs, and an ``enqueue`` into a hidden collection."""

    def register(self, conn: sa.Connection, spec: SpaceSpec) -> Space:
        """The space of ``spec``, which nobody drops until the end of this transaction."""
        return registry.register_and_hold(conn, spec, storage=self._settings.vector_storage)

    def spec_of(self, model: str, dimensions: int) -> SpaceSpec:
        """The space of a model's vectors with so many dimensions."""
        return self._spec(model, OnLong.TRUNCATE, dimensions=dimensions, precision=None)

    def enqueue_hidden(
        self,
        chunks: Iterable[tuple[str, str]],
        *,
        collection: str,
        spec: SpaceSpec,
        route: Route,
        priority: Priority,
        deadline: datetime,
        idempotency_key: str,
        on_window: Callable[[], None],
    ) -> int:
        """Enqueue ``(id, text)`` pairs like :meth:`enqueue`, and return the id of the job.

        ``on_window`` is called after each window. What it raises ends the enqueue; the same ``idempotency_key`` goes
        on in the same job. Texts that cannot be stored go onto the job's dead list. Raises :class:`NotFound` if the
        collection was dropped, :class:`UnknownRoute` and :class:`BudgetExceeded`.
        """
        with self._transaction() as conn:
            choice = routing.decide(conn, self._settings, spec, route, deadline)
        request = EnqueueRequest(
            collection,
            spec,
            self._settings.vector_storage,
            route,
            choice,
            deadline,
            priority,
            OnLong.TRUNCATE,
            idempotency_key,
            skip_invalid=True,
            is_hidden=True,
        )

        def ring(conn: sa.Connection) -> None:
            on_window()
            self._ring(conn)

        with store_errors(self._db):
            return enqueue(self._db, self._settings, request, chunks, ring=ring)
