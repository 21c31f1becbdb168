"""The two paid lanes in the ledger: each pauses, stops and paces its own requests, and only tightens its limits."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from chunkmill.domain.states import Route
from chunkmill.ledger.provider import provider_lanes

BATCH, PLAIN = Route.OPENAI, Route.OPENAI_SYNC


@pytest.fixture
def both(db: sa.Engine) -> sa.Engine:
    """Both lanes have been used, so that each has its row."""
    with db.begin() as conn:
        for route in (BATCH, PLAIN):
            provider_lanes.hold(conn, route, "a budget")
    return db


def seconds_left(conn: sa.Connection, route: Route) -> float | None:
    """Of the pause. ``now()`` stands still in a transaction, so the number is exact."""
    left = conn.execute(
        sa.text("SELECT extract(epoch FROM paused_until - now()) FROM provider_lanes WHERE route = :route"),
        {"route": route},
    ).scalar_one_or_none()
    return None if left is None else float(left)


def test_a_shorter_pause_does_not_end_a_longer_one(both: sa.Engine) -> None:
    with both.begin() as conn:
        provider_lanes.pause(conn, BATCH, seconds=60, reason="a limit for a minute")
        provider_lanes.pause(conn, BATCH, seconds=1, reason="a limit for a second")
        assert seconds_left(conn, BATCH) == 60
        assert provider_lanes.lane(conn, BATCH).pause_reason == "a limit for a minute"
        provider_lanes.pause(conn, BATCH, seconds=61, reason="a longer limit")
        assert seconds_left(conn, BATCH) == 61
        assert provider_lanes.lane(conn, BATCH).pause_reason == "a longer limit"


def test_a_pause_that_is_over_does_not_keep_a_short_one_out(both: sa.Engine) -> None:
    with both.begin() as conn:
        conn.execute(sa.text("UPDATE provider_lanes SET paused_until = now() - interval '1 hour'"))
        assert provider_lanes.lane(conn, BATCH).paused_until is None
        provider_lanes.pause(conn, BATCH, seconds=1, reason="a limit")
        assert seconds_left(conn, BATCH) == 1


def test_what_befalls_one_lane_leaves_the_other_as_it_is(both: sa.Engine) -> None:
    with both.begin() as conn:
        plain = provider_lanes.lane(conn, PLAIN)
        provider_lanes.pause(conn, BATCH, seconds=60, reason="a limit")
        assert provider_lanes.stop(conn, BATCH, code="insufficient_quota", reason="no credit is left")
        provider_lanes.learn_max_inputs(conn, BATCH, 100)
        assert provider_lanes.hold(conn, BATCH, None)
        assert provider_lanes.lane(conn, PLAIN) == plain

        assert provider_lanes.stop(conn, PLAIN, code="invalid_api_key", reason="the key is refused")
        assert not provider_lanes.stop(conn, PLAIN, code="other", reason="a second reason")
        batch = provider_lanes.lane(conn, BATCH)
        assert provider_lanes.resume(conn, PLAIN)
        assert provider_lanes.lane(conn, PLAIN) == plain
        assert provider_lanes.lane(conn, BATCH) == batch
        assert (batch.stop_code, batch.pause_reason, batch.max_inputs) == ("insufficient_quota", "a limit", 100)


def test_the_fewest_inputs_that_were_found_to_be_too_many_stay_the_limit(both: sa.Engine) -> None:
    with both.begin() as conn:
        learned = []
        for inputs in (500, 250, 400, 0):
            provider_lanes.learn_max_inputs(conn, BATCH, inputs)
            learned.append(provider_lanes.lane(conn, BATCH).max_inputs)
        assert learned == [500, 250, 250, 1]


# The pace


def waits(conn: sa.Connection, n: int, *, route: Route = PLAIN, tokens: int = 100, **quota: int) -> list[float]:
    """What each of ``n`` workers that ask at one moment is told to wait."""
    limits: dict[str, Any] = {"requests_per_minute": 0, "tokens_per_minute": 0, **quota}
    return [provider_lanes.take_turn(conn, route, tokens=tokens, **limits) for _ in range(n)]


def test_requests_per_minute_are_a_pace_with_a_short_burst(both: sa.Engine) -> None:
    with both.begin() as conn:  # one each four seconds; ten seconds' worth go at once
        assert waits(conn, 5, requests_per_minute=15) == pytest.approx([0, 0, 0, 2, 6])


def test_tokens_per_minute_are_a_pace_with_a_short_burst(both: sa.Engine) -> None:
    with both.begin() as conn:  # a hundred tokens are ten seconds of six hundred a minute
        assert waits(conn, 4, tokens_per_minute=600) == pytest.approx([0, 0, 10, 20])
        assert waits(conn, 2, tokens=50, tokens_per_minute=600) == pytest.approx([30, 35])


def test_the_scarcer_of_both_quotas_sets_the_pace(both: sa.Engine) -> None:
    with both.begin() as conn:
        assert waits(conn, 3, requests_per_minute=60, tokens_per_minute=300) == pytest.approx([0, 10, 30])
    with both.begin() as conn:
        conn.execute(sa.text("UPDATE provider_lanes SET next_request_at = NULL, next_token_at = NULL"))
        assert waits(conn, 3, requests_per_minute=2, tokens_per_minute=60_000) == pytest.approx([0, 20, 50])


@pytest.mark.parametrize("quota", [{"requests_per_minute": 3}, {"tokens_per_minute": 300}])
def test_turns_that_nobody_took_are_not_saved_up(both: sa.Engine, quota: dict[str, int]) -> None:
    with both.begin() as conn:
        conn.execute(
            sa.text(
                "UPDATE provider_lanes SET next_request_at = now() - interval '1 hour', "
                "next_token_at = now() - interval '1 hour'"
            )
        )
        assert waits(conn, 3, **quota) == pytest.approx([0, 10, 30])


def test_each_lane_has_a_pace_of_its_own_and_none_without_a_quota(both: sa.Engine) -> None:
    with both.begin() as conn:
        assert waits(conn, 3, requests_per_minute=1) == pytest.approx([0, 50, 110])
        assert waits(conn, 2, route=BATCH, requests_per_minute=1) == pytest.approx([0, 50])
        assert waits(conn, 3) == [0, 0, 0]
