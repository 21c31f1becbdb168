"""Mixes of two rankings, and the choice of a mix: it may not be better by luck."""

from __future__ import annotations

import numpy as np
import pytest

from chunkmill.domain import mixing
from chunkmill.domain.mixing import ALPHAS, choose, judge, mixed, order


def scores(*values: float) -> mixing.Scores:
    return np.array(values, dtype=np.float64)


def test_a_mix_brings_both_scores_to_one_range() -> None:
    dense, keyword = scores(0.8, 0.6, 0.7), scores(0.0, 8.0, 2.0)
    assert mixed(dense, keyword, 0.75) == pytest.approx([0.75, 0.25, 0.75 * 0.5 + 0.25 * 0.25])


def test_the_weight_1_is_the_order_of_the_vectors_and_0_that_of_the_words() -> None:
    dense, keyword, ids = scores(0.1, 0.9, 0.5), scores(3, 1, 2), ["a", "b", "c"]
    assert order(mixed(dense, keyword, 1.0), dense, ids) == [1, 2, 0]
    assert order(mixed(dense, keyword, 0.0), dense, ids) == [0, 2, 1]


def test_a_query_without_words_is_ordered_by_the_vectors_whatever_the_weight() -> None:
    dense, keyword, ids = scores(0.1, 0.9, 0.5), scores(0, 0, 0), ["a", "b", "c"]
    for how in (0.0, 0.4, "rrf"):
        assert order(mixed(dense, keyword, how), dense, ids) == [1, 2, 0]  # type: ignore[arg-type]


def test_equal_scores_are_ordered_by_the_cosine_and_then_by_the_id() -> None:
    assert order(scores(1, 1, 1, 1), scores(0, 1, 0, 1), ["b", "d", "a", "c"]) == [3, 1, 2, 0]


def test_ranks_are_fused_as_in_the_paper_and_what_no_word_matches_has_no_rank_by_words() -> None:
    fused = mixed(scores(0.9, 0.8, 0.7), scores(0, 5, 9), "rrf")
    assert fused == pytest.approx([1 / 61, 1 / 62 + 1 / 62, 1 / 63 + 1 / 61])


def test_nothing_and_one_candidate_are_mixed_too() -> None:
    for how in (0.5, "rrf"):
        assert len(mixed(scores(), scores(), how)) == 0  # type: ignore[arg-type]
        assert np.isfinite(mixed(scores(0.3), scores(0), how)).all()  # type: ignore[arg-type]


def test_a_query_is_judged_for_every_weight_with_all_grades_that_there_are() -> None:
    """The best answer is not among the candidates, and counts as missed."""
    ndcg, rrf = judge(scores(0.9, 0.1), scores(0, 1), ["wrong", "right"], {"right": 1.0, "missing": 3.0})
    ideal = 3 + 1 / np.log2(3)
    assert ndcg[ALPHAS.index(0.0)] == pytest.approx(1 / ideal)
    assert ndcg[ALPHAS.index(1.0)] == pytest.approx(1 / np.log2(3) / ideal)
    assert rrf == pytest.approx(1 / ideal)


def table(n: int, gain: float, noise: float, seed: int) -> mixing.Scores:
    """nDCG of ``n`` queries: by vectors 0.6, at the weight 0.8 ``gain`` more, elsewhere less."""
    random = np.random.default_rng(seed)
    base = 0.6 - 0.3 * np.abs(np.array(ALPHAS) - 1.0)
    made = np.tile(base, (n, 1)) + random.normal(0, noise, (n, len(ALPHAS)))
    made[:, ALPHAS.index(1.0)] = 0.6
    made[:, ALPHAS.index(0.8)] = 0.6 + gain + random.normal(0, noise, n)
    return made


def test_a_mix_that_wins_is_chosen() -> None:
    choice = choose(table(300, 0.05, 0.1, 1), np.full(300, 0.5))
    assert choice.alpha == choice.best_alpha == 0.8
    assert choice.gain.low > 0
    assert choice.mix == pytest.approx(choice.dense + choice.gain.mean)
    assert choice.because.startswith("Vectors with weight 0.8")
    assert (choice.dense, choice.rrf) == (pytest.approx(0.6), pytest.approx(0.5))


def test_a_mix_that_loses_is_not_chosen_and_the_weight_stays_with_the_vectors() -> None:
    choice = choose(table(300, -0.05, 0.01, 2), np.full(300, 0.5))
    assert (choice.alpha, choice.best_alpha, choice.needed) == (None, 1.0, None)
    assert choice.because.startswith("No mix is better")


def test_luck_is_not_chosen() -> None:
    """For each query words help or harm, and on average they do neither. The best weight looks better by luck.

    In 400 draws 3 % are chosen, and 6 % if the weights have nothing to do with each other, which is the worst case.
    """
    chosen, looked_better = 0, 0
    weight_of_words = 1 - np.array(ALPHAS)
    for seed in range(100):
        random = np.random.default_rng(seed)
        ndcg = 0.5 + 0.3 * random.normal(0, 1, (100, 1)) * weight_of_words
        ndcg = ndcg + 0.1 * random.normal(0, 1, (100, 1)) * weight_of_words**2
        looked_better += ndcg.mean(axis=0).max() > ndcg[:, -1].mean()
        chosen += choose(ndcg, ndcg[:, 0]).alpha is not None
    assert looked_better > 40
    assert chosen <= 9


def test_a_fold_has_no_say_in_the_weight_that_it_is_judged_with() -> None:
    """The first weight is good for one query alone. Held out, that query is judged with another weight."""
    ndcg = np.full((100, len(ALPHAS)), 0.5)
    ndcg[0, 0] = 1.0
    choice = choose(ndcg, np.zeros(100))
    assert choice.best_alpha == 0.0
    assert choice.mix < 0.5 + 0.5 / 100
    assert choice.alpha is None


def test_few_queries_choose_nothing_and_a_gain_that_may_be_chance_says_how_many_would_tell() -> None:
    few = choose(table(49, 0.2, 0.01, 3), np.zeros(49))
    assert (few.gain.low > 0, few.alpha) == (True, None)
    assert few.because.startswith("49 queries are too few")
    unsure = choose(table(60, 0.03, 0.3, 6), np.zeros(60))
    assert unsure.alpha is None
    assert unsure.needed is not None
    assert unsure.needed > 60
    assert f"About {unsure.needed:,} queries would tell" in unsure.because


def test_among_equally_good_weights_the_one_nearest_to_the_vectors_is_chosen() -> None:
    ndcg = np.full((80, len(ALPHAS)), 0.4)
    ndcg[:, ALPHAS.index(0.3)] = ndcg[:, ALPHAS.index(0.7)] = 0.6
    assert choose(ndcg, np.zeros(80)).alpha == 0.7
