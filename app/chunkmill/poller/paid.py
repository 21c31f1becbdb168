"""The poller's part in the paid routes: it rings for steps that are due, opens ProviderBatches, and settles."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from functools import partial

import sqlalchemy as sa

from chunkmill.broker import STEP_PRIORITY, SYNC_BELLS, Broker
from chunkmill.domain.doorbells import SMALLEST_WINDOW
from chunkmill.domain.states import Route
from chunkmill.ledger.jobs.routing import reroute
from chunkmill.ledger.provider import provider_batches, provider_endings, provider_lanes, provider_work
from chunkmill.ledger.provider.provider_room import room
from chunkmill.ledger.work.doorbells import ring_due
from chunkmill.openai.catalogue import read_twins
from chunkmill.poller.budget_alert import watch_budget
from chunkmill.poller.steps import Steps
from chunkmill.settings import Settings
from chunkmill.spaces import registry

logger = logging.getLogger(__name__)

STEPS_IN_REDIS = 64
"""The most doorbells of steps in Redis. More would only wait there; the next rounds ring for the rest."""
SETTLED_AT_A_TIME = 100
SELDOM_SECONDS = 5.0
"""Time between two checks of routes and of ChunkBatches to settle. The steps themselves settle most of them."""
BUDGET_SECONDS = 60.0
"""Time between two checks of the budget."""


class ProviderRounds:
    """One for each poller. Any number may run: rows are taken with SKIP LOCKED, and a space has one open gathering."""

    def __init__(self, db: sa.Engine, broker: Broker, settings: Settings, steps: Steps) -> None:
        self._db = db
        self._broker = broker
        self._settings = settings
        self._steps = steps
        self._seldom_at = -math.inf
        self._budget_at = -math.inf

    def round(self) -> int:
        """Ring for steps and plain requests that are due; returns how many doorbells were rung."""
        step, now = self._steps.run, time.monotonic()
        if now >= self._seldom_at:
            step("the reading of twins", partial(read_twins, self._settings))
            self._settle()
            step("the routing of jobs", self._reroute)
            step("the abandoning of ProviderBatches", self._abandon)
            step("the giving back of what a stopped lane cannot send", self._give_back)
            self._seldom_at = now + SELDOM_SECONDS
        if now >= self._budget_at:
            step("the budget's warnings", partial(watch_budget, self._db, self._settings))
            self._budget_at = now + BUDGET_SECONDS
        self._open_gatherings()
        if self._steps.redis_error is not None:
            return 0  # each further try would wait for Redis too
        return (step("the bells of ProviderBatches", self._ring_steps) or 0) + (
            step("the bells of plain requests", self._ring_requests) or 0
        )

    def _reroute(self) -> None:
        with self._db.begin() as conn:
            reroute(conn, self._settings)

    def _abandon(self) -> None:
        with self._db.begin() as conn:
            provider_batches.abandon_unwanted(conn)

    def _give_back(self) -> None:
        """What was not sent is given back while the lane is stopped: other lanes and jobs may have the same texts."""
        with self._db.begin() as conn:
            lane = provider_lanes.lane(conn, Route.OPENAI)
            if lane.is_stopped:
                why = f"given back, because {lane.route} stopped ({lane.stop_code}) before it was sent"
                provider_endings.give_back_unsent(conn, why)

    def _open_gatherings(self) -> None:
        for space_id in self._steps.run("the search for spaces to gather", self._spaces_to_gather) or ():
            self._steps.run(f"the gathering of space {space_id}", partial(self._open_gathering, space_id))

    def _spaces_to_gather(self) -> list[int]:
        settings = self._settings
        with self._db.begin() as conn:
            return list(
                provider_batches.spaces_to_gather(
                    conn, wait_seconds=settings.openai_gather_seconds, full=settings.openai_batch_max_inputs
                )
            )

    def _open_gathering(self, space_id: int) -> None:
        with self._db.begin() as conn:
            reason = room(conn, self._settings, registry.get(conn, space_id)).reason
            if provider_lanes.hold(conn, Route.OPENAI, reason) and reason:
                logger.info("lane openai waits: %s", reason)
            if reason is None:
                provider_batches.open_gathering(conn, space_id)

    def _ring_steps(self) -> int:
        with self._db.begin() as conn:
            if not provider_batches.any_open(conn):
                return 0
        room_left = STEPS_IN_REDIS - self._broker.queued_doorbells(SYNC_BELLS)[STEP_PRIORITY]
        if room_left <= 0:
            return 0
        with self._db.begin() as conn:
            due = provider_batches.take_due(
                conn, repair_seconds=self._settings.doorbell_repair_seconds, limit=room_left
            )
            self._broker.ring_steps(due)  # before the marks are committed, because ringing twice is better than never
        return len(due)

    def _ring_requests(self) -> int:
        with self._db.begin() as conn:
            if not provider_work.any_plain(conn) or not provider_lanes.lane(conn, Route.OPENAI_SYNC).is_healthy:
                return 0
            return ring_due(
                conn,
                self._broker,
                queued=self._broker.queued_doorbells(SYNC_BELLS),
                window=max(SMALLEST_WINDOW, 2 * self._settings.openai_parallel_requests),
                repair_seconds=self._settings.doorbell_repair_seconds,
                bells=SYNC_BELLS,
            )

    def _settle(self) -> None:
        """Settle what a step could not settle, because it or the last one that shared the contents was killed."""
        by_space: dict[int, list[int]] = defaultdict(list)
        for space_id, chunk_batch_id in self._steps.run("the search for what to settle", self._ready_to_settle) or ():
            by_space[space_id].append(chunk_batch_id)
        for space_id, chunk_batch_ids in by_space.items():
            self._steps.run(f"the settling of space {space_id}", partial(self._settle_space, space_id, chunk_batch_ids))

    def _ready_to_settle(self) -> list[tuple[int, int]]:
        with self._db.begin() as conn:
            return list(provider_work.ready_to_settle(conn, limit=SETTLED_AT_A_TIME))

    def _settle_space(self, space_id: int, chunk_batch_ids: list[int]) -> None:
        with self._db.begin() as conn:
            provider_work.settle(conn, registry.get(conn, space_id), chunk_batch_ids)
