"""Which adapter is taken, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkmill.bridge import judging
from chunkmill.bridge.adapters import Adapter
from chunkmill.bridge.judging import Corpus, Question, judge, judge_own, rank, sentence
from chunkmill.domain.bridges import AdapterKind
from chunkmill.domain.vectors import to_unit_length

Floats = NDArray[np.float32]
D = 16


def by(matrix: Floats) -> Adapter:
    zeros = np.zeros(D, np.float32)
    return Adapter(AdapterKind.ROTATION, {"mean_from": zeros, "mean_to": zeros, "rotation": matrix})


def scene(n: int, n_questions: int, noise: float = 0.0) -> tuple[Corpus, list[Question], Floats]:
    """A corpus whose old space is the new one, turned; a question for each of its first chunks; and the turn."""
    random = np.random.default_rng(3)
    new = to_unit_length(random.standard_normal((n, D)).astype(np.float32))
    turn = np.linalg.qr(random.standard_normal((D, D)))[0].astype(np.float32)
    old = to_unit_length(new @ turn + noise * random.standard_normal((n, D)).astype(np.float32))
    corpus = Corpus([f"c{i}" for i in range(n)], new, old)
    return corpus, [Question(new[i], {f"c{i}": 1.0}) for i in range(n_questions)], turn


def test_a_perfect_bridge_loses_nothing_and_a_wrong_one_is_seen() -> None:
    corpus, questions, turn = scene(500, 80)
    identity = np.eye(D, dtype=np.float32)

    verdict = judge(corpus, questions, [by(identity), by(turn)])

    assert verdict.chosen == 1
    assert verdict.full.ndcg.mean() == verdict.held_out.ndcg.mean() == 1
    assert verdict.held_out.same_hits.mean() == pytest.approx(1, abs=0.01)
    assert (verdict.loss.mean, verdict.loss.low, verdict.loss.high) == (0, 0, 0)
    assert verdict.tried[0].recall.mean() < 0.2
    assert "No loss" in sentence(verdict)


def test_what_a_bridge_loses_is_measured_with_its_bounds() -> None:
    corpus, questions, turn = scene(500, 80, noise=0.35)

    verdict = judge(corpus, questions, [by(turn)])

    assert 0 < verdict.loss.low < verdict.loss.mean < verdict.loss.high
    assert verdict.loss.mean == pytest.approx(verdict.full.ndcg.mean() - verdict.tried[0].ndcg.mean())
    assert verdict.held_out.same_hits.mean() < 0.9
    assert "keeps" in sentence(verdict)


def test_no_query_has_a_say_in_the_adapter_that_it_is_judged_with() -> None:
    # Each of two adapters is right for one of two questions and turns the other one around.
    corpus = Corpus(["a", "b", "c", "d"], np.eye(4, D, dtype=np.float32), np.eye(4, D, dtype=np.float32))
    questions = [Question(corpus.new[0], {"a": 1.0}), Question(corpus.new[1], {"b": 1.0})]
    first, second = np.eye(D, dtype=np.float32), np.eye(D, dtype=np.float32)
    first[1, 1] = second[0, 0] = -1

    verdict = judge(corpus, questions, [by(first), by(second)])

    assert verdict.tried[0].ndcg.tolist() == [1, pytest.approx(0.43, abs=0.01)]
    assert verdict.held_out.ndcg.max() < 0.5


def test_of_equally_good_adapters_the_simplest_is_taken() -> None:
    corpus, questions, turn = scene(60, 20)

    assert judge(corpus, questions, [by(turn), by(3 * turn), by(turn)]).chosen == 0


def test_few_queries_are_said_to_be_too_few() -> None:
    corpus, questions, turn = scene(60, judging.MIN_QUERIES - 1)

    assert "too few" in sentence(judge(corpus, questions, [by(turn)]))


def test_the_old_model_is_judged_in_its_own_space() -> None:
    corpus, questions, turn = scene(200, 30)
    verdict = judge(corpus, questions, [by(turn)])

    own = judge_own(corpus, corpus.old[:30], verdict, [question.grades for question in questions])

    assert own.ndcg.mean() == 1


def test_rankings_are_those_of_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "BLOCK", 1_000)
    corpus, _, _ = scene(300, 1)
    queries = to_unit_length(np.random.default_rng(5).standard_normal((20, D)).astype(np.float32))

    ranked = rank(corpus.ids, corpus.new, queries)

    order = np.argsort(-(queries @ corpus.new.T), axis=1)[:, :10]
    assert ranked == [[f"c{i}" for i in row] for row in order]
    assert rank(["x"], corpus.new[:1], queries) == [["x"]] * 20
