"""The gauges that a poller serves about the whole ledger.

They are set in a thread of their own, so that neither a scrape nor a round of the poller waits for them.
"""

from __future__ import annotations

import logging
import threading
import time

from chunkmill.domain.states import JobState
from chunkmill.monitor.reports import Kind
from chunkmill.monitor.snapshot import Snapshot, Totals, lane_states
from chunkmill.monitor.watcher import View, Watcher
from chunkmill.settings import Settings
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS, Counts, Sample

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0


class Gauges(threading.Thread):
    """A thread that sets the gauges every few seconds until it is stopped."""

    def __init__(self, settings: Settings, counts: Counts = COUNTS) -> None:
        super().__init__(name="gauges", daemon=True)
        self._watcher = Watcher(settings)
        self._counts = counts
        self._stop_setting = threading.Event()

    def run(self) -> None:
        while not self._stop_setting.is_set():
            try:
                self._counts.replace(m.LEDGER, samples(self._watcher.look()))
            except Exception:
                # Old values must not be served as if they were current.
                self._counts.replace(m.LEDGER, ())
                logger.exception("the gauges of the ledger could not be set; trying again in %g s", LOOK_SECONDS)
            self._stop_setting.wait(LOOK_SECONDS)
        self._watcher.close()

    def stop(self) -> None:
        self._stop_setting.set()
        self.join(timeout=5)


def samples(view: View) -> list[Sample]:
    """The values of the gauges. While Postgres is away, those of the ledger are missing, because nobody knows them."""
    values: list[Sample] = [
        (m.STORE_UP, ("postgres",), float(view.postgres_error is None)),
        (m.STORE_UP, ("redis",), float(view.redis_error is None)),
    ]
    values += [(m.DOORBELLS, (queue,), n) for queue, n in (view.doorbells or {}).items()]
    if view.postgres_error is None and view.snapshot and view.totals:
        values += [
            (m.LOOKED_AT, (), time.time()),
            (m.LOOK_SECONDS, ("now",), view.snapshot_seconds),
            (m.LOOK_SECONDS, ("tally",), view.totals_seconds),
        ]
        values += _of_snapshot(view.snapshot) + _of_totals(view.totals)
    return values


def _of_snapshot(snapshot: Snapshot) -> list[Sample]:
    values: list[Sample] = [(m.RUNNING, (route,), n) for route, n in snapshot.running.items()]
    for route, state in lane_states(snapshot).items():
        values.append((m.OLDEST, (route,), snapshot.oldest.get(route, 0.0)))
        values += [(m.LANE_STATE, (route, possible), float(possible == state)) for possible in m.LANE_STATES]
    kinds: tuple[Kind, ...] = ("local", "provider")
    for kind in kinds:
        for state, silent in (("live", False), ("silent", True)):
            n = sum(worker.serves(kind) and worker.is_silent is silent for worker in snapshot.workers)
            values.append((m.WORKERS, (kind, state), n))
    values += [(m.RECENT_FAULTS, (kind,), snapshot.recent.get(kind, 0)) for kind in m.FAULTS]
    money = snapshot.money
    values += [
        (m.CHARGED, ("today",), float(money.today)),
        (m.CHARGED, ("month",), float(money.month)),
        (m.ADJUSTED, ("lost",), float(money.lost)),
        (m.ADJUSTED, ("maybe_charged",), float(money.maybe_charged)),
        (m.ADJUSTED, ("correction",), float(money.corrected)),
        (m.COMMITTED, (), float(money.committed)),
    ]
    if money.limit is not None:
        values.append((m.BUDGET, (), float(money.limit)))
    return values


def _of_totals(totals: Totals) -> list[Sample]:
    values: list[Sample] = [(m.READY, (route,), n) for route, n in totals.ready.items()]
    values += [(m.DISCARDED, (route,), n) for route, n in totals.discarded.items()]
    values += [(m.JOBS, (state,), totals.jobs.get(state, 0)) for state in JobState]
    values += [(m.REMAINING, (), totals.remaining), (m.DEAD, (), totals.dead_chunks)]
    if totals.cache_hits is not None:
        values.append((m.CACHE_HITS, (), totals.cache_hits))
    return values
