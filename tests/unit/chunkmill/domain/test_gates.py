"""A gate lets pass what is as good, stops what is worse, and says when it cannot tell."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from chunkmill.domain.gates import (
    CollectionMeasurement,
    GateResult,
    Gates,
    all_passed,
    check,
    loss_for,
    p95,
    queries_for,
)
from chunkmill.domain.ranking import paired_bootstrap
from chunkmill.errors import InvalidInput

EQUAL = tuple(np.random.default_rng(0).uniform(0, 1, 500))
GOOD = CollectionMeasurement(
    chunks=1_000, missing=0, canary=True, recall=0.99, recall_queries=200, old_ndcg=EQUAL, new_ndcg=EQUAL,
    old_p95=0.010, new_p95=0.011, timed=100, price=Decimal("0.02"),
)  # fmt: skip


def by_name(gates: Gates, measured: CollectionMeasurement) -> dict[str, GateResult]:
    return {result.name: result for result in check(gates, measured)}


def test_a_space_that_is_as_good_passes_all_gates() -> None:
    results = check(Gates(price=Decimal("0.02")), GOOD)
    assert [result.name for result in results] == ["coverage", "canary", "recall", "ndcg", "p95", "price"]
    assert all_passed(results)


@pytest.mark.parametrize(
    ("name", "bad", "measured", "limit"),
    [
        ("coverage", replace(GOOD, missing=1), 1.0, 0.0),
        ("canary", replace(GOOD, canary=False), 0.0, 1.0),
        ("recall", replace(GOOD, recall=0.9799), 0.9799, 0.98),
        ("ndcg", replace(GOOD, new_ndcg=tuple(x - 0.0101 for x in EQUAL)), -0.0101, -0.01),
        ("p95", replace(GOOD, new_p95=0.01251), 1.251, 1.25),
        ("price", replace(GOOD, price=Decimal("0.021")), 0.021, 0.02),
    ],
)
def test_each_gate_stops_what_is_beyond_its_limit_and_no_other_gate_does(
    name: str, bad: CollectionMeasurement, measured: float, limit: float
) -> None:
    results = by_name(Gates(price=Decimal("0.02")), bad)
    assert [result.name for result in results.values() if not result.passed] == [name]
    assert results[name].measured == pytest.approx(measured)
    assert results[name].limit == pytest.approx(limit)


def test_what_is_exactly_at_its_limit_passes() -> None:
    gates = Gates(missing=3, price=Decimal("0.02"), recall=0.99)
    assert all_passed(check(gates, replace(GOOD, missing=3, dead=3, new_p95=0.0125)))


def test_what_could_not_be_measured_is_not_passed_and_the_sentence_says_why() -> None:
    nothing = CollectionMeasurement(
        chunks=10, missing=0, unmeasured={"recall": "No index.", "ndcg": "No query.", "p95": "No time."}
    )
    results = by_name(Gates(price=Decimal(1)), nothing)
    assert [result.name for result in results.values() if result.passed] == ["coverage", "canary"]
    assert {name: results[name].sentence for name in ("recall", "ndcg", "p95", "price")} == {
        "recall": "No index.", "ndcg": "No query.", "p95": "No time.", "price": "It was not measured.",
    }  # fmt: skip
    assert all(results[name].measured is None for name in ("recall", "ndcg", "p95", "price"))


def test_a_gate_that_is_left_out_says_nothing() -> None:
    left = Gates(canary=False, recall=None, ndcg_loss=None, p95_ratio=None)
    assert [result.name for result in check(left, CollectionMeasurement(chunks=1, missing=0))] == ["coverage"]


def test_a_provider_has_no_golden_texts_and_passes() -> None:
    assert by_name(Gates(), replace(GOOD, canary=None))["canary"].passed


def test_too_few_queries_judge_nothing_and_the_gate_says_how_many_are_needed() -> None:
    few = replace(GOOD, old_ndcg=EQUAL[:199], new_ndcg=EQUAL[:199])
    result = by_name(Gates(), few)["ndcg"]
    assert not result.passed
    assert result.measured is None
    assert result.sentence.startswith("199 golden queries are too few to judge by; 200 are needed.")
    assert by_name(Gates(queries=199), few)["ndcg"].passed


def test_the_quality_is_judged_by_the_lower_bound_and_not_by_the_mean() -> None:
    random = np.random.default_rng(1)
    old = random.uniform(0, 1, 500)
    noisy = old + random.normal(0, 0.3, 500)
    noisy += old.mean() - noisy.mean()
    result = by_name(Gates(), replace(GOOD, old_ndcg=tuple(old), new_ndcg=tuple(noisy)))["ndcg"]
    assert not result.passed
    assert result.measured == paired_bootstrap(noisy, old).low
    spread = float((noisy - old).std(ddof=1))
    assert f"{queries_for(0.01, spread):,} queries show it in 80 % of the cases" in result.sentence.replace(
        "80%", "80 %"
    )
    assert by_name(Gates(ndcg_loss=0.05), replace(GOOD, old_ndcg=tuple(old), new_ndcg=tuple(noisy)))["ndcg"].passed


def test_a_space_that_is_worse_is_said_to_be_worse() -> None:
    worse = replace(GOOD, new_ndcg=tuple(x - 0.02 for x in EQUAL))
    assert by_name(Gates(), worse)["ndcg"].sentence.endswith("The new space is worse.")


def test_an_equal_space_passes_as_often_as_the_power_says() -> None:
    """With the number of queries that is said, and with the loss that is said for a number of queries."""
    random = np.random.default_rng(2)
    spread = 0.1
    n = queries_for(0.02, spread)
    assert n is not None
    assert loss_for(n, spread) == pytest.approx(0.02, rel=0.01)
    passed = [
        by_name(
            Gates(ndcg_loss=0.02, queries=2),
            replace(GOOD, old_ndcg=tuple(np.zeros(n)), new_ndcg=tuple(random.normal(0, spread, n))),
        )["ndcg"].passed
        for _ in range(80)
    ]
    assert 0.68 <= np.mean(passed) <= 0.92


def test_a_space_that_loses_all_that_is_allowed_passes_at_most_once_in_forty() -> None:
    random = np.random.default_rng(3)
    passed = [
        by_name(
            Gates(ndcg_loss=0.02),
            replace(GOOD, old_ndcg=tuple(np.zeros(200)), new_ndcg=tuple(random.normal(-0.02, 0.1, 200))),
        )["ndcg"].passed
        for _ in range(80)
    ]
    assert np.mean(passed) <= 0.08


def test_no_number_of_queries_shows_that_nothing_is_lost() -> None:
    assert queries_for(0.0, 0.1) is None
    assert queries_for(1e-9, 0.1) is None
    assert queries_for(0.0, 0.0) == 2
    assert queries_for(0.5, 0.0001) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"missing": -1}, "missing is -1; it must be a whole number, at least 0"),
        ({"missing": 1.0}, "missing is 1.0; it must be a whole number"),
        ({"queries": 1}, "queries is 1; it must be a whole number, at least 2"),
        ({"recall": 98}, "recall is 98; it must be a number, from 0 to 1"),
        ({"ndcg_loss": -0.01}, "ndcg_loss is -0.01"),
        ({"ndcg_loss": math.nan}, "ndcg_loss is nan"),
        ({"p95_ratio": "fast"}, "p95_ratio is 'fast'"),
        ({"price": 0.02}, r"price is 0.02; it must be a Decimal"),
        ({"price": Decimal(-1)}, "US dollars, 0 or more"),
        ({"canary": 1}, "canary is 1; it must be True or False"),
    ],
)
def test_a_limit_that_can_never_be_meant_is_refused_by_its_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Gates(**wrong)  # type: ignore[arg-type]


def test_queries_that_are_no_pairs_are_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="500 queries were judged in the old space and 499 in the new one"):
        check(Gates(), replace(GOOD, new_ndcg=EQUAL[:499]))


def test_the_p95_is_that_of_the_searches() -> None:
    assert p95([]) is None
    assert p95(range(101)) == 95
