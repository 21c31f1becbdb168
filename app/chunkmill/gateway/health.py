"""Whether the gateway can do its work: looked at once a second at most, for all who ask."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import sqlalchemy as sa

from chunkmill.broker import Broker
from chunkmill.client.base import store_errors
from chunkmill.db.connect import connections
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.errors import ChunkmillError
from chunkmill.gateway.models import Models
from chunkmill.monitor import reports
from chunkmill.settings import Settings

KEEP_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
"""A server that has not answered by then counts as away. Those that ask for /health wait about as long."""
LONG_WAIT_SECONDS = 10.0
"""How many seconds a request must have waited to show that the workers cannot keep up."""


@dataclass(frozen=True, slots=True)
class Health:
    """``status`` is ``healthy``, ``degraded`` or ``unhealthy``, and ``problems`` say why it is not the first."""

    status: str
    model: str
    dimensions: int | None = None
    device: str | None = None
    """``cuda`` or ``cpu``; None without a worker, and for a model of a provider."""
    workers: int = 0
    """Workers that serve the default model's queue and have reported lately."""
    queue: int = 0
    """Requests that wait for vectors."""
    problems: tuple[str, ...] = ()
    has_store: bool = True

    @property
    def is_healthy_enough(self) -> bool:
        """Whether it can answer requests, if perhaps late."""
        return self.status != "unhealthy"


@dataclass(slots=True)
class HealthCheck:
    db: sa.Engine
    broker: Broker
    settings: Settings
    models: Models
    _last: tuple[float, Health] | None = field(default=None, init=False)
    _looking: asyncio.Task[Health] | None = field(default=None, init=False)

    async def look(self) -> Health:
        """The health of a second ago at most. It raises nothing."""
        if self._last is not None and time.monotonic() - self._last[0] <= KEEP_SECONDS:
            return self._last[1]
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            # A thread that hangs in a server's silence is not started a second time.
            health = await asyncio.wait_for(asyncio.shield(self._looking), PATIENCE_SECONDS)
        except TimeoutError:
            return self._without_store("Postgres did not answer")
        self._last = (time.monotonic(), health)
        return health

    async def _look(self) -> Health:
        try:
            spec = await self.models.default_spec()
            return await asyncio.to_thread(self._read, spec)
        except ChunkmillError:
            return self._without_store("Postgres cannot be used")

    def _without_store(self, problem: str) -> Health:
        return Health("unhealthy", self.settings.embedding_model, problems=(problem,), has_store=False)

    def _read(self, spec: SpaceSpec | None) -> Health:
        with store_errors(self.db), self.db.begin() as conn:
            every = reports.read(conn)
            pollers = connections(conn).pollers
            waiting = conn.execute(_WAITING).one()
        kind: reports.Kind = "provider" if spec is not None and spec.provider == OPENAI else "local"
        able = [report for report in every if report.serves(kind)]
        live = [report for report in able if not report.is_silent]
        problems = []
        if not live:
            problems.append("no worker has reported lately")
        if len(live) < len(able):
            problems.append(f"{len(able) - len(live)} of {len(able)} workers are silent")
        if spec is None:
            problems.append("the default model cannot be found")
        if pollers == 0:
            problems.append("no poller is connected")
        if waiting.longest > LONG_WAIT_SECONDS:
            problems.append("requests wait long for a worker")
        if not self.broker.takes_writes():
            problems.append("Redis takes no writes")
        devices = {report.device for report in live if report.device}
        return Health(
            "unhealthy" if not live else "degraded" if problems else "healthy",
            self.settings.embedding_model,
            None if spec is None else spec.dimensions,
            None if not devices else "cpu" if devices == {"cpu"} else "cuda",
            len(live),
            waiting.requests,
            tuple(problems),
        )


_WAITING = sa.text("""
SELECT
    count(*) AS requests,
    coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8 AS longest
FROM embed_requests
WHERE vectors IS NULL AND error IS NULL
""")
