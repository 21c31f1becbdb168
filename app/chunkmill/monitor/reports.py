"""What each worker reports about itself every few seconds: one row, with what it did in its last minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

REPORT_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""After this many seconds without a report a worker counts as silent: it is gone, or it cannot reach Postgres."""
FORGET_SECONDS = 600.0
"""After this many seconds without a report a worker is no longer shown."""

Kind = Literal["local", "provider", "both"]
"""The queues that a worker serves: ``gpu``, ``openai`` or both."""


@dataclass(frozen=True, slots=True)
class Report:
    """``contents``, ``tokens``, ``padded_tokens`` and ``engine_seconds`` are those of the last ``window_seconds``. The
    numbers of a GPU come from its driver."""

    name: str
    kind: Kind
    label: str
    device: str | None
    started_at: datetime
    window_seconds: float
    contents: int
    tokens: int
    padded_tokens: int
    engine_seconds: float
    held: int
    gpu_busy: float | None = None
    gpu_memory_used: int | None = None
    gpu_memory_total: int | None = None
    silent_seconds: float = 0.0
    """How many seconds ago the worker last reported."""

    def serves(self, kind: Kind) -> bool:
        return self.kind in (kind, "both")

    @property
    def is_silent(self) -> bool:
        return self.silent_seconds > SILENT_SECONDS

    def rate(self, amount: float) -> float:
        """``amount`` per second of the window; 0 for a silent worker, because its report is out of date."""
        return 0.0 if self.is_silent or self.window_seconds <= 0 else amount / self.window_seconds


_WRITE = sa.text(
    """
    INSERT INTO worker_reports (
        name, kind, label, device, started_at, seen_at, window_seconds, contents, tokens, padded_tokens,
        engine_seconds, held, gpu_busy, gpu_memory_used, gpu_memory_total
    )
    VALUES (
        :name, :kind, :label, :device, :started_at, now(), :window_seconds, :contents, :tokens, :padded_tokens,
        :engine_seconds, :held, :gpu_busy, :gpu_memory_used, :gpu_memory_total
    )
    ON CONFLICT (name) DO UPDATE SET
        label = excluded.label,
        device = excluded.device,
        started_at = excluded.started_at,
        seen_at = excluded.seen_at,
        window_seconds = excluded.window_seconds,
        contents = excluded.contents,
        tokens = excluded.tokens,
        padded_tokens = excluded.padded_tokens,
        engine_seconds = excluded.engine_seconds,
        held = excluded.held,
        gpu_busy = excluded.gpu_busy,
        gpu_memory_used = excluded.gpu_memory_used,
        gpu_memory_total = excluded.gpu_memory_total
    """
)


def write(conn: sa.Connection, report: Report) -> None:
    """Write the worker's row, or replace the one that it wrote before."""
    conn.execute(_WRITE, asdict(report))


def remove(conn: sa.Connection, name: str) -> None:
    """Delete the row of a worker that ends."""
    conn.execute(sa.text("DELETE FROM worker_reports WHERE name = :name"), {"name": name})


def delete_old(conn: sa.Connection) -> None:
    """Delete the rows of workers that ended without removing them. The poller calls this."""
    if exist(conn):
        conn.execute(
            sa.text("DELETE FROM worker_reports WHERE seen_at < now() - make_interval(secs => :age)"),
            {"age": FORGET_SECONDS},
        )


def exist(conn: sa.Connection) -> bool:
    """Whether the schema has the table of reports: this code also runs on the schema of the release before it."""
    return bool(conn.execute(sa.text("SELECT to_regclass('worker_reports') IS NOT NULL")).scalar_one())


_READ = sa.text(
    """
    SELECT
        name, kind, label, device, started_at, window_seconds, contents, tokens, padded_tokens, engine_seconds, held,
        gpu_busy, gpu_memory_used, gpu_memory_total,
        greatest(0, extract(epoch FROM now() - seen_at))::float8 AS silent_seconds
    FROM worker_reports
    ORDER BY label, name
    """
)


def read(conn: sa.Connection) -> Sequence[Report]:
    """All reports, in the order of the workers' names in Celery."""
    return [Report(**row._mapping) for row in conn.execute(_READ)]
