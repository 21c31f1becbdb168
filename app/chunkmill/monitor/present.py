"""Who works on a database at this moment, and what to say if nobody does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from chunkmill.db.connect import Connections, connections
from chunkmill.domain.lanes import Lane
from chunkmill.domain.states import Route
from chunkmill.monitor import reports
from chunkmill.monitor.reports import Kind, Report

START_WORKER = "chunkmill worker"
START_PROVIDER_WORKER = "celery -A chunkmill_workers worker -Q openai"
START_POLLER = "chunkmill poller"
READY_SECONDS = 20
"""How long a worker takes to import torch and to load a small model, for messages."""


@dataclass(frozen=True, slots=True)
class Presence:
    """Workers and pollers as the database knows them.

    A worker reports once it is ready, and is connected a little before. A pooler such as PgBouncer may hide whose a
    connection is, so either of the two counts as a worker that is there.
    """

    connections: Connections
    live: Sequence[Report] = ()
    """The workers that reported lately."""

    def count(self, kind: Kind) -> int:
        """How many ready workers serve the queue."""
        return sum(report.serves(kind) for report in self.live)

    def has(self, kind: Kind) -> bool:
        """Whether a worker of the queue is there. It may still be loading its model."""
        connected = self.connections.provider_workers if kind == "provider" else self.connections.workers
        return connected > 0 or self.count(kind) > 0

    @property
    def is_starting(self) -> bool:
        """Whether ``chunkmill worker`` runs, and its worker is not connected yet."""
        return self.connections.supervisors > 0 and not self.has("local")

    def lack(self, route: Route) -> str | None:
        """A sentence about the worker that a route lacks; None if one is there. ``auto`` is served by either kind."""
        kinds: list[Kind] = []
        if not route.is_paid:
            kinds.append("local")
        if route is not Route.LOCAL:
            kinds.append("provider")
        if any(self.has(kind) for kind in kinds):
            return None
        if "local" in kinds and self.is_starting:
            return (
                f"A worker is starting, which takes some {READY_SECONDS} s. If this lasts, the log of "
                f"`{START_WORKER}` says why"
            )
        start = START_PROVIDER_WORKER if route.is_paid else START_WORKER
        worker = "worker for the paid routes" if route.is_paid and self.has("local") else "worker"
        return (
            f"No {worker} is connected, so nothing is embedded. To start one, which takes some {READY_SECONDS} s: "
            f"{start}"
        )


def read(conn: sa.Connection) -> Presence:
    """Who is there now. It reads two small tables."""
    every = reports.read(conn) if reports.exist(conn) else ()
    return Presence(connections(conn), [report for report in every if not report.is_silent])


def served(lanes: Iterable[Lane], present: Presence) -> list[Lane]:
    """The paid lanes, each with whether a worker serves it."""
    return [replace(lane, is_served=present.has("provider")) for lane in lanes]
