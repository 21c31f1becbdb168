"""Chooses among adapters by queries that none was learnt from, and says what the queries lose. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from chunkmill.bridge.adapters import Adapter, Floats
from chunkmill.domain.ranking import Difference, ndcg_at, overlap_at, paired_bootstrap, recall_at
from chunkmill.domain.vectors import to_unit_length
from chunkmill.system.numbers import NDArray, np

DEPTH = 10
FOLDS = 5
BLOCK = 4_000_000
"""How many cosines are in memory at once."""
MIN_QUERIES = 50
"""The bounds of fewer queries are too sure of themselves."""

Scores: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True, slots=True)
class Corpus:
    """The chunks that queries rank: ``(n, d)`` and ``(n, e)`` float32, row i of both for the chunk ``ids[i]``."""

    ids: Sequence[str]
    new: Floats
    old: Floats


@dataclass(frozen=True, slots=True)
class Question:
    """A query, by its vector in the new space, ``(d,)``, and the grades of its answers."""

    vector: Floats
    grades: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RankingQuality:
    """How good the rankings of all queries are: ``(n,)`` each."""

    ndcg: Scores
    recall: Scores
    same_hits: Scores
    """The share of the first hits of the full re-embedding that are among the first."""

    @property
    def worth(self) -> Scores:
        """By what adapters are compared. Half of it is that answers stay good, and half that they stay the same.

        Golden queries alone would not tell two adapters apart if they have one answer each, and titles hardly lose it.
        """
        return (self.ndcg + self.same_hits) / 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which adapter is taken, and what the queries lose."""

    chosen: int
    """Its number."""
    full: RankingQuality
    tried: tuple[RankingQuality, ...]
    held_out: RankingQuality
    """Each query with the adapter that is best for the queries of the other folds."""
    loss: Difference
    """nDCG of the full re-embedding minus that through the bridge."""
    wanted: Sequence[Sequence[str]]
    """The ranking of each question after a full re-embedding."""


def judge(corpus: Corpus, questions: Sequence[Question], adapters: Sequence[Adapter], *, seed: int = 0) -> Verdict:
    """Rank the corpus by each question: in the new space, and carried into the old one by each of the adapters.

    The questions are dealt to folds, and each fold is judged with the adapter that is best for the others: the loss is
    then not that of the luckiest adapter. Of equally good ones the simplest, which comes first, is taken.
    """
    new, old = to_unit_length(corpus.new), to_unit_length(corpus.old)
    asked = np.stack([question.vector for question in questions])
    wanted = rank(corpus.ids, new, to_unit_length(asked))
    grades = [question.grades for question in questions]
    full = standing(wanted, wanted, grades)
    tried = tuple(standing(rank(corpus.ids, old, adapter.carry(asked)), wanted, grades) for adapter in adapters)
    worth = np.stack([one.worth for one in tried])
    folds = np.random.default_rng(seed).permutation(len(questions)) % min(FOLDS, len(questions))
    taken = np.empty(len(questions), np.intp)
    for fold in range(folds.max() + 1):
        inside = folds == fold
        others = ~inside if (~inside).any() else inside
        taken[inside] = _best(worth[:, others])
    every = np.arange(len(questions))
    held_out = RankingQuality(*(np.stack([getattr(one, name) for one in tried])[taken, every] for name in _NAMES))
    loss = paired_bootstrap(full.ndcg, held_out.ndcg, seed=seed)
    return Verdict(_best(worth), full, tried, held_out, loss, wanted)


def judge_own(
    corpus: Corpus, vectors: Floats, verdict: Verdict, grades: Sequence[Mapping[str, float]]
) -> RankingQuality:
    """How good the rankings by ``vectors``, ``(n, e)``, are: the same questions, asked with the old model."""
    ranked = rank(corpus.ids, to_unit_length(corpus.old), to_unit_length(vectors))
    return standing(ranked, verdict.wanted, grades)


_NAMES = ("ndcg", "recall", "same_hits")


def standing(
    rankings: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]], grades: Sequence[Mapping[str, float]]
) -> RankingQuality:
    """How good ``rankings`` are by ``grades``, and beside the rankings that are ``wanted``."""
    return RankingQuality(
        ndcg=np.array([ndcg_at(DEPTH, ranked, of) for ranked, of in zip(rankings, grades, strict=True)]),
        recall=np.array([recall_at(DEPTH, ranked, of) for ranked, of in zip(rankings, grades, strict=True)]),
        same_hits=np.array([overlap_at(DEPTH, ranked, want) for ranked, want in zip(rankings, wanted, strict=True)]),
    )


def rank(ids: Sequence[str], vectors: Floats, queries: Floats) -> list[list[str]]:
    """The ids of the first hits of each query by cosine, best first. All vectors have length 1."""
    depth, step = min(DEPTH, len(ids)), max(1, BLOCK // max(1, len(ids)))
    ranked: list[list[str]] = []
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ vectors.T
        first = np.argpartition(-cosines, depth - 1, axis=1)[:, :depth]
        order = np.argsort(-np.take_along_axis(cosines, first, axis=1), axis=1, kind="stable")
        ranked += [[ids[i] for i in row] for row in np.take_along_axis(first, order, axis=1)]
    return ranked


def sentence(verdict: Verdict) -> str:
    """What a verdict means."""
    full, kept, loss = verdict.full, verdict.held_out, verdict.loss
    measured = f"{loss.mean:.3f} of nDCG@{DEPTH} (95 %: {loss.low:.3f} to {loss.high:.3f})"
    same = f"{kept.same_hits.mean():.0%} of the first {DEPTH} hits are the same"
    if loss.n < MIN_QUERIES:
        few = f"{loss.n} queries are too few to be sure of the loss, at least {MIN_QUERIES} are needed."
        return f"{few} It is {measured}."
    if loss.low > 0:
        share = kept.ndcg.mean() / full.ndcg.mean()
        return f"The bridge loses {measured} and keeps {share:.1%} of what a full re-embedding has; {same}."
    return (
        f"No loss against a full re-embedding can be seen: it is {measured}, where less than 0 would be a gain; {same}."
    )


def _best(worth: Scores) -> int:
    """``worth`` is ``(adapters, queries)``."""
    means = worth.mean(axis=1)
    # Sums of the same numbers in another order may differ in the last digit.
    return int(np.flatnonzero(means >= means.max() - 1e-12)[0])
