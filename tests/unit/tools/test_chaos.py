"""The pure parts of `make chaos`: the schedule, and the counting of what was embedded again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from tests.chaos.executions import Blow, count, read_passes
from tests.chaos.schedule import make_schedule
from tests.chaos.worker import vector_of

KINDS = ["a", "b", "c", "d", "e"]


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert make_schedule(7, 12, KINDS) == make_schedule(7, 12, list(reversed(KINDS)))
    assert make_schedule(7, 12, KINDS) != make_schedule(8, 12, KINDS)


def test_every_kind_strikes_before_one_strikes_again() -> None:
    kinds = [planned.kind for planned in make_schedule(3, 12, KINDS)]
    assert Counter(kinds[:5]) == Counter(kinds[5:10]) == Counter(KINDS)


def test_the_fake_vectors_have_length_one_and_are_the_texts_own() -> None:
    first, second = vector_of("one", 384), vector_of("two", 384)
    assert first.dtype == np.float32
    assert np.array_equal(first, vector_of("one", 384))
    assert abs(float(np.linalg.norm(first)) - 1) < 1e-6
    assert abs(float(first @ second)) < 0.5


def test_what_is_embedded_again_is_counted_and_put_down_to_its_fault(tmp_path: Path) -> None:
    """Worker 10 dies in its second TokenBatch and worker 11 does that one again; then 11 does one for no reason."""
    (tmp_path / "10.executions").write_text("begin 1.0 0 aa,bb\nend 2.0 0 aa,bb\nbegin 2.0 0 cc,dd\n")
    (tmp_path / "11.executions").write_text("begin 5.0 0 cc,dd\nend 6.0 0 cc,dd\nbegin 9.0 1 bb,ee\nend 9.5 1 bb,ee\n")
    blows = [
        Blow(1, 2.5, 2.5, frozenset({10})),
        Blow(2, 3.0, 4.0),  # a server's fault in between does not take the kill's place
        Blow(3, 20.0, 21.0),
    ]
    counted = count(read_passes(tmp_path), blows)
    assert (counted.executed, counted.distinct, counted.recomputed) == (8, 5, 3)
    assert counted.recomputed_by_fault == {1: 3}
    assert counted.duplicates == 1  # bb had been embedded; cc and dd died on the way
    assert count(read_passes(tmp_path), blows[2:]).recomputed_by_fault == {None: 3}
