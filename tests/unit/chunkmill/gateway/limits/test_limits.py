"""Buckets and the room: what they give, and when they say to come again."""

from __future__ import annotations

import pytest

from chunkmill.gateway.limits.buckets import Bucket
from chunkmill.gateway.limits.room import MOST_SECONDS, WaitingRoom


def test_a_bucket_gives_a_minutes_worth_at_once_and_then_its_rate() -> None:
    bucket = Bucket(60)
    assert [bucket.take(1, 100.0) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1, 100.0) == pytest.approx(1.0)
    assert bucket.remaining(100.0) == 0
    assert bucket.reset(100.0) == pytest.approx(60.0)
    assert bucket.take(1, 101.0) == 0.0
    assert bucket.remaining(1000.0) == 60, "what nobody used for long is no more than a minute's worth"


def test_what_is_refused_takes_nothing_and_says_when_it_would_be_given() -> None:
    bucket = Bucket(600)
    assert bucket.take(500, 0.0) == 0.0
    wait = bucket.take(200, 0.0)
    assert wait == pytest.approx(10.0)
    assert bucket.take(200, wait - 0.1) > 0
    assert bucket.take(200, wait) == 0.0


def test_more_than_a_bucket_is_given_when_it_is_full_and_is_then_owed() -> None:
    bucket = Bucket(60)
    assert bucket.take(180, 0.0) == 0.0
    assert bucket.take(1, 120.0) > 0
    assert bucket.take(1, 121.0) == 0.0


def test_a_correction_gives_back_or_takes_more_and_never_overfills() -> None:
    bucket = Bucket(60)
    assert bucket.take(50, 0.0) == 0.0
    bucket.correct(-40, 0.0)
    assert bucket.remaining(0.0) == 50
    bucket.correct(-40, 0.0)
    assert bucket.remaining(0.0) == 60
    bucket.correct(90, 0.0)
    assert bucket.take(1, 0.0) == pytest.approx(31.0)


def test_a_quarter_of_the_room_is_kept_for_small_requests() -> None:
    room = WaitingRoom(100, 1000)
    assert room.take(75, 10, is_small=False) is not None
    assert room.take(9, 10, is_small=False) is None
    assert room.take(8, 10, is_small=True) is not None
    assert room.take(8, 990, is_small=True) is None, "tokens count too"
    assert (room.texts, room.tokens) == (83, 20)


def test_a_request_larger_than_the_room_is_let_in_when_the_room_is_empty() -> None:
    room = WaitingRoom(10, 100)
    hold = room.take(20, 1000, is_small=False)
    assert hold is not None
    assert room.take(1, 1, is_small=True) is None
    room.leave(hold, 1.0, answered=True)
    assert room.take(1, 1, is_small=True) is not None


def test_a_hold_that_grows_finds_the_same_bounds_and_one_that_shrinks_always_fits() -> None:
    room = WaitingRoom(100, 1000)
    first, second = room.take(1, 700, is_small=False), room.take(1, 100, is_small=True)
    assert first is not None
    assert second is not None
    assert not room.resize(second, 1, 400, is_small=True)
    assert not room.resize(second, 20, 100, is_small=False), "a small request is none any more"
    assert room.resize(second, 1, 50, is_small=True)
    assert room.tokens == 750
    assert room.resize(first, 1, 699, is_small=False)
    for hold in (first, second):
        room.leave(hold, 0.0, answered=False)
        room.leave(hold, 0.0, answered=False)
    assert (room.texts, room.tokens) == (0, 0)


def test_whoever_finds_no_room_is_told_how_long_it_takes_at_the_measured_rate() -> None:
    room = WaitingRoom(1000, 100_000)
    assert room.retry_after(0.0) == 1.0
    waiting = room.take(1, 3000, is_small=False)
    assert waiting is not None
    assert room.retry_after(0.0) == MOST_SECONDS, "nothing was answered yet"
    for second in range(5):
        answered = room.take(1, 1000, is_small=True)
        assert answered is not None
        room.leave(answered, float(second), answered=True)
    gone = room.take(1, 50_000, is_small=True)
    assert gone is not None
    room.leave(gone, 4.0, answered=False)
    assert room.retry_after(5.0) == pytest.approx(3.0), "1,000 tokens a second, and 3,000 wait"
    assert room.retry_after(100.0) == MOST_SECONDS
