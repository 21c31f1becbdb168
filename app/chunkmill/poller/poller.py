"""The loop that rings doorbells for work that is due, and recovers what others left behind. Any number may run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from chunkmill.broker import Broker, publish_errors
from chunkmill.db.connect import READ_ONLY, read_only_message, sqlstate
from chunkmill.db.retry import is_outage
from chunkmill.domain.doorbells import HURRY, DoorbellWindow
from chunkmill.domain.reasons import reason_of
from chunkmill.ledger import dropping
from chunkmill.ledger.access import spends
from chunkmill.ledger.dead import deaths
from chunkmill.ledger.dead.deaths import TakenBackCounts
from chunkmill.ledger.jobs import cancel, recover
from chunkmill.ledger.jobs.finish import finish_if_done
from chunkmill.ledger.served import files as served_files
from chunkmill.ledger.work.doorbells import ring_due
from chunkmill.monitor import minutes, reports, worker_sockets
from chunkmill.poller.paid import ProviderRounds
from chunkmill.poller.steps import Steps
from chunkmill.settings import Settings
from chunkmill.spaces import collections, names, registry
from chunkmill.store import outdated, searches
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS

logger = logging.getLogger(__name__)

CANCELS_SECONDS = 10.0
"""Time between two searches for unfinished cancels. Each search reads all jobs that were ever cancelled."""
DROPPED_COLLECTIONS, DROPPED_SLICES = 5, 5
"""How many dropped collections one round goes on deleting, and how many slices of each, so that bells do not wait."""
VIEWS_SECONDS = 60.0
"""Time between two looks for views that are missing or out of date. Each look reads the names of all collections."""
FILES_SECONDS = 60.0
"""Time between two looks for files of served batches that have expired."""
COUNTS_SECONDS = 600.0
"""Time between two times that old counts of searches are put together."""
OUTDATED_SECONDS = 60.0
"""Time between two times that copies of old texts and vectors are deleted which no search reads any more."""
SPENDS_SECONDS = 10.0
"""Time between two times that what keys have reserved is replaced by the bill."""
SPENDS_AGAIN_SECONDS = 600.0
"""Time between two looks for bills that have changed after the end of what they are for."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""How long a job that could not be ended waits for the next try."""

_UP_SECONDS = sa.text("SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())")


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did."""

    taken_back: TakenBackCounts
    finished: int
    abandoned: int
    rung: int


class Poller:
    """Postgres says what is due, and the poller repeats it to Redis. If pollers are lost for a while, no work is lost.

    It remembers only how fast workers answer its doorbells, which each poller learns for itself.
    """

    def __init__(
        self, db: sa.Engine, broker: Broker, settings: Settings, beat: Callable[[], None] = lambda: None
    ) -> None:
        """``beat`` is called at least once in each round, also while Postgres or Redis is away."""
        self._beat = beat
        self._db = db
        self._broker = broker
        self._settings = settings
        self._away: str | None = None
        self._patient_until = -math.inf
        """After an outage of Postgres, live workers first get time to renew leases that ran out meanwhile."""
        self._patience = settings.lease_seconds / 3
        self._has_looked = False
        self._steps = Steps()
        self._unfinished: dict[int, tuple[float, float]] = {}
        """Jobs that could not be ended: when to try again, and after how many seconds of pause."""
        self._window = DoorbellWindow.smallest(settings.doorbell_window)
        self._looked_at = -math.inf
        self._cancels_at = -math.inf
        self._dropped_at = -math.inf
        self._views_at = -math.inf
        self._files_at = -math.inf
        self._counts_at = -math.inf
        self._outdated_at = -math.inf
        self._minute_at = -math.inf
        self._spends_at = -math.inf
        self._spends_again_at = -math.inf
        self._provider = ProviderRounds(db, broker, settings, self._steps)

    def run(self, stop: threading.Event) -> None:
        """Run rounds until ``stop``. An outage of Postgres or Redis is logged once, and the next round tries again."""
        logger.info("poller: keeps at most %s doorbells in Redis", self._settings.doorbell_window)
        while not stop.is_set():
            self._beat()
            pause = self._settings.poll_interval
            try:
                done = self.round()
            except Exception as error:  # noqa: BLE001 - without a poller no lease is taken back and no job ends
                self._say_away(error)
            else:
                self._say_back()
                _count(done)
                if self._window.hurry:
                    pause *= HURRY
                taken = done.taken_back
                if taken.total:
                    logger.info("took back what silent workers held: %s", taken.sentence)
                if done.abandoned:
                    jobs = "1 job was" if done.abandoned == 1 else f"{done.abandoned} jobs were"
                    logger.info("%s failed, because the producer is gone", jobs)
            stop.wait(pause)

    def round(self) -> Round:
        """Run one round. If a server is away, raises an outage (`is_outage`) or a publishing error.

        Whatever else goes wrong in a step is logged, and the other steps are done all the same.
        """
        return self._run_steps(self._round)

    def rescue(self) -> Round:
        """Run the part of a round that a local job needs to end although its workers die. A gateway calls this while no
        poller runs. It raises as :meth:`round` does."""
        return self._run_steps(self._rescue)

    def _run_steps(self, steps: Callable[[bool], Round]) -> Round:
        self._steps.begin()
        is_patient = True
        try:
            is_patient = self._is_patient()
            return steps(is_patient)
        except Exception as error:
            if is_outage(error) and not (self._has_looked and is_patient):
                # A step that breaks its connection in each round must not keep the patience for ever.
                self._patient_until = time.monotonic() + self._patience
            raise

    def _is_patient(self) -> bool:
        """Whether live workers may still need time to renew leases that ran out while Postgres was away.

        A poller that has just started did not see the outage, so the server says when it started itself.
        """
        self._has_looked = False
        with self._db.begin() as conn:
            up_seconds = float(conn.execute(_UP_SECONDS).scalar_one())
        self._has_looked = True
        return time.monotonic() < self._patient_until or up_seconds < self._patience

    def _round(self, is_patient: bool) -> Round:
        step = self._steps.run
        taken = None if is_patient else step("the taking back of leases", self._take_back)
        abandoned = step("the failing of abandoned jobs", self._fail_abandoned)
        step("the deletion of old embed requests", self._delete_old_requests)
        step("the cancels that were left behind", self._go_on_cancelling)
        step("the files that have expired", self._delete_expired_files)
        step("the collections that were dropped", self._clean_up_collections)
        step("the counts of old searches", self._tidy_counts)
        step("what replaced chunks were", self._tidy_outdated)
        step("the minute of the engines", self._write_minute)
        step("the dollars of keys", self._settle_spends)
        rung = step("the ringing of doorbells", self._ring) or 0
        rung += self._provider.round()
        # This comes last, because the anti-join of a large job takes time and doorbells should not wait for it.
        finished = self._finish_jobs()
        if self._steps.redis_error is not None:
            raise self._steps.redis_error
        return Round(taken or TakenBackCounts(), finished, len(abandoned or ()), rung)

    def _rescue(self, is_patient: bool) -> Round:
        step = self._steps.run
        taken = None if is_patient else step("the taking back of leases", self._take_back)
        rung = step("the ringing of doorbells", self._ring) or 0
        finished = self._finish_jobs()
        if self._steps.redis_error is not None:
            raise self._steps.redis_error
        return Round(taken or TakenBackCounts(), finished, 0, rung)

    def _take_back(self) -> TakenBackCounts:
        with self._db.begin() as conn:
            return deaths.take_back_expired(conn)

    def _fail_abandoned(self) -> list[int]:
        with self._db.begin() as conn:
            return recover.fail_abandoned(conn)

    def _delete_old_requests(self) -> None:
        with self._db.begin() as conn:
            recover.delete_old_requests(conn)

    def _go_on_cancelling(self) -> None:
        """Cancel one more slice of what a client left behind, in each round until nothing is left."""
        if time.monotonic() >= self._cancels_at:
            with self._db.begin() as conn:
                left = cancel.cancel_some_left_behind(conn)
                reports.delete_old(conn)
                worker_sockets.delete_old(conn)
            self._cancels_at = -math.inf if left else time.monotonic() + CANCELS_SECONDS

    def _delete_expired_files(self) -> None:
        """Delete a few files of the served Batch API that have expired, or whose upload ended halfway.

        What a batch's output file leaves behind is a dropped collection, which is cleaned up next.
        """
        if time.monotonic() < self._files_at:
            return
        with self._db.begin() as conn:
            deleted = served_files.delete_expired(conn) if served_files.are_kept(conn) else 0
        self._files_at = -math.inf if deleted else time.monotonic() + FILES_SECONDS

    def _clean_up_collections(self) -> None:
        """Delete a few slices of what dropped collections left behind, in each round until nothing is left.

        Once in a while make the views right that could not be made when they should have been.
        """
        if time.monotonic() < self._dropped_at:
            return
        with self._db.begin() as conn:
            if not collections.have_lives(conn):
                self._dropped_at = time.monotonic() + VIEWS_SECONDS
                return
            left = dropping.left_behind(conn, DROPPED_COLLECTIONS)
        for collection_id in left:
            self._beat()
            dropping.go_on(self._db, collection_id, slices=DROPPED_SLICES)
        self._dropped_at = -math.inf if left else time.monotonic() + CANCELS_SECONDS
        if time.monotonic() >= self._views_at:
            with self._db.begin() as conn:
                changed = names.refresh_views(conn)
            self._views_at = -math.inf if changed else time.monotonic() + VIEWS_SECONDS

    def _tidy_counts(self) -> None:
        """Once in a while make hours of the minutes in which searches were counted, and delete the oldest."""
        if time.monotonic() >= self._counts_at:
            with self._db.begin() as conn:
                searches.tidy(conn)
                minutes.delete_old(conn)
            self._counts_at = time.monotonic() + COUNTS_SECONDS

    def _tidy_outdated(self) -> None:
        """Once a minute delete what replaced chunks were that have their new vectors by now."""
        if time.monotonic() >= self._outdated_at:
            with self._db.begin() as conn:
                is_more = outdated.tidy(conn) >= outdated.SLICE
            self._outdated_at = -math.inf if is_more else time.monotonic() + OUTDATED_SECONDS

    def _write_minute(self) -> None:
        """Once a minute write down what the engines did, from which `status --plot` draws the padding."""
        if time.monotonic() >= self._minute_at:
            with self._db.begin() as conn:
                minutes.add(conn)
            self._minute_at = time.monotonic() + minutes.MINUTE_SECONDS

    def _settle_spends(self) -> None:
        """Let the bill replace what the keys of the gateway have reserved for their jobs."""
        now = time.monotonic()
        if now < self._spends_at:
            return
        again = now >= self._spends_again_at
        with self._db.begin() as conn:
            due = spends.due(conn, again=again) if spends.are_kept(conn) else []
        for spend_id in due:
            self._beat()
            with self._db.begin() as conn:
                spends.settle(conn, spend_id)
        self._spends_at = time.monotonic() + SPENDS_SECONDS
        if again:
            self._spends_again_at = time.monotonic() + SPENDS_AGAIN_SECONDS

    def _ring(self) -> int:
        settings = self._settings
        # Redis is read before the transaction: if Redis is away, this fails at once and no transaction waits for it.
        queued = self._broker.queued_doorbells()
        n_queued, looked_at = sum(queued.values()), time.monotonic()
        part = min(1.0, max(HURRY, (looked_at - self._looked_at) / settings.poll_interval))
        window = self._window.adapted(n_queued, part=part, most=settings.doorbell_window)
        with self._db.begin() as conn:
            rung = ring_due(
                conn,
                self._broker,
                queued=queued,
                window=window.size,
                repair_seconds=settings.doorbell_repair_seconds,
            )
        self._window, self._looked_at = window.filled(n_queued + rung), looked_at
        return rung

    def _finish_jobs(self) -> int:
        """End the jobs that may end. One that cannot be ended keeps no other waiting, and is tried more and more
        seldom, because its anti-join may be what takes long."""
        pausing = [job_id for job_id, (until, _) in self._unfinished.items() if until > time.monotonic()]
        waiting = self._steps.run("the search for jobs that may end", partial(self._jobs_that_may_end, pausing))
        if waiting is None:
            return 0
        for job_id in self._unfinished.keys() - {*pausing, *(job_id for job_id, _ in waiting)}:
            del self._unfinished[job_id]  # a worker ended it
            self._steps.forget(_end_of(job_id))
        finished = 0
        for job_id, space_id in waiting:
            self._beat()  # one large job may take as long as a round
            ended = self._steps.run(_end_of(job_id), partial(self._finish_job, job_id, space_id))
            if ended is None:
                pause = min(LONGEST_PAUSE_S, 2 * self._unfinished.get(job_id, (0.0, FIRST_PAUSE_S / 2))[1])
                self._unfinished[job_id] = (time.monotonic() + pause, pause)
            else:
                self._unfinished.pop(job_id, None)
                finished += ended
        return finished

    def _jobs_that_may_end(self, but: Sequence[int]) -> list[tuple[int, int]]:
        with self._db.begin() as conn:
            return recover.jobs_without_open_chunk_batches(conn, but=but)

    def _finish_job(self, job_id: int, space_id: int) -> bool:
        with self._db.begin() as conn:
            return finish_if_done(conn, job_id, registry.VectorTable(space_id), wait=False) is not None

    def _say_away(self, error: Exception) -> None:
        read_only = sqlstate(error) == READ_ONLY
        said = read_only_message(str(self._db.url)) if read_only else reason_of(error)
        if self._away != said:
            is_known = isinstance(error, (sa.exc.DBAPIError, *publish_errors()))
            logger.warning(
                "poller: %s; trying again every %s s", said, self._settings.poll_interval,
                exc_info=None if is_known else error,
            )  # fmt: skip
        self._away = said

    def _say_back(self) -> None:
        if self._away:
            logger.info("poller: back after %s", self._away)
        self._away = None


def _end_of(job_id: int) -> str:
    return f"the end of job {job_id}"


def _count(done: Round) -> None:
    COUNTS.add_all(((m.ROUNDS, 1), (m.RUNG, done.rung), (m.TAKEN_BACK, done.taken_back.total)))
    COUNTS.touch(m.LAST_ROUND)
