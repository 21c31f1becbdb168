"""The plan of a re-embedding, what is stored of it, and the steps of its ramp."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from chunkmill import Gates, InvalidInput, Priority, Route
from chunkmill.domain.gates import GateResult
from chunkmill.domain.reembedding import (
    Coverage,
    Plan,
    RampStep,
    Report,
    ServedBy,
    next_share,
    previous_share,
    step_of_ramp,
)

HOUR = timedelta(hours=1)
PLAN = Plan(ramp=(10, 50, 100), step_hours=1)
OLD = ServedBy("old", searches=400, errors=4, p50=0.01, p95=0.1)
NEW = ServedBy("new", searches=400, errors=4, p50=0.01, p95=0.1)


def test_a_plan_comes_back_from_json_as_it_was_and_fields_of_a_newer_release_are_left_out() -> None:
    plan = Plan(
        gates=Gates(missing=3, ndcg_loss=None, price=Decimal("0.020")),
        ramp=(5, 100),
        step_hours=2,
        keep_days=3.5,
        priority=Priority.HIGH,
        route=Route.LOCAL,
        on_long="split",
    )
    stored = json.loads(json.dumps(plan.as_json()))
    assert Plan.from_json(stored) == plan
    assert Plan.from_json(stored | {"colour": "red", "gates": stored["gates"] | {"beauty": 1}}) == plan
    assert Plan.from_json({}) == Plan()


def test_a_report_comes_back_from_json_as_it_was() -> None:
    now = datetime(2026, 11, 29, tzinfo=UTC)
    gate = GateResult("coverage", True, 0.0, 0.0, "All of them.")
    judgement = {"passed": True, "gates": [{"name": "coverage", "passed": True, "measured": 0.0, "limit": 0.0,
                                            "sentence": "All of them.", "newer": 1}]}  # fmt: skip
    report = Report(Coverage(7, 6, 1, 1, 0, at=now), judgement, now)
    assert Report.from_json(json.loads(json.dumps(report.as_json()))) == report
    assert report.gates == (gate,)
    assert Report.from_json({}) == Report()


@pytest.mark.parametrize("ramp", [(10, 10), (50, 10), (0, 100), (10, 101), (True,), (10.0,)])
def test_a_ramp_that_does_not_grow_to_100_at_most_is_refused(ramp: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="ramp is"):
        Plan(ramp=ramp)


@pytest.mark.parametrize("name", ["step_hours", "keep_days"])
@pytest.mark.parametrize("value", [-1, 1e9, float("nan"), True, "1"])
def test_times_are_numbers_in_bounds(name: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is"):
        Plan(**{name: value})  # type: ignore[arg-type]


def test_the_steps_before_and_after_a_share() -> None:
    assert [next_share(PLAN.ramp, share) for share in (0, 10, 40, 50, 100)] == [10, 50, 50, 100, None]
    assert [previous_share(PLAN.ramp, share) for share in (100, 50, 10, 0)] == [50, 10, 0, 0]


def test_a_step_lasts_its_time() -> None:
    assert step_of_ramp(PLAN, 10, lasted=HOUR - timedelta(seconds=1), old=OLD, new=NEW) == RampStep(10)
    assert step_of_ramp(PLAN, 10, lasted=HOUR, old=OLD, new=NEW) == RampStep(50)
    assert step_of_ramp(PLAN, 10, lasted=HOUR, old=OLD, new=NEW, is_held=True) == RampStep(10)


def test_the_flip_follows_the_last_step_if_that_is_100() -> None:
    assert step_of_ramp(PLAN, 100, lasted=HOUR, old=None, new=NEW) == RampStep(100, flips=True)
    assert step_of_ramp(Plan(ramp=()), 0, lasted=timedelta.max, old=None, new=None) == RampStep(0, flips=True)
    stays = replace(PLAN, ramp=(50,))
    assert step_of_ramp(stays, 50, lasted=20 * HOUR, old=OLD, new=NEW) == RampStep(50)


@pytest.mark.parametrize(
    ("changed", "is_back"),
    [
        ({"errors": 8}, False),
        ({"errors": 9}, True),
        ({"p95": 0.125}, False),
        ({"p95": 0.126}, True),
        ({"errors": 99, "searches": 99}, False),
    ],
)
def test_it_steps_back_when_errors_or_the_slowest_cross_their_gate(changed: dict[str, float], is_back: bool) -> None:
    step = step_of_ramp(PLAN, 50, lasted=timedelta(0), old=OLD, new=replace(NEW, **changed))  # type: ignore[arg-type]
    assert (step.share, step.problem is not None) == ((10, True) if is_back else (50, False))


def test_a_space_that_answered_few_searches_sets_no_measure() -> None:
    few = replace(OLD, searches=99, errors=99, p95=0.0001)
    assert step_of_ramp(PLAN, 50, lasted=timedelta(0), old=few, new=NEW).problem is None
    assert step_of_ramp(PLAN, 50, lasted=timedelta(0), old=few, new=replace(NEW, errors=5)).share == 10


def test_without_a_gate_for_p95_slow_searches_do_not_step_back() -> None:
    free = replace(PLAN, gates=Gates(p95_ratio=None))
    assert step_of_ramp(free, 50, lasted=timedelta(0), old=OLD, new=replace(NEW, p95=9.0)).problem is None
