"""Jobs whose chunks are in hidden collections. A gateway makes them of the batches that it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import TypeVar

import sqlalchemy as sa

from chunkmill.client.base import store_errors
from chunkmill.client.enqueue import EnqueueRequest, enqueue
from chunkmill.client.jobs import Jobs
from chunkmill.client.paying import Items, quote_of
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Priority, Route
from chunkmill.ledger.jobs import routing
from chunkmill.spaces import registry
from chunkmill.spaces.registry import Space

T = TypeVar("T")

TELL_SECONDS = 2.0


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

        ``on_window`` is called after each window, and now and then while it is counted what the texts cost. What it
        raises ends the enqueue; the same ``idempotency_key`` goes on in the same job. Texts that cannot be stored go
        onto the job's dead list. Raises :class:`NotFound` if the collection was dropped, :class:`UnknownRoute` and
        :class:`BudgetExceeded`.
        """
        with self._transaction() as conn:
            choice = routing.decide(conn, self._settings, spec, route, deadline)
            quote = quote_of(
                self._db, conn, self._settings,
                collection=collection, spec=spec, route=route, choice=choice, on_long=OnLong.TRUNCATE,
            )  # fmt: skip
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
            may_cost=routing.may_cost(self._settings, spec, route),
        )

        def ring(conn: sa.Connection) -> None:
            on_window()
            self._ring(conn)

        def quote_alive(items: Items) -> Decimal:
            assert quote is not None  # noqa: S101
            return quote(lambda: _alive(items(), on_window))

        with store_errors(self._db):
            return enqueue(
                self._db, self._settings, request, chunks, ring=ring, quote=None if quote is None else quote_alive
            )


def _alive(items: Iterable[T], tell: Callable[[], None]) -> Iterator[T]:
    """The items. ``tell`` is called now and then while they are read."""
    told_at = time.monotonic()
    for item in items:
        if time.monotonic() - told_at > TELL_SECONDS:
            tell()
            told_at = time.monotonic()
        yield item
