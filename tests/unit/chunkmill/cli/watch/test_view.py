"""What `status --watch` makes of a view."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from rich.console import Console

from chunkmill.cli.watch.view import draw, fields, rates
from chunkmill.db.connect import Connections
from chunkmill.domain.lanes import Lane
from chunkmill.domain.states import JobState, Route
from chunkmill.monitor.reports import Report
from chunkmill.monitor.snapshot import Fault, Money, OpenJob, Snapshot, Totals, lane_states
from chunkmill.monitor.watcher import Eta, JobPaces, View

AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
WORKER = Report(
    "h:1", "local", "gpu-1b2f@h", "GPU-1b2f", AT, 60.0, 1200, 60_000, 75_000, 45.0, 2, 0.93, 8 << 30, 80 << 30
)
NONE = dict.fromkeys((Route.LOCAL, Route.OPENAI, Route.OPENAI_SYNC), 0)
SNAPSHOT = Snapshot(
    at=AT,
    running=NONE | {Route.LOCAL: 2},
    oldest={Route.LOCAL: 75.0},
    lanes=[
        Lane(Route.OPENAI, stopped_at=AT, stop_code="insufficient_quota", stop_reason="no money left"),
        Lane(Route.OPENAI_SYNC),
    ],
    workers=[WORKER],
    connections=Connections(workers=2, provider_workers=0, pollers=4),
    money=Money(Decimal("1.25"), Decimal(80), Decimal(5), Decimal(100)),
    recent={"died": 1, "failed": 0, "discarded": 0},
    faults=[Fault(AT, "died", "h:9: ChunkBatch 4 of job 3: ended by SIGSEGV\x1b[2J")],
)
TOTALS = Totals(
    ready=NONE | {Route.LOCAL: 40},
    discarded=NONE,
    jobs={JobState.RUNNING: 1},
    open_jobs=[OpenJob(3, "docs", "m", JobState.RUNNING, 3000, 2500, 1000)],
    dead_chunks=7,
    chunks=3000,
    asked=2400,
    remaining=1000,
)
VIEW = View(SNAPSHOT, TOTALS, {"gpu": 12, "openai": 0}, None, None, {3: Eta(20.0, 50.0)}, 0.013, 0.4, 100.0, 95.0)


def drawn(view: View | None, at: float = 100.5, looking_since: float = 100.4) -> str:
    console = Console(file=io.StringIO(), width=160, highlight=False, markup=False)
    console.print(draw(view, at, looking_since))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def document(view: View, at: float = 100.5) -> dict[str, Any]:
    return json.loads(json.dumps(fields(view, at), default=str))  # type: ignore[no-any-return]


def test_a_terminal_shows_every_number() -> None:
    shown = drawn(VIEW)
    for word in (
        "local", "running", "40", "1:15", "stopped", "insufficient_quota",  # lanes
        "texts/s 20", "tokens/s 1,000", "padding 20.0 %", "cache hits 20.0 %", "dead chunks 7",  # rates
        "gpu-1b2f@h", "75.0 %", "93.0 %", "8.0 of 80 GiB",  # the worker
        "1,000", "2,500", "50 s",  # the job
        "1.25 USD", "80.00 USD", "about 5.00 USD", "of 100 USD, 85%",  # money
        "in the last ten minutes: 1 died", "ended by SIGSEGV",
    ):  # fmt: skip
        assert word in shown, word
    assert "\x1b[2J" not in shown  # an error's text steers no terminal


def test_json_says_the_same() -> None:
    told = document(VIEW)
    assert [(lane["lane"], lane["state"], lane["ready"]) for lane in told["lanes"]] == [
        ("local", "running", 40),
        ("openai", "stopped", 0),
        ("openai-sync", "idle", 0),
    ]
    assert told["rates"] == {"contents_per_s": 20.0, "tokens_per_s": 1000.0, "padding": pytest.approx(0.2)}
    assert told["workers"][0]["busy"] == 0.75
    assert told["open_jobs"][0] == told["open_jobs"][0] | {"id": 3, "remaining": 1000, "eta_s": 50.0}
    assert (told["cache_hit_rate"], told["dead_chunks"]) == (pytest.approx(0.2), 7)
    assert (told["age_s"], told["counted_s_ago"]) == (0.5, 5.5)
    assert told["money_usd"]["month"] == "80"
    # One poller has several connections, so their number is not called that of pollers; `status --json` has this name.
    assert (told["poller_connections"], "pollers" in told) == (4, False)


def test_a_server_that_is_away_is_said_and_the_rest_goes_on() -> None:
    view = replace(VIEW, postgres_error="cannot connect to Postgres at /run", redis_error="cannot use Redis: gone")
    shown = drawn(view, at=130.0)
    assert "cannot connect to Postgres at /run" in shown
    assert "cannot use Redis: gone" in shown
    assert "30 s old" in shown
    assert "gpu-1b2f@h" in shown  # what was known
    assert document(view)["postgres_error"] == "cannot connect to Postgres at /run"


def test_before_anything_was_seen() -> None:
    assert "looking for 7.0 s" in drawn(None, at=107.0, looking_since=100.0)
    blind = View(None, None, None, "away", None, {}, 0.0, 0.0, None, None)
    assert "away" in drawn(blind)
    assert document(blind) == document(blind) | {"lanes": None, "workers": None, "dead_chunks": None}


def test_a_look_that_hangs_is_said() -> None:
    assert "no answer for 20 s" in drawn(VIEW, at=120.0, looking_since=100.0)


def test_a_silent_worker_counts_for_nothing() -> None:
    silent = replace(WORKER, silent_seconds=45.0)
    assert rates([silent]).tokens_per_s == 0
    assert rates([silent, WORKER]).tokens_per_s == 1000
    snapshot = replace(SNAPSHOT, workers=[silent])
    assert lane_states(snapshot)[Route.LOCAL] == "idle"
    told = document(replace(VIEW, snapshot=snapshot))["workers"][0]
    assert (told["silent"], told["tokens_per_s"], told["busy"]) == (True, 0, 0)
    shown = drawn(replace(VIEW, snapshot=snapshot))
    assert "silent for 45 s" in shown
    assert "padding -" in shown


def test_a_worker_of_both_queues_serves_all_lanes() -> None:
    snapshot = replace(
        SNAPSHOT, workers=[replace(WORKER, kind="both")], lanes=[Lane(Route.OPENAI), Lane(Route.OPENAI_SYNC)]
    )
    assert set(lane_states(snapshot).values()) == {"running"}


def test_an_eta_needs_two_looks_with_work_in_between() -> None:
    def job(remaining: int) -> OpenJob:
        return replace(TOTALS.open_jobs[0], remaining=remaining)

    pace = JobPaces()
    assert pace.add(0.0, [job(1000)]) == {}
    assert pace.add(10.0, [job(1000)]) == {}
    # A worker begins with the longest texts, so after 200 nobody can tell how long the rest takes.
    assert pace.add(20.0, [job(800)]) == {3: Eta(10.0, None)}
    assert pace.add(60.0, [job(790)]) == {3: Eta(3.5, pytest.approx(225.7, abs=0.1))}
    # Five minutes on, only what was seen within them counts.
    assert pace.add(400.0, [job(790)]) == {}
    assert pace.add(410.0, [job(690)]) == {3: Eta(10.0, 69.0)}
    assert pace.add(420.0, []) == {}
