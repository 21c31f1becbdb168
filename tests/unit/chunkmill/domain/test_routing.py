from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from chunkmill.domain.arguments import as_deadline
from chunkmill.domain.providers import OPENAI_MODELS, ProviderModel
from chunkmill.domain.routing import Offer, choose, require_served, serving
from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput, UnknownRoute
from chunkmill.models import DEFAULT_SPEC

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SMALL = OPENAI_MODELS["text-embedding-3-small"]
REMOTE: SpaceSpec = SMALL.space(OnLong.TRUNCATE, None)
LOCAL, BATCH, SYNC, AUTO = Route.LOCAL, Route.OPENAI, Route.OPENAI_SYNC, Route.AUTO

batch = Offer(BATCH, Decimal("0.01"))
sync = Offer(SYNC, Decimal("0.02"))
local = Offer(LOCAL, None)


@pytest.mark.parametrize(
    ("spec", "model", "batches", "lanes"),
    [
        (DEFAULT_SPEC, None, True, (LOCAL,)),
        (REMOTE, SMALL, True, (BATCH, SYNC)),
        (REMOTE, SMALL, False, (SYNC,)),
        (REMOTE, None, True, ()),
        (DEFAULT_SPEC, ProviderModel("m", 384, same_as="all-MiniLM-L6-v2"), True, (LOCAL, BATCH, SYNC)),
    ],
)
def test_which_lanes_serve_a_space(
    spec: SpaceSpec, model: ProviderModel | None, batches: bool, lanes: tuple[Route, ...]
) -> None:
    assert serving(spec, model, batches=batches) == lanes


@pytest.mark.parametrize(
    ("asked", "lanes", "spec", "said"),
    [
        (LOCAL, (BATCH, SYNC), REMOTE, "only the provider serves model 'text-embedding-3-small'. Use 'openai'"),
        (
            BATCH,
            (LOCAL,),
            DEFAULT_SPEC,
            "only local workers serve this space of model.*Use 'local', 'auto'.*same_as in OPENAI_MODELS",
        ),
        (SYNC, (LOCAL,), DEFAULT_SPEC, "only local workers serve this space"),
        (BATCH, (SYNC,), REMOTE, "no Batch API .OPENAI_BATCHES is false.. Use 'openai-sync'"),
        (AUTO, (), REMOTE, "no route serves model 'text-embedding-3-small' here. Describe it in OPENAI_MODELS"),
    ],
)
def test_a_lane_that_does_not_serve_the_space_is_refused(
    asked: Route, lanes: tuple[Route, ...], spec: SpaceSpec, said: str
) -> None:
    with pytest.raises(UnknownRoute, match=said):
        require_served(asked, lanes, spec)


@pytest.mark.parametrize("asked", [LOCAL, BATCH, AUTO])
def test_a_lane_that_serves_it_is_not(asked: Route) -> None:
    require_served(asked, (LOCAL, BATCH, SYNC), DEFAULT_SPEC)


def test_by_name_it_is_what_was_asked_for_whatever_it_costs() -> None:
    dear = Offer(SYNC, Decimal(9), stopped="stopped")
    assert choose(SYNC, [batch, dear], now=NOW, deadline=NOW).route is SYNC


@pytest.mark.parametrize(
    ("offers", "hours", "route", "said"),
    [
        ([local], None, LOCAL, "the only route that serves the space"),
        ([batch, sync], None, BATCH, "openai at 0.010 USD per million tokens, openai-sync at 0.020"),
        ([batch, sync], 25, BATCH, "the cheapest"),
        ([batch, sync], 24, BATCH, "the cheapest"),  # it takes 24 hours at most
        ([batch, sync], 23.999, SYNC, "the only one left.*openai is out: it takes up to 24 h"),
        ([batch, sync], 23, SYNC, "the only one left.*openai is out: it takes up to 24 h, and the deadline is in 23 h"),
        ([replace(batch, stopped="stopped (insufficient_quota)"), sync], None, SYNC, "openai is out: stopped .insuff"),
        ([local, batch, sync], None, LOCAL, "local workers count as free while .*local without a known price"),
        # What has no price may cost anything.
        ([Offer(LOCAL, Decimal(9)), Offer(BATCH), Offer(SYNC)], None, LOCAL, "the cheapest .local at 9.00 USD"),
        ([Offer(BATCH), sync], None, SYNC, "the cheapest .openai-sync at 0.020 .*openai without a known price"),
        ([Offer(BATCH), Offer(SYNC)], None, BATCH, "no route that is left has a known price"),
        ([Offer(LOCAL, Decimal(9), idle=True), Offer(BATCH)], 30, BATCH, "the only one left"),
        ([Offer(LOCAL, Decimal("0.5")), batch, sync], None, BATCH, "local at 0.50 USD"),
        ([Offer(LOCAL, Decimal("0.001")), batch, sync], None, LOCAL, "the cheapest .local at 0.0010 USD"),
        # Workers come and go: only a deadline makes their absence count.
        ([Offer(LOCAL, None, idle=True), batch, sync], None, LOCAL, "local workers count as free"),
        ([Offer(LOCAL, None, idle=True), batch, sync], 30, BATCH, "local is out: none of its workers is connected"),
        # Nothing is left: a late lane is better than one that nobody serves, and that better than a stopped one.
        ([batch, replace(sync, stopped="stopped")], 1, BATCH, "it may be late, and no better route is left"),
        ([replace(local, idle=True), replace(batch, stopped="x"), replace(sync, stopped="x")], 1, LOCAL, "waits for"),
        ([replace(batch, stopped="x"), replace(sync, stopped="y")], None, BATCH, "every route is stopped.*: x;.*: y"),
    ],
)
def test_what_auto_chooses_and_says(offers: list[Offer], hours: float | None, route: Route, said: str) -> None:
    deadline = None if hours is None else NOW + timedelta(hours=hours)
    chosen = choose(AUTO, offers, now=NOW, deadline=deadline)
    assert chosen.route is route
    assert re.search(said, chosen.because), chosen.because


@pytest.mark.parametrize(
    ("offers", "hours", "route", "instead_of"),
    [
        ([batch, sync], None, BATCH, None),
        ([replace(batch, stopped="x"), sync], None, SYNC, BATCH),
        ([replace(batch, stopped="x"), sync], 23, SYNC, None),  # it would be too late
        ([batch, replace(sync, stopped="x")], None, BATCH, None),  # it would cost more
        ([Offer(LOCAL, Decimal(9)), replace(batch, stopped="x"), replace(sync, stopped="y")], None, LOCAL, BATCH),
        ([replace(batch, stopped="x"), replace(sync, stopped="y")], None, BATCH, None),
    ],
)
def test_a_choice_says_which_better_route_is_stopped(
    offers: list[Offer], hours: float | None, route: Route, instead_of: Route | None
) -> None:
    deadline = None if hours is None else NOW + timedelta(hours=hours)
    chosen = choose(AUTO, offers, now=NOW, deadline=deadline)
    assert (chosen.route, chosen.instead_of) == (route, instead_of)


@pytest.mark.parametrize(
    ("given", "deadline"),
    [
        (60, NOW + timedelta(seconds=60)),
        (0.5, NOW + timedelta(seconds=0.5)),
        (timedelta(hours=2), NOW + timedelta(hours=2)),
        (datetime(2026, 11, 22, tzinfo=UTC), datetime(2026, 11, 22, tzinfo=UTC)),
    ],
)
def test_deadlines(given: object, deadline: datetime) -> None:
    assert as_deadline(given, NOW) == deadline


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (datetime(2026, 11, 22), "without a time zone"),
        (datetime(2026, 11, 20, tzinfo=UTC), "is in the past"),
        (timedelta(0), "is in the past"),
        (-5, "is in the past"),
        (float("nan"), "must be a moment that a datetime can hold"),
        (1e300, "must be a moment that a datetime can hold"),
        ("tomorrow", "must be a datetime with a time zone, a timedelta, or a number of seconds"),
        (True, "must be a datetime"),
    ],
)
def test_deadlines_that_are_refused(given: object, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        as_deadline(given, NOW)
