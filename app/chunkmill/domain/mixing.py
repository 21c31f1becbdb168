"""How the ranking of the vectors and that of the keywords become one, and whether that is better. Pure.

A mix is convex: alpha times the cosine and 1 - alpha times the keyword score, both brought to the range from 0 to 1
(Bruch, Gai and Ingber, 2023). If alpha is 1, the cosine alone ranks. The other way is reciprocal rank fusion (Cormack,
Clarke and Büttcher, 2009), which looks at ranks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

from chunkmill.domain.ranking import Difference, ndcg_of, paired_bootstrap, pairs_needed
from chunkmill.system.numbers import NDArray, np

Scores: TypeAlias = "NDArray[np.float64]"

DEPTH = 100
"""How many candidates of each kind are mixed, or as many as hits are wanted, if that is more."""
MAX_MIXED = 1_000
"""The most hits of a mixed search, whose candidates are all scored twice."""
PAGED = 200
"""How many candidates of each kind are mixed in a search with an offset. No page goes further."""
DEFAULT_ALPHA = 0.8
"""The alpha of a collection that was not tuned. On Python's docstrings 0.7 to 0.9 were best (decision 70)."""
RRF_K = 60
"""The constant of reciprocal rank fusion, as in its paper."""
JUDGED = 10
"""What is compared is nDCG at this rank."""
FOLDS = 5
MIN_QUERIES = 50
"""From fewer golden queries nothing is concluded: a bootstrap of so few is too sure of itself."""
ALPHAS: tuple[float, ...] = tuple(round(step / 20, 2) for step in range(21))
"""The values of alpha that are tried. 0 is the keywords alone, and 1 the vectors alone."""

Hybrid = Literal["rrf"] | float
"""A way to mix: reciprocal rank fusion, or an alpha from 0.0 to 1.0."""


class KeywordState(StrEnum):
    """How far the keywords of a collection are."""

    BEGUN = "begun"
    """The table is there. Writers that have not seen it yet may still be at work."""
    FILLING = "filling"
    """New chunks come with their keywords, and those that were there before are being given theirs."""
    READY = "ready"


def mixed(dense: Scores, keyword: Scores, how: Hybrid) -> Scores:
    """The mixed score of each candidate, ``(n,)`` from 0.0 to 1.0; the higher the better.

    ``dense`` are the cosines and ``keyword`` the keyword scores of the same candidates, both ``(n,)``, with a number
    for each, whichever of the two found it. A keyword score of 0 says that no term of the query is in the text.
    """
    if how == "rrf":
        return _reciprocal_ranks(dense, np.ones(len(dense), np.bool_)) + _reciprocal_ranks(keyword, keyword > 0)
    # A keyword score has a natural zero, and a cosine has none: what is unrelated may have 0.1 or 0.7 by the model.
    lowest = float(dense.min()) if len(dense) else 0.0
    return how * _scaled(dense, lowest) + (1 - how) * _scaled(keyword, 0.0)


def order(mixed_scores: Scores, dense: Scores, ids: Sequence[str]) -> list[int]:
    """The candidates' numbers, best first. Equal ones come in the order of their cosines, and then of their ids."""
    return sorted(range(len(ids)), key=lambda i: (-mixed_scores[i], -dense[i], ids[i]))


def judge(dense: Scores, keyword: Scores, ids: Sequence[str], grades: Mapping[str, float]) -> tuple[Scores, float]:
    """nDCG@10 of one query's candidates for each of ``ALPHAS``, and that of reciprocal rank fusion."""
    gains = np.array([grades.get(name, 0.0) for name in ids], dtype=np.float64)
    judged = np.array(list(grades.values()), dtype=np.float64)

    def ndcg(how: Hybrid) -> float:
        best = order(mixed(dense, keyword, how), dense, ids)[:JUDGED]
        return ndcg_of(JUDGED, gains[best], judged)

    return np.array([ndcg(alpha) for alpha in ALPHAS]), ndcg("rrf")


@dataclass(frozen=True, slots=True)
class Choice:
    """What golden queries say about mixing. All nDCG are means over the queries, from 0.0 to 1.0."""

    n: int
    """How many queries were judged."""
    dense: float
    """nDCG@10 of the vectors alone."""
    keyword: float
    """nDCG@10 of the keywords alone."""
    rrf: float
    """nDCG@10 of reciprocal rank fusion."""
    mix: float
    """nDCG@10 of the mix, where each query was judged with an alpha that was chosen without it."""
    gain: Difference
    """``mix`` minus ``dense``, with its bounds."""
    best_alpha: float
    """The alpha with the highest nDCG@10 over all queries."""
    needed: int | None
    """How many queries it takes to see a gain of this size; None if there is no gain."""
    curve: tuple[float, ...]
    """nDCG@10 for each of ``ALPHAS``, over all queries."""

    @property
    def alpha(self) -> float | None:
        """The alpha to search with; None if the mix does not win by its bound, or there are too few queries."""
        wins = self.n >= MIN_QUERIES and self.gain.low > 0 and self.best_alpha < 1
        return self.best_alpha if wins else None

    @property
    def because(self) -> str:
        """Why ``alpha`` is what it is, as a sentence."""
        gain = self.gain
        measured = f"{gain.mean:+.3f} nDCG@{JUDGED} (95 %: {gain.low:+.3f} to {gain.high:+.3f})"
        if self.alpha is not None:
            return f"Vectors with weight {self.alpha:g} and keywords with the rest win over vectors alone: {measured}."
        if self.n < MIN_QUERIES:
            return f"{self.n} queries are too few to choose by; at least {MIN_QUERIES} are needed. The mix: {measured}."
        if self.best_alpha == 1 or gain.high <= 0:
            return f"No mix is better than vectors alone: {measured}."
        how_many = f" About {self.needed:,} queries would tell." if self.needed else ""
        return f"The difference between the mix and vectors alone may be chance: {measured}.{how_many}"


def choose(ndcg: Scores, rrf: Scores, *, seed: int = 0) -> Choice:
    """What follows from ``ndcg``, ``(queries, len(ALPHAS))``, and ``rrf``, ``(queries,)``, of two queries or more.

    The queries are dealt to five folds. Each fold is judged with the alpha that is best for the others, so that no
    query has a say in the alpha that it is judged with, and the gain over the vectors alone is not that of the luckiest
    alpha. Among equally good values the highest is taken, because it changes the least.
    """
    n = len(ndcg)
    dense, keyword = ndcg[:, ALPHAS.index(1.0)], ndcg[:, ALPHAS.index(0.0)]
    folds = np.random.default_rng(seed).permutation(n) % min(FOLDS, n)
    held_out = np.empty(n)
    for fold in range(min(FOLDS, n)):
        inside = folds == fold
        held_out[inside] = ndcg[inside, _best(ndcg[~inside])]
    return Choice(
        n=n,
        dense=float(dense.mean()),
        keyword=float(keyword.mean()),
        rrf=float(rrf.mean()),
        mix=float(held_out.mean()),
        gain=paired_bootstrap(held_out, dense, seed=seed),
        best_alpha=ALPHAS[_best(ndcg)],
        needed=pairs_needed(held_out - dense),
        curve=tuple(float(value) for value in ndcg.mean(axis=0)),
    )


def _best(ndcg: Scores) -> int:
    means = ndcg.mean(axis=0)
    # Sums of the same numbers in another order may differ in the last digit.
    return int(np.flatnonzero(means >= means.max() - 1e-12)[-1])


def _scaled(scores: Scores, lowest: float) -> Scores:
    """The scores in the range from 0 to 1. If all are ``lowest``, they say nothing, and all are 0."""
    if not len(scores) or scores.max() <= lowest:
        return np.zeros(len(scores))
    scaled: Scores = (scores - lowest) / (scores.max() - lowest)
    return scaled


def _reciprocal_ranks(scores: Scores, counted: NDArray[np.bool_]) -> Scores:
    """1 / (60 + rank) for those that are ``counted``, and 0 for the others. Equal scores have equal ranks."""
    ranks = np.array([1 + np.count_nonzero(scores > score) for score in scores], dtype=np.float64)
    return np.where(counted, 1 / (RRF_K + ranks), 0.0) if len(scores) else np.zeros(0)
