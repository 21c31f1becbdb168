"""Two rankings of the same queries are compared by what is relevant, and the answer says how sure it is."""

from __future__ import annotations

import numpy as np
import pytest

from chunkmill.domain.comparing import Nearest, Side, changes, unit, with_stand_in
from chunkmill.domain.ranking import paired_bootstrap


def side(rankings: list[list[str]], relevant: str = "right") -> Side:
    made = Side()
    for ranked in rankings:
        made.add(ranked, {relevant: 1.0})
    return made


FIRST, SECOND, NOWHERE = ["right", "a", "b"], ["a", "right", "b"], ["a", "b", "c"]


def test_the_differences_are_new_minus_old_with_the_bounds_of_the_paired_bootstrap() -> None:
    old, new = side([FIRST] * 10 + [SECOND] * 30), side([SECOND] * 20 + [FIRST] * 20)
    told = changes([f"q{i}" for i in range(40)], old, new)
    expected = paired_bootstrap(new.ndcg, old.ndcg)
    assert (told.queries, told.ndcg.difference) == (40, pytest.approx(np.mean(new.ndcg) - np.mean(old.ndcg)))
    assert (told.ndcg.low, told.ndcg.high) == (expected.low, expected.high)
    assert told.mrr.difference == pytest.approx((20 * 1 + 20 * 0.5) / 40 - (10 * 1 + 30 * 0.5) / 40)
    assert told.overlap == 1.0
    assert 0 < told.rbo < 1


def test_the_worst_queries_are_those_that_lose_most_and_twenty_at_most() -> None:
    old = side([FIRST] * 60)
    new = side([SECOND] * 25 + [NOWHERE] * 5 + [FIRST] * 30)
    worst = changes([f"q{i:02}" for i in range(60)], old, new).worst
    assert [one.id for one in worst] == [*(f"q{i}" for i in range(25, 30)), *(f"q{i:02}" for i in range(15))]
    assert (worst[0].old, worst[0].new) == (1.0, 0.0)


def test_too_few_queries_to_tell_is_an_answer_that_says_how_many_it_would_take() -> None:
    """With so many of the same kind it is told."""
    old, new = side([FIRST, SECOND, FIRST, FIRST] * 5), side([FIRST, FIRST, SECOND, FIRST] * 4 + [FIRST] * 4)
    told = changes([str(i) for i in range(20)], old, new)
    assert not told.is_decided
    assert told.needed is not None
    assert told.sentence.startswith("20 queries cannot tell which is better: nDCG@10 changes by +0.0")
    assert f"About {told.needed:,} queries would tell" in told.sentence
    times = -(-told.needed // 20)
    more = [str(i) for i in range(20 * times)]
    again = changes(more, _repeated(old, times), _repeated(new, times))
    assert again.is_decided
    assert again.sentence.startswith("The new one is better:")
    assert again.needed is None


def _repeated(one: Side, times: int) -> Side:
    return Side(one.ndcg * times, one.recall * times, one.deep_recall * times, one.mrr * times, one.rankings * times)


def test_rankings_that_are_equal_are_alike_and_not_undecided() -> None:
    told = changes(["q1", "q2"], side([FIRST, SECOND]), side([FIRST, SECOND]))
    assert told.is_decided
    assert "ranks alike" in told.sentence
    assert (told.worst, told.needed, told.overlap, told.rbo) == ((), None, 1.0, pytest.approx(1.0))


def test_one_query_bounds_nothing() -> None:
    told = changes(["q1"], side([FIRST]), side([SECOND]))
    assert not told.is_decided
    assert told.sentence.startswith("1 queries bound no difference")


def test_the_chunk_of_a_title_stands_where_its_rest_would_stand() -> None:
    hits = [("whole", 0.99), ("a", 0.8), ("b", 0.5), ("c", 0.5), ("d", 0.1)]
    assert with_stand_in(hits, {"whole": 1.0}, 0.6) == ["a", "whole", "b", "c", "d"]
    assert with_stand_in(hits, {"whole": 1.0}, 0.5) == ["a", "b", "c", "whole", "d"]
    assert with_stand_in(hits, {"whole": 1.0, "twin": 1.0}, 0.9) == ["twin", "whole", "a", "b", "c", "d"]


def test_the_nearest_are_the_same_however_the_chunks_are_cut_into_blocks() -> None:
    random = np.random.default_rng(0)
    queries, vectors = (unit(random.standard_normal((n, 8)).astype(np.float32)) for n in (5, 300))
    vectors[7] = vectors[200]
    expected = [list(np.lexsort((np.arange(300), -(queries[i] @ vectors.T)))[:20]) for i in range(5)]
    for block in (1, 7, 20, 300):
        nearest = Nearest(queries, 20)
        for first in range(0, 300, block):
            nearest.add(vectors[first : first + block], np.arange(300)[first : first + block])
        assert [[number for number, _ in nearest.of(i)] for i in range(5)] == expected


def test_fewer_chunks_than_are_wanted_are_all_kept() -> None:
    nearest = Nearest(np.ones((1, 2), np.float32), 100)
    nearest.add(np.eye(2, dtype=np.float32), np.arange(2))
    assert nearest.of(0) == [(0, 1.0), (1, 1.0)]


def test_a_zero_vector_stays_zero() -> None:
    assert unit(np.zeros((1, 3), np.float32)).tolist() == [[0, 0, 0]]
