"""A worker's thread that reports its state every few seconds: to the ledger for `status`, and to /metrics."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg
import sqlalchemy as sa

from chunkmill.broker import PROVIDER_QUEUE, QUEUE
from chunkmill.db.connect import refusal
from chunkmill.monitor import reports
from chunkmill.monitor.reports import REPORT_SECONDS, Kind, Report
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS, Counts
from chunkmill.telemetry.exposition import Process
from chunkmill.telemetry.metrics import Role
from chunkmill_workers.host.gpu import ClaimedDevice
from chunkmill_workers.host.nvml import Gpu, GpuUse
from chunkmill_workers.process.context import QueueContext
from chunkmill_workers.process.lease import owner_name

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
"""The time over which a report counts what was done."""
COUNTED = (m.CONTENTS, m.TOKENS, m.PADDED_TOKENS, m.ENGINE_SECONDS)
NO_GPU = GpuUse(None, None, None)


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker says of itself. ``label`` is its name in Celery; ``held()`` says how many ChunkBatches it holds."""

    kind: Kind
    label: str
    device: str | None
    held: Callable[[], int]


def this_process(queues: Collection[str], label: str, claimed: ClaimedDevice | None) -> Process:
    """What a worker's metrics say about its process."""
    roles = {QUEUE: Role.WORKER, PROVIDER_QUEUE: Role.PROVIDER}
    served = frozenset(role for queue, role in roles.items() if queue in queues)
    return Process(served, owner_name(os.getpid()), label, _device(claimed) or "")


def _device(claimed: ClaimedDevice | None) -> str | None:
    """``cpu``, or the GPU's UUID or index; None if the worker has no device."""
    return (claimed.gpu or claimed.device) if claimed else None


class LastMinute:
    """Counts what was done in the last minute."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._looks: deque[tuple[float, tuple[float, ...]]] = deque([(time.monotonic(), self._totals())])

    def take(self) -> tuple[float, list[float]]:
        """The seconds that passed, and what was counted in them in the order of ``COUNTED``."""
        now = time.monotonic()
        self._looks.append((now, self._totals()))
        # Keep the newest look that is at least a minute old, so that the minute is full.
        while len(self._looks) > 2 and now - self._looks[1][0] >= WINDOW_SECONDS:
            self._looks.popleft()
        then, before = self._looks[0]
        return now - then, [a - b for a, b in zip(self._looks[-1][1], before, strict=True)]

    def _totals(self) -> tuple[float, ...]:
        return tuple(self._counts.total(metric) for metric in COUNTED)


class Reporter(threading.Thread):
    """Reports until it is stopped, and deletes its report then. Without Postgres the worker goes on."""

    def __init__(self, context: QueueContext, worker: Worker, gpu: Gpu | None = None, counts: Counts = COUNTS) -> None:
        super().__init__(name="reporter", daemon=True)
        self._context = context
        self._worker = worker
        self._gpu = gpu
        self._counts = counts
        self._last_minute = LastMinute(counts)
        self._started_at = datetime.now(UTC)
        self._stop_reporting = threading.Event()
        self._said_why = False

    @classmethod
    def of(cls, contexts: Sequence[QueueContext], label: str, claimed: ClaimedDevice | None) -> Reporter:
        """The reporter of a process on one queue or on both. A process on both is one worker of kind ``both``."""
        gpu = Gpu.open(claimed.gpu) if claimed and claimed.gpu else None

        def held() -> int:
            return sum(context.leases.n_held for context in contexts)

        kind: Kind = "both" if len(contexts) > 1 else "local" if claimed else "provider"
        return cls(contexts[0], Worker(kind, label, _device(claimed), held), gpu)

    def run(self) -> None:
        while not self._stop_reporting.is_set():
            try:
                self.report()
            except Exception:  # as of NVML; a worker without reports would look silent
                if not self._said_why:
                    logger.exception("this worker is not in `status` for now")
                self._said_why = True
            self._stop_reporting.wait(REPORT_SECONDS)
        self._try(lambda conn: reports.remove(conn, self._context.name))

    def stop(self) -> None:
        self._stop_reporting.set()
        # A worker that leaves has only seconds, and Postgres may be away. Its report is forgotten in any case.
        self.join(timeout=1)

    def report(self) -> None:
        """Report once."""
        use = self._gpu.use() if self._gpu else NO_GPU
        held = self._worker.held()
        self._set_gauges(use, held)
        seconds, (contents, tokens, padded, engine_seconds) = self._last_minute.take()
        report = Report(
            name=self._context.name,
            kind=self._worker.kind,
            label=self._worker.label,
            device=self._worker.device,
            started_at=self._started_at,
            window_seconds=seconds,
            contents=round(contents),
            tokens=round(tokens),
            padded_tokens=round(padded),
            engine_seconds=engine_seconds,
            held=held,
            gpu_busy=use.busy,
            gpu_memory_used=use.memory_used,
            gpu_memory_total=use.memory_total,
        )
        self._try(lambda conn: reports.write(conn, report))

    def _set_gauges(self, use: GpuUse, held: int) -> None:
        self._counts.set(m.HELD, held)
        if self._worker.kind != "provider" and not held:
            self._counts.touch(m.LAST_PROGRESS)  # an idle worker does not stand still
        gauges = ((m.GPU_BUSY, use.busy), (m.GPU_MEMORY_USED, use.memory_used), (m.GPU_MEMORY_SIZE, use.memory_total))
        for metric, value in gauges:
            if value is not None:
                self._counts.set(metric, value)

    def _try(self, act: Callable[[sa.Connection], None]) -> None:
        try:
            with self._context.db.begin() as conn:
                act(conn)
        except (sa.exc.SQLAlchemyError, psycopg.Error) as error:
            if not self._said_why:
                logger.warning("this worker is not in `status` for now: %s", refusal(error))
            self._said_why = True
        else:
            self._said_why = False
