"""What a worker says of itself: its last minute, what it holds, and whether it gets anywhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import Counts
from chunkmill.telemetry.metrics import Role
from chunkmill_workers.host.gpu import ClaimedDevice
from chunkmill_workers.process import reporting
from chunkmill_workers.process.reporting import NO_GPU, LastMinute, Reporter, Worker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is set by hand."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_report_counts_the_last_minute_and_not_what_was_before_it(clock: SimpleNamespace) -> None:
    counts = Counts()
    minute = LastMinute(counts)
    reports = []
    for second, contents in ((10, 1), (20, 2), (50, 4), (80, 8), (100, 16), (400, 32)):
        clock.now = 1000.0 + second
        counts.add(m.CONTENTS, contents)
        seconds, (counted, *_) = minute.take()
        reports.append((seconds, counted))
    # Each reaches back to the latest look that is a minute old, or to the start.
    assert reports == [(10, 1), (20, 3), (50, 7), (60, 12), (80, 28), (300, 32)]


def context(held: int) -> SimpleNamespace:
    return SimpleNamespace(db=None, name="host:1", leases=SimpleNamespace(n_held=held))


@pytest.mark.parametrize(
    ("held", "device", "kind", "total"),
    [((3,), "cpu", "local", 3), ((4,), None, "provider", 4), ((3, 4), "cpu", "both", 7)],
)
def test_a_worker_reports_what_it_holds_of_all_its_queues(
    held: tuple[int, ...], device: str | None, kind: str, total: int
) -> None:
    claimed = None if device is None else ClaimedDevice(device)
    worker = Reporter.of([context(n) for n in held], "cpu-1@here", claimed)._worker
    assert (worker.kind, worker.device, worker.held()) == (kind, device, total)


@pytest.mark.parametrize(
    ("kind", "held", "progress"),
    [("local", 0, True), ("both", 0, True), ("local", 1, False), ("both", 1, False), ("provider", 0, False)],
)
def test_only_an_idle_local_worker_counts_as_getting_somewhere_by_itself(kind: str, held: int, progress: bool) -> None:
    """One that holds work must write something: else the alert for a worker that stands still could never ring."""
    counts = Counts()
    worker = Worker(kind, "cpu-1@here", "cpu", lambda: held)  # type: ignore[arg-type]
    Reporter(context(held), worker, counts=counts)._set_gauges(NO_GPU, held)
    assert bool(counts.series(m.LAST_PROGRESS, frozenset({Role.WORKER}))) is progress
