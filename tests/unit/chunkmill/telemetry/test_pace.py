"""How fast counts grow, and how long the rest takes."""

from __future__ import annotations

import pytest

from chunkmill.telemetry.pace import ENOUGH, ENOUGH_SECONDS, Pace


def test_rates_are_those_of_the_window() -> None:
    pace = Pace(30)
    assert pace.add(100, 1_000, 50_000) == (0, 0)
    assert pace.add(110, 1_100, 50_500) == (10, 50)
    assert pace.add(120, 1_100, 52_500) == (5, 125)
    # The first reading is older than the window now.
    assert pace.add(135, 1_350, 52_500) == (10, 80)
    assert pace.add(500, 9_999, 99_999) == (0, 0)


def test_the_time_that_is_left_is_told_once_a_chunk_batch_is_embedded() -> None:
    pace = Pace(30)
    assert pace.seconds_left(10_000) is None
    pace.add(0, 7_000)
    # The longest texts come first, so these are slower than those that follow.
    pace.add(10, 7_000 + ENOUGH - 1)
    assert pace.seconds_left(10_000) is None
    pace.add(20, 7_000 + 2 * ENOUGH)
    assert pace.seconds_left(10_000) == pytest.approx(10_000 / (2 * ENOUGH / 20))
    # It stays told, though the window holds less, until nothing goes on.
    pace.add(45, 7_100 + 2 * ENOUGH)
    assert pace.seconds_left(10_000) == pytest.approx(10_000 / (100 / 25))
    pace.add(75, 7_100 + 2 * ENOUGH)
    assert pace.seconds_left(10_000) is None


def test_a_slow_job_is_told_how_long_it_takes_after_a_minute() -> None:
    pace = Pace(30)
    for second in range(int(ENOUGH_SECONDS)):
        pace.add(second, second)
        assert pace.seconds_left(100) is None
    pace.add(ENOUGH_SECONDS, ENOUGH_SECONDS)
    assert pace.seconds_left(100) == pytest.approx(100)
