"""What the benchmark of re-embeddings makes of the notes of those who waited. No time is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chunkmill.cli.start.children import Child
from chunkmill_workers.benchmarks import reembed
from chunkmill_workers.benchmarks.reembed import Note, Role, Turn

FLIP = Turn("flip", 10.0, 12.0, asked=[10.5, 11.0], locked=[10.6, 11.3], let_go=[10.61, 11.34])
BACK = Turn("rollback", 20.0, 20.5, asked=[20.1], locked=[20.1], let_go=[20.15])


def rows(*noted: tuple[str, Note]) -> dict[str, dict[str, Any]]:
    return {row.name: row.as_json() for row in reembed._waits(7, [FLIP, BACK], noted)}


def test_a_window_waits_for_a_flip_that_has_its_lock_and_for_one_that_asks_for_it() -> None:
    """Who comes while a flip stands in the queue stands behind it."""
    name = "a window of an enqueue waits for a flip, at most"
    behind = rows(("enqueue", Note("lock", 11.1, 11.35)), ("enqueue", Note("lock", 15.0, 19.0)))[name]
    assert behind["median"] == pytest.approx(240)
    assert (behind["target"], behind["met"]) == (100, False)
    assert behind["longest_at_other_times_ms"] == pytest.approx(4_000)
    short = rows(("enqueue", Note("lock", 10.6, 10.7)), ("delete", Note("lock", 11.0, 11.34)))[name]
    assert short["median"] == pytest.approx(10)
    assert short["met"]


def test_a_search_waits_only_for_a_flip_that_has_its_lock() -> None:
    row = rows(("search", Note("search", 10.9, 11.32)), ("search", Note("search", 1.0, 1.5)))[
        "a search can have waited for a flip, at most"
    ]
    assert row["median"] == pytest.approx(20)
    assert (row["searches"], row["longest_that_met_a_flip_ms"]) == (2, pytest.approx(420))
    assert row["median_at_other_times_ms"] == pytest.approx(500)


def test_the_longest_hold_and_the_slowest_rollback_are_held_against_what_is_promised() -> None:
    measured = {row.name: row.as_json() for row in reembed._turns(7, [FLIP, BACK])}
    held = measured["flip, the lock is held, at most"]
    assert (held["median"], held["met"]) == (pytest.approx(40), True)
    call = measured["rollback, the whole call, at most"]
    assert (call["median"], call["met"], call["tries"]) == (pytest.approx(0.5), True, [1])
    assert measured["flip, the whole call, at most"]["tries"] == [2]


def test_the_last_line_of_a_process_that_was_killed_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "work-0.jsonl"
    file.write_text(json.dumps(["lock", 1.0, 2.0]) + '\n["lock", 3.')
    child = Child("nobody", ["true"], env={}, log=tmp_path / "log")
    child.stop()
    assert list(Role("work", child, file).notes()) == [Note("lock", 1.0, 2.0)]
