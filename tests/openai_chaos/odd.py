"""What the provider of a seed does wrong, and what a person does about what cannot end by itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from chunkmill.client import Client
from tests.openai_server import OpenAIServer

EVERY = ("files.*", "batches.retrieve", "batches.list", "batches.cancel")
"""Endpoints that may fail in any way. A create that fails is chosen by itself."""

LONGEST_WAIT_S = 2.0
"""What waits longer is due then. A file without some answers is read again for eight minutes before it is believed."""


@dataclass(frozen=True)
class Oddity:
    """One misbehaviour. ``books``: it loses what was charged, so something must be booked as lost or maybe charged."""

    start: Callable[[OpenAIServer, random.Random], object]
    books: bool = False


def _misbehave(
    kind: str, *, times: tuple[int, int] = (1, 3), where: dict[str, Any] | None = None, **options: Any
) -> Any:
    def start(server: OpenAIServer, rng: random.Random) -> object:
        return server.misbehave(kind, times=rng.randint(*times), after=rng.randint(0, 1), where=where, **options)

    return start


def _lines(kind: str, **options: Any) -> Any:
    return lambda server, rng: server.misbehave(
        kind, times=rng.randint(1, 2), after=rng.randint(0, 1), lines=rng.randint(1, 3), **options
    )


def _always(*kinds: str, **options: Any) -> Any:
    return lambda server, _: [server.misbehave(kind, times=None, **options) for kind in kinds]


RETRIEVE, CREATE = {"endpoint": "batches.retrieve"}, {"endpoint": "batches.create"}
ODDITIES: dict[str, Oddity] = {
    # Answers and connections
    "outage": Oddity(
        lambda server, rng: [
            server.misbehave(
                "http_error",
                times=rng.randint(1, 4),
                status=rng.choice((500, 502, 503)),
                html=True,
                where={"endpoint": endpoint},
            )
            for endpoint in EVERY
        ]
    ),
    "cut": Oddity(_misbehave("cut", where={"endpoint": "files.*"}, applied=True)),
    "create without an answer": Oddity(_misbehave("cut", where=CREATE, applied=True)),
    "create that was not applied": Oddity(_misbehave("http_error", where=CREATE, status=503)),
    "rate limit": Oddity(_misbehave("rate_limited", retry_after_ms=200)),
    "not found for a while": Oddity(_misbehave("http_error", times=(1, 4), where=RETRIEVE, status=404)),
    "vanished": Oddity(
        lambda server, rng: server.misbehave(
            "http_error", times=24, after=rng.randint(0, 3), where=RETRIEVE, status=404
        ),
        books=True,
    ),
    # Endings
    "late file ids": Oddity(_misbehave("late_file_ids", times=(1, 5), where=RETRIEVE)),
    "failed after running": Oddity(_misbehave("failed_after_running", times=(1, 1)), books=True),
    "failed after running, no usage": Oddity(_misbehave("failed_after_running", times=(1, 1), usage=False), books=True),
    "never ends": Oddity(_misbehave("stuck", times=(1, 1)), books=True),
    "expires": Oddity(_misbehave("expire", fraction=0.4)),
    "cancelled by somebody": Oddity(_misbehave("cancelled_by_other", fraction=0.4)),
    "all failed": Oddity(_misbehave("all_failed", times=(1, 1))),
    "validation": Oddity(_misbehave("fail_validation", code="who_knows")),
    "cannot find file": Oddity(_misbehave("cannot_find_file")),
    "forgets everything": Oddity(lambda server, _: server.control(counts_batches=True), books=True),
    # Limits
    "small quota": Oddity(lambda server, rng: server.control(enqueued_tokens=rng.choice((600, 900)))),
    "small quota at the create": Oddity(
        lambda server, _: server.control(enqueued_tokens=900, enqueued_overflow="create")
    ),
    "small files": Oddity(lambda server, _: server.control(max_file_bytes=5_000, too_large_status=413)),
    "no expiry of files": Oddity(lambda server, _: server.control(file_expiry=False)),
    # Result files
    "missing lines": Oddity(_lines("missing_line"), books=True),
    "null custom ids": Oddity(_lines("null_custom_id"), books=True),
    "garbage": Oddity(_lines("garbage_line"), books=True),
    "doubled lines": Oddity(_lines("duplicate_line")),
    "unknown lines": Oddity(_lines("unknown_line")),
    "failed lines": Oddity(_lines("line_failures", status=500)),
    "limited lines": Oddity(_lines("line_failures", status=429, code="rate_limit_exceeded")),
    "output vanished": Oddity(_misbehave("output_vanished", times=(1, 1)), books=True),
    "downloads that end early": Oddity(_misbehave("truncated")),
    "downloads that are cut": Oddity(_misbehave("cut_body")),
    # Dialects
    "shapes": Oddity(_always("odd_status", "iso_dates", "empty_file_ids", "metadata_dropped")),
    "no counts": Oddity(_always("null_counts", "null_usage")),
    "no expiry of batches": Oddity(_always("no_expiry")),
    "bodies": Oddity(_always("string_body", "shuffled_data", "other_encoding", lines=9)),
    "files that stay": Oddity(_misbehave("delete_fails", times=(1, 2))),
}


def choose(rng: random.Random) -> list[str]:
    return rng.sample(sorted(ODDITIES), rng.randint(2, 4))


def start(server: OpenAIServer, names: list[str], rng: random.Random) -> None:
    for name in names:
        ODDITIES[name].start(server, rng)


class Person:
    """Does what a person would: retries what was given up, resumes a lane. And lets time pass for what waits long."""

    def __init__(
        self, client: Client, db: sa.Engine, server: OpenAIServer, names: list[str], *, every: int = 20
    ) -> None:
        self._client = client
        self._db = db
        self._server = server
        self._names = names
        self._turn = 0
        self._every = every
        self._forgot = False
        self.retried = 0

    def look(self, jobs: list[Any]) -> None:
        self._turn += 1
        if self._turn % self._every:
            return
        self._shorten_waits()
        if "never ends" in self._names:
            self._let_time_pass()
        if "forgets everything" in self._names and not self._forgot and self._server.state()["batches"]:
            self._forgot = True
            self._server.forget()
        for job in jobs:
            if self._client.job(job.id).state == "failed":
                self._client.retry(job.id)
                self.retried += 1
        lane = self._client.lanes()[0]
        if lane.is_stopped:
            self._client.resume_lane("openai")

    def _shorten_waits(self) -> None:
        with self._db.begin() as conn:
            conn.execute(
                sa.text("""
                    UPDATE provider_batches
                    SET not_before = now() + make_interval(secs => :longest)
                    WHERE id IN (
                        SELECT id
                        FROM provider_batches
                        WHERE not_before > now() + make_interval(secs => :longest)
                        FOR UPDATE SKIP LOCKED
                    )
                """),
                {"longest": LONGEST_WAIT_S},
            )
            conn.execute(
                sa.text("""
                    UPDATE provider_lanes
                    SET paused_until = now() + make_interval(secs => :longest)
                    WHERE paused_until > now() + make_interval(secs => :longest)
                """),
                {"longest": LONGEST_WAIT_S},
            )

    def _let_time_pass(self) -> None:
        """A day and a half for those that the provider does not end."""
        with self._db.begin() as conn:
            conn.execute(
                sa.text("""
                    UPDATE provider_batches
                    SET submitted_at = submitted_at - interval '26 hours',
                        cancel_requested_at = cancel_requested_at - interval '7 hours'
                    WHERE state = 'submitted' AND provider_status IN ('in_progress', 'cancelling')
                """)
            )
