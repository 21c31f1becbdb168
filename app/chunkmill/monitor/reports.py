"""What workers say of themselves every few seconds: a row each, which says the rates of its last minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa

REPORT_SECONDS = 5.0
SILENT_SECONDS = 20.0
"""A worker that has said nothing for so long is gone, or has no way to Postgres."""
FORGET_SECONDS = 600.0
"""So long a silent one is shown."""

Kind = Literal["local", "provider", "both"]
"""By its queues."""


@dataclass(frozen=True, slots=True)
class Report:
    """``contents`` to ``engine_seconds`` are those of the last ``window_seconds``; of a GPU as its driver says."""

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
    """Since it was heard of."""

    def serves(self, kind: Kind) -> bool:
        return self.kind in (kind, "both")

    @property
    def is_silent(self) -> bool:
        return self.silent_seconds > SILENT_SECONDS

    def rate(self, amount: float) -> float:
        """Per second. Of a silent worker none: what it said was true once."""
        return 0.0 if self.is_silent or self.window_seconds <= 0 else amount / self.window_seconds


def write(conn: sa.Connection, report: Report) -> None:
    conn.execute(
        sa.text(
            "INSERT INTO worker_reports (name, kind, label, device, started_at, seen_at, window_seconds, contents, "
            "tokens, padded_tokens, engine_seconds, held, gpu_busy, gpu_memory_used, gpu_memory_total) VALUES (:name, "
            ":kind, :label, :device, :started_at, now(), :window_seconds, :contents, :tokens, :padded_tokens, "
            ":engine_seconds, :held, :gpu_busy, :gpu_memory_used, :gpu_memory_total) ON CONFLICT (name) DO UPDATE SET "
            "label = excluded.label, device = excluded.device, started_at = excluded.started_at, "
            "seen_at = excluded.seen_at, window_seconds = excluded.window_seconds, contents = excluded.contents, "
            "tokens = excluded.tokens, padded_tokens = excluded.padded_tokens, "
            "engine_seconds = excluded.engine_seconds, held = excluded.held, gpu_busy = excluded.gpu_busy, "
            "gpu_memory_used = excluded.gpu_memory_used, gpu_memory_total = excluded.gpu_memory_total"
        ),
        {field: getattr(report, field) for field in Report.__dataclass_fields__ if field != "silent_seconds"},
    )


def remove(conn: sa.Connection, name: str) -> None:
    """A worker's good-bye."""
    conn.execute(sa.text("DELETE FROM worker_reports WHERE name = :name"), {"name": name})


def drop_old(conn: sa.Connection) -> None:
    """For the poller: forget workers that went without a good-bye."""
    if is_there(conn):
        conn.execute(
            sa.text("DELETE FROM worker_reports WHERE seen_at < now() - make_interval(secs => :age)"),
            {"age": FORGET_SECONDS},
        )


def is_there(conn: sa.Connection) -> bool:
    """Whether the schema has them: this code also runs on that of the release before."""
    return bool(conn.execute(sa.text("SELECT to_regclass('worker_reports') IS NOT NULL")).scalar_one())


def read(conn: sa.Connection) -> Sequence[Report]:
    """All, by name in Celery."""
    rows = conn.execute(
        sa.text(
            "SELECT *, extract(epoch FROM now() - seen_at) AS silent_seconds FROM worker_reports ORDER BY label, name"
        )
    )
    return [
        Report(
            row.name,
            row.kind,
            row.label,
            row.device,
            row.started_at,
            row.window_seconds,
            row.contents,
            row.tokens,
            row.padded_tokens,
            row.engine_seconds,
            row.held,
            row.gpu_busy,
            row.gpu_memory_used,
            row.gpu_memory_total,
            max(0.0, float(row.silent_seconds)),
        )
        for row in rows
    ]
