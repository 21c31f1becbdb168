"""The measures of rankings are those of the programs that everybody compares with, and the bounds hold."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from chunkmill.domain.ranking import (
    mrr_at,
    ndcg_at,
    overlap_at,
    paired_bootstrap,
    pairs_needed,
    rbo,
    recall_at,
)
from tests.unit.chunkmill.domain.reference.make_rankings import FILE, RANKINGS, computed, judged_ranking

EXACT = 1e-12
REFERENCE = json.loads(FILE.read_text(encoding="utf-8"))


def ours(seed: int) -> dict[str, float]:
    ranked, grades = judged_ranking(seed)
    return {
        "ndcg_10": ndcg_at(10, ranked, grades),
        "ndcg_5": ndcg_at(5, ranked, grades),
        "recall_10": recall_at(10, ranked, grades),
        "recall_20": recall_at(20, ranked, grades),
        "mrr_10": mrr_at(10, ranked, grades),
    }


def test_the_measures_are_those_that_were_computed_with_ir_measures() -> None:
    assert len(REFERENCE) == RANKINGS
    for seed, expected in enumerate(REFERENCE):
        assert ours(seed) == pytest.approx(expected, rel=0, abs=EXACT), seed


def test_the_measures_are_those_of_ir_measures_where_it_is_installed() -> None:
    ir_measures = pytest.importorskip("ir_measures")
    for seed in range(0, RANKINGS, 10):
        assert ours(seed) == pytest.approx(computed(ir_measures, seed), rel=0, abs=EXACT), seed


# Computed with rbo 0.1.3, RankingSimilarity.rbo_ext.
@pytest.mark.parametrize(
    ("one", "other", "p", "expected"),
    [
        ("abcdefg", "bacgh", 0.9, 0.695255142857143),
        ("abc", "abcdef", 0.9, 1.0),
        ("abcdefghij", "jihgfedcba", 0.8, 0.2473058173968255),
        ("abc", "xyz", 0.9, 0.0),
    ],
)
def test_the_rank_biased_overlap_is_that_of_the_paper_and_has_no_direction(
    one: str, other: str, p: float, expected: float
) -> None:
    assert rbo(list(one), list(other), p=p) == pytest.approx(expected, abs=EXACT)
    assert rbo(list(other), list(one), p=p) == pytest.approx(expected, abs=EXACT)


def test_a_query_without_a_relevant_id_is_worth_nothing_and_breaks_nothing() -> None:
    for grades in ({}, {"a": 0.0}, {"a": -1.0}):
        assert (ndcg_at(10, ["a", "b"], grades), recall_at(10, ["a"], grades), mrr_at(10, ["a"], grades)) == (0, 0, 0)
    assert ndcg_at(10, [], {"a": 1.0}) == 0


def test_the_overlap_of_short_rankings_is_measured_against_the_longer_one() -> None:
    assert overlap_at(10, ["a", "b"], ["b", "c", "d", "a"]) == 0.5
    assert overlap_at(2, ["a", "b", "c"], ["c", "b", "a"]) == 0.5
    assert (overlap_at(10, [], []), overlap_at(10, [], ["a"]), rbo([], []), rbo([], ["a"])) == (1, 0, 1, 0)


def test_the_interval_of_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(7)
    covered = 0
    for seed in range(300):
        difference = paired_bootstrap(random.normal(0.3, 1.0, 60), np.zeros(60), resamples=1_000, seed=seed)
        covered += difference.low <= 0.3 <= difference.high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_bootstrap_draws_pairs() -> None:
    """Two runs that are equal but for a constant differ by that constant, however much queries differ."""
    scores = np.random.default_rng(1).normal(0, 100, 50)
    difference = paired_bootstrap(scores + 0.5, scores)
    assert difference.n == 50
    assert difference.low == pytest.approx(0.5)
    assert difference.high == pytest.approx(0.5)


def test_the_same_pairs_have_the_same_bounds_whatever_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(2).normal(0, 1, 40)
    whole = paired_bootstrap(scores, np.zeros(40))
    assert whole == paired_bootstrap(scores, np.zeros(40))
    monkeypatch.setattr("chunkmill.domain.ranking.BLOCK", 4_000)
    assert paired_bootstrap(scores, np.zeros(40)).low == pytest.approx(whole.low, abs=0.02)


def test_one_pair_bounds_nothing_and_two_lengths_are_no_pairs() -> None:
    assert (paired_bootstrap([1.0], [0.0]).low, paired_bootstrap([], []).high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        paired_bootstrap([1.0, 2.0], [1.0])


def test_with_as_many_pairs_as_needed_the_difference_is_seen_as_often_as_promised() -> None:
    random = np.random.default_rng(3)
    needed = pairs_needed(random.normal(0.2, 1.0, 20_000))
    assert needed is not None
    assert needed == pytest.approx((1.96 + 0.84) ** 2 / 0.2**2, rel=0.1)
    draws = random.normal(0.2, 1.0, (300, needed))
    seen = [paired_bootstrap(draw, np.zeros(needed), resamples=1_000).low > 0 for draw in draws]
    assert 0.73 <= np.mean(seen) <= 0.87


def test_no_number_of_pairs_shows_a_gain_that_is_a_loss() -> None:
    assert pairs_needed([-0.1, 0.05, -0.2]) is None
    assert pairs_needed([0.1]) is None
    assert pairs_needed([0.1, 0.1]) == 2
