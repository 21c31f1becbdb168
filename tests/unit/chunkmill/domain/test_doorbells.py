"""Which job's turn it is, and how many bells Redis holds. Pure, with a clock of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.doorbells import HURRY, SMALLEST_WINDOW, DoorbellWindow, share_out

MOST = 256
INTERVAL = 0.5
ROUND = 0.01
"""What a round itself takes."""


def test_two_jobs_share_evenly() -> None:
    assert share_out({1: 0, 2: 0}, 8) == {1: 4, 2: 4}


def test_who_came_first_and_filled_the_window_waits_until_the_other_has_caught_up() -> None:
    assert share_out({1: 8, 2: 0}, 4) == {2: 4}
    assert share_out({1: 8, 2: 0}, 12) == {2: 10, 1: 2}


def test_of_equals_the_first_named_is_served_first() -> None:
    """The ledger names first who has waited longest, whatever its number."""
    assert share_out({7: 0, 3: 0, 5: 0}, 1) == {7: 1}
    assert share_out({7: 1, 3: 0, 5: 0}, 2) == {3: 1, 5: 1}
    assert share_out({7: 2, 3: 2, 5: 2}, 5) == {7: 2, 3: 2, 5: 1}


def test_nobody_and_nothing_to_share() -> None:
    assert share_out({}, 8) == {}
    assert share_out({1: 0}, 0) == {}


@given(st.dictionaries(st.integers(), st.integers(0, 20), max_size=12), st.integers(0, 60))
def test_all_the_room_goes_and_nobody_gets_ahead_of_another(waiting: dict[int, int], room: int) -> None:
    shares = share_out(waiting, room)
    assert sum(shares.values()) == (room if waiting else 0)
    after = {job: bells + shares.get(job, 0) for job, bells in waiting.items()}
    for job in shares:
        assert after[job] <= min(after.values()) + 1


@dataclass(frozen=True)
class Step:
    at: float
    size: int
    pause: float
    idle: float
    """Seconds until the next round in which Redis held nothing."""


def simulate(rate: float, seconds: float, window: DoorbellWindow | None = None) -> tuple[list[Step], DoorbellWindow]:
    """Workers that take ``rate`` ChunkBatches a second from an endless job, and one poller."""
    window = window or DoorbellWindow.smallest(MOST)
    steps: list[Step] = []
    queue, now, looked_at = float(window.held), 0.0, -math.inf
    while now < seconds:
        part = min(1.0, max(HURRY, (now - looked_at) / INTERVAL))
        window, looked_at = window.adapted(math.floor(queue), part=part, most=MOST), now
        queue = max(queue, window.size)
        window = window.filled(math.floor(queue))
        pause = INTERVAL * (HURRY if window.hurry else 1) + ROUND
        steps.append(Step(now, window.size, pause, max(0.0, pause - queue / rate)))
        queue, now = max(0.0, queue - rate * pause), now + pause
    return steps, window


@given(st.floats(0.01, 2_000))
def test_workers_never_wait_for_the_poller_once_it_knows_their_pace(rate: float) -> None:
    steps, _ = simulate(rate, 20)
    assert all(step.idle == 0 for step in steps if step.at > 2)
    assert all(SMALLEST_WINDOW <= step.size <= MOST for step in steps)


def test_five_hundred_a_second_are_fed() -> None:
    """A window of the smallest size would leave them idle for 97 % of the time."""
    steps, _ = simulate(500, 10)
    assert sum(step.idle for step in steps) < 1
    assert all(step.idle == 0 for step in steps if step.at > 2)
    assert steps[-1].size == MOST


@pytest.mark.parametrize("rate", [0.1, 1, 7])
def test_slow_workers_find_the_smallest_window(rate: float) -> None:
    steps, _ = simulate(rate, 60)
    assert {step.size for step in steps} == {SMALLEST_WINDOW}
    # One look soon after the job began, and from then on one in an interval.
    assert [step.pause for step in steps if step.pause < INTERVAL] == [steps[0].pause]


def test_after_fast_work_slow_work_brings_the_window_down_again() -> None:
    _, fast = simulate(500, 10)
    steps, slow = simulate(2, 200, fast)
    assert (fast.size, slow.size) == (MOST, SMALLEST_WINDOW)
    sizes = [step.size for step in steps]
    assert sizes == sorted(sizes, reverse=True)


def test_an_end_of_work_says_nothing_about_the_workers() -> None:
    window = DoorbellWindow.smallest(MOST).filled(3)  # all there was
    assert window.adapted(0, part=1, most=MOST).size == SMALLEST_WINDOW


@given(st.lists(st.tuples(st.integers(0, 600), st.floats(HURRY, 1), st.integers(0, 300))), st.integers(1, 300))
def test_the_window_keeps_its_limits_whatever_a_round_finds(rounds: list[tuple[int, float, int]], most: int) -> None:
    window = DoorbellWindow.smallest(most)
    for left, part, more in rounds:
        window = window.adapted(left, part=part, most=most).filled(left + more)
        assert min(SMALLEST_WINDOW, most) <= window.size <= most
