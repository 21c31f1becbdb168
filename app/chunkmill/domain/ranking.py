"""How good a ranking is, how much two rankings differ, and how sure one can be of a difference. Pure.

A ranking is a sequence of distinct ids, best first. Judgements are ``id → grade``: a grade above 0 says that the id is
relevant, and a higher one that it is more so; an id without a judgement counts as grade 0. The values are those of
trec_eval (``ndcg_cut``, ``recall``, ``recip_rank``), with which ``tests/unit/chunkmill/domain/test_ranking.py``
compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from chunkmill.system.numbers import ArrayLike, NDArray, np

LEVEL = 0.95
"""The confidence of an interval, if nothing else is said."""
POWER = 0.8
"""With what probability a difference that exists is to be seen (Cohen, 1988)."""
RESAMPLES = 10_000
"""How many samples a bootstrap draws. The bounds then vary by less than 2 % of the interval's width."""
BLOCK = 2_000_000
"""How many numbers a bootstrap draws at once, so that its memory does not grow with the number of queries."""


def ndcg_at(k: int, ranked: Sequence[str], grades: Mapping[str, float]) -> float:
    """The normalised discounted cumulative gain of the first ``k`` ids, from 0.0 to 1.0.

    The gain of an id is its grade, divided by log2(rank + 1), and the sum is divided by that of the best ranking there
    is (Järvelin and Kekäläinen, 2002, as trec_eval computes it). Without a relevant id it is 0.0.
    """
    gains = np.array([max(0.0, grades.get(name, 0.0)) for name in ranked[:k]], dtype=np.float64)
    return ndcg_of(k, gains, np.array(list(grades.values()), dtype=np.float64))


def ndcg_of(k: int, gains: NDArray[np.float64], judged: NDArray[np.float64]) -> float:
    """As :func:`ndcg_at`, of the grades in the order of the ranking, ``(n,)``, and of all grades, ``(m,)``."""
    best = np.sort(judged[judged > 0])[::-1][:k]
    if not len(best):
        return 0.0
    return float(gains[:k] @ _discounts(len(gains[:k])) / (best @ _discounts(len(best))))


def recall_at(k: int, ranked: Sequence[str], grades: Mapping[str, float]) -> float:
    """The share of the relevant ids that are among the first ``k``, from 0.0 to 1.0; 0.0 if none is relevant."""
    relevant = {name for name, grade in grades.items() if grade > 0}
    return len(relevant.intersection(ranked[:k])) / len(relevant) if relevant else 0.0


def mrr_at(k: int, ranked: Sequence[str], grades: Mapping[str, float]) -> float:
    """1 / the rank of the first relevant id, or 0.0 if there is none among the first ``k``."""
    return next((1 / rank for rank, name in enumerate(ranked[:k], 1) if grades.get(name, 0.0) > 0), 0.0)


def overlap_at(k: int, one: Sequence[str], other: Sequence[str]) -> float:
    """The share of the first ``k`` ids that both rankings have, in any order, from 0.0 to 1.0.

    If both have fewer ids, it is the share of the longer one. Two empty rankings are equal, which is 1.0.
    """
    longest = max(len(one[:k]), len(other[:k]))
    return len(set(one[:k]).intersection(other[:k])) / longest if longest else 1.0


def rbo(one: Sequence[str], other: Sequence[str], *, p: float = 0.9) -> float:
    """Rank-biased overlap, extrapolated, from 0.0 to 1.0 (Webber, Moffat and Zobel, 2010, equation 32).

    ``p`` is the probability that a reader looks at the next rank too: with 0.9 the first 10 ranks have 86 % of the
    weight. The rankings may have different lengths. Two empty rankings are equal, which is 1.0.
    """
    short, long = sorted((list(one), list(other)), key=len)
    s, n = len(short), len(long)
    if not s:
        return 1.0 if not n else 0.0
    in_short, in_long = set[str](), set[str]()
    overlap, weighted, overlap_at_s = 0, 0.0, 0
    for depth in range(1, n + 1):
        new = long[depth - 1]
        in_long.add(new)
        overlap += new in in_short
        if depth <= s:
            in_short.add(short[depth - 1])
            overlap += short[depth - 1] in in_long
            overlap_at_s = overlap
        else:
            # Below its end the short ranking is taken to go on as it was.
            weighted += overlap_at_s * (depth - s) / (s * depth) * p**depth
        weighted += overlap / depth * p**depth
    return float((1 - p) / p * weighted + ((overlap - overlap_at_s) / n + overlap_at_s / s) * p**n)


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of paired differences, and the interval in which the true mean is with the confidence ``level``."""

    n: int
    """How many pairs."""
    mean: float
    low: float
    high: float
    level: float = LEVEL


def paired_bootstrap(
    one: ArrayLike, other: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """How much larger ``one`` is than ``other`` on average, both ``(n,)`` with one number for each query.

    The bounds are percentiles of the means of ``resamples`` samples of n pairs, drawn with replacement (Efron and
    Tibshirani, 1993; for retrieval Sakai, 2006). ``level`` is that of the interval: below its lower bound are
    half of the means that are outside of it. Fewer than two pairs bound nothing, and the interval is infinite.
    Raises :class:`ValueError` if the shapes differ.
    """
    first, second = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"pairs need two arrays of one length, and these have shapes {first.shape} and {second.shape}")
    differences = first - second
    n = len(differences)
    if n < 2:
        return Difference(n, float(differences.mean()) if n else math.nan, -math.inf, math.inf, level)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, BLOCK // n)
    for i in range(0, resamples, step):
        chosen = random.integers(0, n, size=(min(step, resamples - i), n), dtype=np.int32)
        means[i : i + step] = differences[chosen].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(n, float(differences.mean()), float(low), float(high), level)


def pairs_needed(differences: ArrayLike, *, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many pairs it takes to see that the mean of such ``differences``, ``(n,)``, is above 0.

    With so many, the interval of ``level`` lies above 0 with the probability ``power``, if the mean and the spread of
    all pairs are those of the given ones (the normal approximation). None if the mean is not above 0, or fewer than two
    are given.
    """
    given = np.asarray(differences, dtype=np.float64)
    if len(given) < 2 or not given.mean() > 0:
        return None
    normal = NormalDist()
    sigmas = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    return max(2, math.ceil((sigmas * float(given.std(ddof=1)) / float(given.mean())) ** 2))


def _discounts(n: int) -> NDArray[np.float64]:
    return 1 / np.log2(np.arange(2, n + 2, dtype=np.float64))
