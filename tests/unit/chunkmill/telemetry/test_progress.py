"""The bar of a wait: on a terminal it stays on its line, in a log it is a line now and then."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from chunkmill.domain.results import Job
from chunkmill.domain.states import JobState, Priority, Route
from chunkmill.telemetry import progress
from chunkmill.telemetry.progress import JobProgress, line

JOB = Job(
    id=12, state=JobState.RUNNING, collection="docs", model="m", space="a" * 64, route=Route.LOCAL,
    priority=Priority.NORMAL, idempotency_key=None, chunks=1_000, contents=1_000, cached=100, embedded=0,
    remaining=900, dead=0, truncated=0, tokens=0, engine_seconds=0.0, created_at=datetime(2026, 1, 1, tzinfo=UTC),
    finished_at=None, error=None,
)  # fmt: skip
DONE = replace(JOB, state=JobState.COMPLETED, embedded=900, remaining=0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, which stands still until a test sets it."""
    now = [1_000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_on_a_terminal_one_line_is_drawn_again_and_a_note_stays_above_it(at: list[float]) -> None:
    screen = Terminal()
    bar = JobProgress(12, stream=screen)
    bar.look(JOB)
    at[0] += 10
    bar.look(replace(JOB, embedded=300, remaining=600))
    at[0] += 10
    bar.look(replace(JOB, embedded=600, remaining=300))
    bar.note("no worker\x1b[2J")
    at[0] += 1
    bar.look(DONE)
    bar.close()
    drawn = screen.getvalue()
    # A worker begins with the longest texts, so after 300 nobody can tell how long the rest takes.
    assert "400 of 1,000 texts, 30/s\r" in drawn
    assert "700 of 1,000 texts, 30/s, 10 s left" in drawn
    assert drawn.endswith("━ 1,000 of 1,000 texts, completed after 21 s\n")
    assert "\r\x1b[2Kjob 12: no worker�[2J\njob 12 ━" in drawn
    assert drawn.count("\n") == 2


def test_in_a_log_there_is_a_line_every_five_seconds_and_the_end(at: list[float]) -> None:
    log = io.StringIO()
    bar = JobProgress(12, stream=log)
    for second in range(12):
        at[0] = 1_000.0 + second
        bar.look(replace(JOB, embedded=10 * second, remaining=900 - 10 * second))
    bar.look(DONE)
    bar.close()
    assert re.findall(r"^job 12: ([\d,]+) of", log.getvalue(), re.MULTILINE) == ["150", "200", "1,000"]
    assert "\r" not in log.getvalue()


def test_what_is_drawn_often_is_drawn_five_times_a_second_at_most(at: list[float]) -> None:
    screen = Terminal()
    bar = JobProgress(12, stream=screen)
    for hundredth in range(100):
        at[0] = 1_000.0 + hundredth / 100
        bar.look(JOB)
    assert screen.getvalue().count("job 12") == 5


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_a_line_is_never_wider_than_the_terminal(columns: int) -> None:
    words = "1,000 of 1,000 texts, 52/s, 11 s left"
    for share in (-1.0, 0.0, 0.5, 1.0, 7.0):
        assert len(line("job 12", share, words, columns)) < columns


def test_a_stream_that_is_closed_does_not_end_the_wait() -> None:
    gone = io.StringIO()
    gone.close()
    bar = JobProgress(12, stream=gone)
    bar.look(DONE)
    bar.note("anything")
    bar.close()


def test_in_a_notebook_one_display_is_updated_and_what_is_said_is_no_markup(
    at: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: list[str] = []

    def display(cell: Any, *, display_id: bool) -> SimpleNamespace:
        assert display_id
        cells.append(cell._repr_html_())
        return SimpleNamespace(update=lambda cell: cells.append(cell._repr_html_()))

    there = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", there)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    bar = JobProgress(12)
    bar.look(JOB)
    bar.note("<b>no worker</b>")
    bar.look(JOB)  # a moment later: it is not drawn
    at[0] += 1
    bar.look(DONE)
    bar.close()
    assert len(cells) == 3
    assert "&lt;b&gt;no worker&lt;/b&gt;" in cells[1]
    assert 'value="0.1000"' in cells[1]
    assert 'value="1.0000"' in cells[2]
    assert "no worker" not in cells[2]
    assert JobProgress(12, stream=io.StringIO())._is_notebook is False
