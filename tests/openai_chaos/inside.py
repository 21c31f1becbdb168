"""One seed in one process: the same misbehaviours, and a worker that dies between any two things that it does.

It needs seconds where real processes need a minute, so that many seeds can be run. Three seeds of four have a monthly
budget, most of them too small for the work of one month: a new month begins whenever all work is held.
"""

from __future__ import annotations

import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.prices import OPENAI_PRICES
from chunkmill.domain.states import Route
from chunkmill.errors import BudgetExceeded
from chunkmill.settings import Settings
from chunkmill_workers.provider import follow
from chunkmill_workers.provider.context import ProviderContext
from tests.openai_chaos.odd import ODDITIES, Person, choose, start
from tests.openai_chaos.points import LOOKS_FOR_RESULTS
from tests.openai_chaos.run import Report
from tests.openai_server import OpenAIServer
from tests.openai_server.tokens import counter
from tests.support.corridor import MODEL
from tests.support.corridor_scene import Scene, scene

CALLS = ("upload", "create", "retrieve", "find", "cancel", "delete_file", "files_named")
TURNS = 400
BUDGETS = (None, Decimal("0.4"), Decimal("0.7"), Decimal("1.2"))
"""Of what the contents of a seed cost once. None is no limit."""


class Died(BaseException):
    """As a SIGKILL: nothing that comes after it runs."""


class Mortal:
    """Makes a worker die, by chance, before or after a transaction or a call of the provider."""

    def __init__(self, context: ProviderContext, rng: random.Random, deaths: Counter[str], kills: int) -> None:
        self._rng = rng
        self._deaths = deaths
        self._kills = kills
        self._wrap(context, "transact")
        for name in CALLS:
            self._wrap(context.provider, name)

    def _wrap(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **more: Any) -> Any:
            what = given[1] if name == "transact" else name
            self._maybe_die(f"{what}:before")
            result = real(*given, **more)
            self._maybe_die(f"{what}:after")
            return result

        setattr(owner, name, call)

    def _maybe_die(self, point: str) -> None:
        if self._deaths.total() < self._kills and self._rng.random() < 0.04:
            self._deaths[point] += 1
            raise Died


def report_inside(settings: Settings, server: OpenAIServer, seed: int, *, kills: int, contents: int) -> Report:
    """``settings`` name an empty, migrated database and an empty Redis."""
    named: Any = SimpleNamespace(node=SimpleNamespace(name=f"seed {seed}"))
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "LOOKS_FOR_RESULTS", LOOKS_FOR_RESULTS)
        report = Report(seed, contents, odd=choose(random.Random(seed)))
        budget = _budget(seed, contents)
        limits = {"openai_batch_max_inputs": max(2, contents // 3), "openai_monthly_budget_usd": budget}
        with scene(settings, server, named, **limits) as stage:
            try:
                run_inside(stage, report, kills=kills)
            except AssertionError as wrong:
                report.problems.append(str(wrong))
    report.seconds = time.monotonic() - began
    report.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return report


def run_inside(stage: Scene, report: Report, *, kills: int = 6) -> None:
    """Two jobs that share a third of their texts. Fills the report; AssertionError says what is wrong."""
    seed, contents = report.seed, report.contents
    rng = random.Random(seed)
    corridor, server, names = stage.corridor, stage.server, choose(rng)
    server.forget()
    start(server, names, rng)
    half = contents * 2 // 3
    first, second = stage.texts(half), stage.texts(half, first=contents - half)
    jobs = [stage.enqueue(first), stage.enqueue(second, collection="other")]
    month = Month(stage)
    Mortal(corridor.context, rng, report.kills, kills)
    person = Person(corridor.client, corridor.db, server, names, every=4)
    told = f"seed {seed}: {', '.join(names)}"
    for _ in range(TURNS):
        stage.hurry()
        with corridor.db.begin() as conn:
            conn.execute(sa.text("UPDATE provider_lanes SET paused_until = NULL"))
            expired = "SET lease_until = now() - interval '1 s' WHERE lease_until > now()"
            conn.execute(sa.text(f"UPDATE provider_batches {expired}"))
        try:
            corridor.turn()
        except Died:
            continue
        finally:
            month.check(told)
        try:
            person.look(jobs)
            month.look()
        except BudgetExceeded:
            month.begin()
        if all(corridor.client.job(job.id).state == "completed" for job in jobs) and not corridor.rows(
            "SELECT FROM provider_batches WHERE state <> 'closed'"
        ):
            break
    else:
        states = [str(corridor.client.job(job.id).state) for job in jobs]
        raise AssertionError(f"{told}: not done: {states}, {corridor.rows(_OPEN)}, {corridor.client.lanes()}")
    corridor.check_vectors(first)
    corridor.check_vectors(second, "other")
    bill = stage.bill(first | second)
    assert bill.keys() == (first | second).keys(), told
    [charged] = corridor.rows(f"SELECT {_SUMS} FROM charges")
    rows = corridor.rows(f"SELECT kind, {_SUMS} FROM adjustments GROUP BY kind")
    report.unconfirmed = {row["kind"]: row["n"] for row in rows}
    report.booked = {row["kind"]: row["tokens"] for row in rows}
    report.months = month.begun
    report.provider_batches = corridor.one("SELECT count(*) FROM provider_batches")
    more = {"n": sum(row["n"] for row in rows), "tokens": sum(row["tokens"] for row in rows)}
    billed = {"n": sum(c["inputs"] for c in stage.charges()), "tokens": sum(c["tokens"] for c in stage.charges())}
    report.billed, report.charged = billed["n"], charged["n"]
    for what, right in billed.items():
        books = f"{told}: {what}: {charged[what]} charged, {more[what]} lost or maybe charged, {right} billed; {rows}"
        if any(ODDITIES[name].books for name in names):
            assert charged[what] <= right <= charged[what] + more[what], books
        else:
            assert charged[what] == right and not more[what], books
    assert corridor.rows("SELECT * FROM provider_inputs") == [], told
    assert corridor.rows("SELECT * FROM chunk_batches WHERE state = 'running'") == [], told
    files = server.state()["files"]
    # Of result files that no answer named nobody can know.
    may_be_left = any(ODDITIES[name].books for name in names)
    left = [file["filename"] for file in files if file["purpose"] == "batch" or not may_be_left]
    assert not left, f"{told}: {left}"


class Month:
    """The month of a budget: what the server has charged in it, and a new one when no work may go on."""

    def __init__(self, stage: Scene) -> None:
        self._stage = stage
        self._before = Decimal(0)
        self._held = 0
        self.begun = 0

    def check(self, told: str) -> None:
        """AssertionError if the server has charged more in this month than the budget allows."""
        limit = self._stage.corridor.settings.openai_monthly_budget_usd
        if limit is not None:
            usd = self._billed() - self._before
            assert usd <= limit, f"{told}: {usd} dollars billed in month {self.begun} under a budget of {limit}"

    def look(self) -> None:
        """Begin a new month once the lane has been held for some turns."""
        lane = next(lane for lane in self._stage.corridor.client.lanes() if lane.route is Route.OPENAI)
        self._held = self._held + 1 if lane.state == "held" else 0
        if self._held > 8:
            self.begin()

    def begin(self) -> None:
        """What is booked moves into the past with the ProviderBatches that it is for. What is in flight stays so."""
        self._held = 0
        self.begun += 1
        self._before = self._billed()
        with self._stage.corridor.db.begin() as conn:
            conn.execute(sa.text("UPDATE charges SET day = day - 31"))
            conn.execute(sa.text("UPDATE adjustments SET day = day - 31"))
            conn.execute(sa.text("UPDATE provider_batches SET created_at = created_at - interval '31 days'"))

    def _billed(self) -> Decimal:
        price = OPENAI_PRICES[MODEL][0]
        routes = {"batch": Route.OPENAI, "sync": Route.OPENAI_SYNC}
        return sum(
            (price.of(charge["tokens"], routes[charge["kind"]]) for charge in self._stage.charges()), start=Decimal(0)
        )


def _budget(seed: int, contents: int) -> Decimal | None:
    share = BUDGETS[seed % len(BUDGETS)]
    if share is None:
        return None
    count = counter(fast=False)
    tokens = sum(count(f"seed {seed} text {i}") for i in range(contents))
    return share * OPENAI_PRICES[MODEL][0].of(tokens, Route.OPENAI)


_SUMS = "coalesce(sum(contents), 0)::int AS n, coalesce(sum(tokens), 0)::int AS tokens"
_OPEN = """
    SELECT id, state, provider_status, failures, looks, refusals, error
    FROM provider_batches
    WHERE state <> 'closed'
"""
