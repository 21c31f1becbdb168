"""The client's method for chunks that come one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from chunkmill.client.batcher import Batcher
from chunkmill.client.jobs import Jobs
from chunkmill.domain.arguments import as_deadline, as_number, as_on_invalid, as_seconds, as_word, require_name
from chunkmill.domain.results import Job
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import InvalidInput

MOST_CHUNKS = 100_000
MOST_BYTES = 1024 * 1024 * 1024


class Batchers(Jobs):
    """The part of the client that is about chunks that come one at a time."""

    def batcher(
        self,
        collection: str,
        *,
        max_chunks: int = 1_000,
        max_bytes: int = 8 * 1024 * 1024,
        max_seconds: float = 5.0,
        timeout: float = 60.0,
        model: str | None = None,
        route: Route | str = Route.AUTO,
        priority: Priority | str = Priority.NORMAL,
        on_long: OnLong | str = OnLong.TRUNCATE,
        on_invalid: Literal["raise", "skip"] = "raise",
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        deadline: timedelta | float | None = None,
    ) -> Batcher:
        """Gather chunks that come one at a time, and enqueue them together: ``with client.batcher("docs") as add``.

        A batch is enqueued as a job of its own when it has ``max_chunks`` chunks, or ``max_bytes`` bytes of text, ids
        and metadata, or when its first chunk has waited for ``max_seconds``. Up to one further batch is gathered
        meanwhile, which bounds the memory. A call that finds no room waits up to ``timeout`` seconds.

        The other arguments are those of :meth:`enqueue`; ``deadline`` is a timedelta or a number of seconds, counted
        for each job from its enqueue. Raises :class:`InvalidInput`, :class:`UnknownModel` and :class:`UnknownRoute`;
        :class:`Batcher` says what adding raises.
        """
        require_name("collection", collection)
        route, priority = as_word(Route, route, "route"), as_word(Priority, priority, "priority")
        on_long, on_invalid = as_word(OnLong, on_long, "on_long"), as_on_invalid(on_invalid)
        if isinstance(deadline, datetime):
            raise InvalidInput("deadline is one moment for all jobs; give a timedelta, or a number of seconds.")
        if deadline is not None:
            as_deadline(deadline, datetime.now(UTC))
        self._spec(model, on_long, dimensions=dimensions, precision=precision)
        options: dict[str, Any] = {
            "collection": collection,
            "model": model,
            "route": route,
            "priority": priority,
            "on_long": on_long,
            "on_invalid": on_invalid,
            "dimensions": dimensions,
            "precision": precision,
            "deadline": deadline,
        }

        def enqueue(chunks: Sequence[object], key: str) -> Job:
            return self.enqueue(chunks, idempotency_key=key, **options)

        return Batcher(
            enqueue,
            max_chunks=as_number("max_chunks", max_chunks, least=1, most=MOST_CHUNKS),
            max_bytes=as_number("max_bytes", max_bytes, least=1, most=MOST_BYTES),
            max_seconds=as_wait("max_seconds", max_seconds),
            timeout=as_wait("timeout", timeout),
            skips=on_invalid == "skip",
        )


def as_wait(argument: str, given: object) -> float:
    """A number of seconds for which a thread can wait: a longer one means for ever, which is a year here."""
    return min(as_seconds(argument, given), 366 * 86_400.0)
