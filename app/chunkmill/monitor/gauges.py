"""A poller's view of the whole ledger, as metrics. In a thread of its own, so that no scrape and no round waits."""

from __future__ import annotations

import logging
import threading
import time

from chunkmill.domain.states import JobState
from chunkmill.monitor.reports import Kind
from chunkmill.monitor.snapshot import Now, Tally
from chunkmill.monitor.watcher import Looker, View, lane_states
from chunkmill.settings import Settings
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS, Counts, Sample

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0


class Observer(threading.Thread):
    """Looks every few seconds until it is stopped."""

    def __init__(self, settings: Settings, counts: Counts = COUNTS) -> None:
        super().__init__(name="observer", daemon=True)
        self._looker = Looker(settings)
        self._counts = counts
        self._stop_looking = threading.Event()

    def run(self) -> None:
        while not self._stop_looking.is_set():
            try:
                self._counts.replace(m.LEDGER, samples(self._looker.look()))
            except Exception:
                # What was said before must not stand as if it were seen now.
                self._counts.replace(m.LEDGER, ())
                logger.exception("the ledger's metrics could not be taken; looking again")
            self._stop_looking.wait(LOOK_SECONDS)
        self._looker.close()

    def stop(self) -> None:
        self._stop_looking.set()
        self.join(timeout=5)


def samples(view: View) -> list[Sample]:
    """What a view says. While Postgres is away, no more of the ledger than that: a number that nobody sees is none."""
    found: list[Sample] = [
        (m.STORE_UP, ("postgres",), float(view.postgres_error is None)),
        (m.STORE_UP, ("redis",), float(view.redis_error is None)),
    ]
    found += [(m.DOORBELLS, (queue,), n) for queue, n in (view.doorbells or {}).items()]
    if view.postgres_error is None and view.now and view.tally:
        found += [
            (m.LOOKED_AT, (), time.time()),
            (m.LOOK_SECONDS, ("now",), view.now_seconds),
            (m.LOOK_SECONDS, ("tally",), view.tally_seconds),
        ]
        found += _of_now(view.now) + _of_tally(view.tally)
    return found


def _of_now(now: Now) -> list[Sample]:
    states = lane_states(now)
    found: list[Sample] = [(m.RUNNING, (route,), n) for route, n in now.running.items()]
    for route, state in states.items():
        found.append((m.OLDEST, (route,), now.oldest.get(route, 0.0)))
        found += [(m.LANE_STATE, (route, each), float(each == state)) for each in m.LANE_STATES]
    kinds: tuple[Kind, ...] = ("local", "provider")
    for kind in kinds:
        for state, silent in (("live", False), ("silent", True)):
            n = sum(worker.serves(kind) and worker.is_silent is silent for worker in now.workers)
            found.append((m.WORKERS, (kind, state), n))
    found += [(m.RECENT_FAULTS, (kind,), now.recent.get(kind, 0)) for kind in m.FAULTS]
    money = now.money
    found += [
        (m.CHARGED, ("today",), float(money.today)),
        (m.CHARGED, ("month",), float(money.month)),
        (m.COMMITTED, (), float(money.committed)),
    ]
    if money.limit is not None:
        found.append((m.BUDGET, (), float(money.limit)))
    return found


def _of_tally(tally: Tally) -> list[Sample]:
    found: list[Sample] = [(m.READY, (route,), n) for route, n in tally.ready.items()]
    found += [(m.DISCARDED, (route,), n) for route, n in tally.discarded.items()]
    found += [(m.JOBS, (state,), tally.jobs.get(state, 0)) for state in JobState]
    found += [(m.REMAINING, (), tally.remaining), (m.DEAD, (), tally.dead_chunks)]
    if tally.cache_hits is not None:
        found.append((m.CACHE_HITS, (), tally.cache_hits))
    return found
