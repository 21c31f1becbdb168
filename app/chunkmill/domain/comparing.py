"""What golden queries say of two ways to search the same chunks: two models, two spaces, two servers. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from chunkmill.domain.costs import known_sum, sum_of
from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.ranking import (
    Difference,
    mrr_at,
    ndcg_at,
    overlap_at,
    paired_bootstrap,
    pairs_needed,
    rbo,
    recall_at,
)
from chunkmill.system.numbers import NDArray, np

JUDGED = 10
"""How many hits of a query are judged."""
DEEP = 100
"""How many hits count for the second recall, which says what a re-ranker would still see."""
SHOWN = 20
"""How many of the queries that lose most are named."""


@dataclass(frozen=True, slots=True)
class Question:
    """A golden query that can be judged."""

    id: str
    text: str
    grades: Mapping[str, float]
    """Chunk id → grade, of chunks that are there. One of them at least is above 0."""
    rest: str | None = None
    """What follows the query in its chunk, if it is the chunk's title; the chunk is searched by that alone."""


@dataclass(slots=True)
class Side:
    """What one of the two found. Lists grow by one with each query."""

    ndcg: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    deep_recall: list[float] = field(default_factory=list)
    mrr: list[float] = field(default_factory=list)
    rankings: list[tuple[str, ...]] = field(default_factory=list)
    """The ids of the first ten hits."""

    def add(self, ranked: Sequence[str], grades: Mapping[str, float]) -> None:
        """Judge one more query by its hits, best first; at most 100 of them count."""
        self.ndcg.append(ndcg_at(JUDGED, ranked, grades))
        self.recall.append(recall_at(JUDGED, ranked, grades))
        self.deep_recall.append(recall_at(DEEP, ranked, grades))
        self.mrr.append(mrr_at(JUDGED, ranked, grades))
        self.rankings.append(tuple(ranked[:JUDGED]))


def with_stand_in(hits: Iterable[tuple[str, float]], grades: Mapping[str, float], score: float) -> list[str]:
    """The ranking of a query that is a title: its chunks stand where what follows the title would stand.

    ``hits`` are ``(id, score)``, best first, and ``score`` is that of what follows. Among equal scores the others come
    first, so that a model that tells nothing apart gains nothing.
    """
    others = [(chunk_id, own_score) for chunk_id, own_score in hits if chunk_id not in grades]
    before = [chunk_id for chunk_id, own_score in others if own_score >= score]
    return [*before, *sorted(grades), *(chunk_id for chunk_id, own_score in others if own_score < score)]


@dataclass(frozen=True, slots=True)
class Change(PrintedResult):
    """One measure, from 0.0 to 1.0, of both, and how much it differs, with the bounds of the 95 % interval."""

    old: float
    new: float
    difference: float
    """``new`` minus ``old``."""
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LosingQuery(PrintedResult):
    """A query that loses."""

    id: str
    old: float
    """nDCG@10."""
    new: float


@dataclass(frozen=True, slots=True)
class Changes(PrintedResult):
    """How rankings differ over the judged queries, and how sure that is."""

    queries: int
    ndcg: Change
    """nDCG@10."""
    recall: Change
    """recall@10."""
    deep_recall: Change
    """recall@100."""
    mrr: Change
    """MRR@10."""
    overlap: float
    """The mean share of the first ten hits that both have. It says how much changes, and not whether it is better."""
    rbo: float
    """The mean rank-biased overlap (p = 0.9) of the first ten hits. It says how much changes too."""
    spread: float
    """The standard deviation of the differences of nDCG@10."""
    needed: int | None
    """About how many queries it takes to see a difference of this size. None if it is seen, or is exactly 0."""
    worst: tuple[LosingQuery, ...]
    """The 20 queries that lose most of nDCG@10, the worst first."""

    @property
    def is_decided(self) -> bool:
        """Whether the interval of nDCG@10 leaves 0 out, or no query changes at all."""
        return self.ndcg.low > 0 or self.ndcg.high < 0 or self.spread == 0 == self.ndcg.difference

    @property
    def sentence(self) -> str:
        """What the queries say, and if that is nothing, how many it would take."""
        one = self.ndcg
        measured = f"nDCG@10 changes by {one.difference:+.4f} (95 %: {one.low:+.4f} to {one.high:+.4f})"
        if self.queries < 2:
            return f"{self.queries} queries bound no difference; it takes two at least, and 200 to judge by."
        if self.is_decided:
            verdict = "is better" if one.low > 0 else "is worse" if one.high < 0 else "ranks alike"
            return f"The new one {verdict}: {measured}, {self.queries:,} queries."
        wanted = "" if self.needed is None else f" About {self.needed:,} queries would tell a difference of this size."
        return f"{self.queries:,} queries cannot tell which is better: {measured}.{wanted}"


def changes(ids: Sequence[str], old: Side, new: Side, *, seed: int = 0) -> Changes:
    """What both sides say of the same queries, whose ids are ``ids``. There is one at least."""
    differences = np.array(new.ndcg, np.float64) - np.array(old.ndcg, np.float64)
    losing = sorted((i for i in range(len(ids)) if differences[i] < 0), key=lambda i: (differences[i], ids[i]))
    pairs = list(zip(old.rankings, new.rankings, strict=True))
    ndcg = _change(old.ndcg, new.ndcg, seed)
    is_seen = ndcg.low > 0 or ndcg.high < 0
    return Changes(
        queries=len(ids),
        ndcg=ndcg,
        recall=_change(old.recall, new.recall, seed),
        deep_recall=_change(old.deep_recall, new.deep_recall, seed),
        mrr=_change(old.mrr, new.mrr, seed),
        overlap=float(np.mean([overlap_at(JUDGED, one, other) for one, other in pairs])),
        rbo=float(np.mean([rbo(one, other) for one, other in pairs])),
        spread=float(differences.std(ddof=1)) if len(differences) > 1 else math.nan,
        needed=None if is_seen else pairs_needed(differences if differences.mean() > 0 else -differences),
        worst=tuple(LosingQuery(ids[i], old.ndcg[i], new.ndcg[i]) for i in losing[:SHOWN]),
    )


def _change(old: Sequence[float], new: Sequence[float], seed: int) -> Change:
    difference: Difference = paired_bootstrap(new, old, seed=seed)
    return Change(float(np.mean(old)), float(np.mean(new)), difference.mean, difference.low, difference.high)


def as_json(value: Any) -> Any:
    """A result as JSON takes it, with None for numbers that JSON has not: the bounds of fewer than two queries."""
    if isinstance(value, dict):
        return {name: as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Nearest:
    """The nearest of many chunks to each of some queries, of which one block at a time is in memory.

    ``queries`` is ``(n, d)`` float32, and ``k`` chunks are kept for each.
    """

    def __init__(self, queries: NDArray[np.float32], k: int) -> None:
        self._queries = queries
        self._k = k
        self._scores = np.full((len(queries), 0), -np.inf, np.float32)
        self._places = np.zeros((len(queries), 0), np.int64)

    def add(self, vectors: NDArray[np.float32], numbers: NDArray[np.int64]) -> None:
        """Compare with a block, ``(m, d)`` float32, whose chunks have the ``numbers``, ``(m,)``."""
        scores = np.concatenate([self._scores, self._queries @ vectors.T], axis=1)
        places = np.concatenate([self._places, np.broadcast_to(numbers, (len(self._queries), len(vectors)))], axis=1)
        if scores.shape[1] > self._k:
            kept = np.argpartition(-scores, self._k - 1, axis=1)[:, : self._k]
            scores, places = np.take_along_axis(scores, kept, 1), np.take_along_axis(places, kept, 1)
        self._scores, self._places = scores, places

    def of(self, query: int) -> list[tuple[int, float]]:
        """``(number, score)`` of the chunks nearest to one query, best first. Equal ones come by their numbers."""
        order = np.lexsort((self._places[query], -self._scores[query]))
        return [(int(self._places[query, i]), float(self._scores[query, i])) for i in order]


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(n, d)`` float32, each of length 1; a zero vector stays zero."""
    scaled: NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    return scaled


@dataclass(frozen=True, slots=True)
class Contender(PrintedResult):
    """One of the two models, as it was measured. What was not measured is None."""

    model: str
    space: str
    """The fingerprint of its embedding space."""
    dimensions: int
    from_store: int
    """How many texts of the sample had a vector already."""
    embedded: int
    """How many texts of the sample workers embedded for the comparison."""
    tokens: int
    """The tokens of these texts and of the queries, as the workers counted them."""
    tokens_per_second: float | None
    """Tokens of documents over the time that this process waited for them."""
    query_p50_ms: float | None
    """How long half of the queries took at most that were embedded alone, in milliseconds."""
    query_p95_ms: float | None
    """The same for 95 % of them."""
    usd_per_million: Decimal | None
    """US dollars for a million tokens; for a local model by GPU_HOUR_USD and the speed that workers had lately."""
    collection_usd: Decimal | None
    """About what it costs to embed the whole collection once, at that price."""
    vector_bytes: int
    """What one vector takes in Postgres, without its row and its indexes."""
    collection_bytes: int
    """What the vectors of all contents of the collection take."""


@dataclass(frozen=True, slots=True)
class ComparisonQuote(PrintedResult):
    """What a comparison will send to workers, before it does."""

    collection: str
    queries: int
    contents: int
    """How many distinct texts the sample has."""
    old_to_embed: int
    """How many of them have no vector of the old model yet."""
    new_to_embed: int
    old_usd: Decimal | None
    """0 for a local model. None if a provider's model has no price."""
    new_usd: Decimal | None
    tokens: int = 0
    """How many tokens the queries and these texts have in both models: a provider's as for an enqueue, and a local
    model's by an estimate from their characters. 0 if a gateway of the last release says the quote."""

    @property
    def usd(self) -> Decimal | None:
        """What both cost; None if that is not known."""
        return sum_of((self.old_usd, self.new_usd))

    @property
    def known_usd(self) -> Decimal:
        """The part of it that is known: that of the models with a price."""
        return known_sum((self.old_usd, self.new_usd))


@dataclass(frozen=True, slots=True)
class Comparison(PrintedResult):
    """Two models, judged on a sample of a collection by its golden queries."""

    collection: str
    sample: int
    """How many distinct texts were searched: all relevant ones, and others that chance chose."""
    contents: int
    """How many distinct texts the collection has."""
    made_of_titles: bool
    """The collection has no golden queries, so that first lines and sentences of its chunks were the queries."""
    left_out: int
    """Golden queries that could not be judged, and texts that one of the models could not embed."""
    old: Contender
    new: Contender
    changes: Changes
    loss_seen: float
    """The loss of nDCG@10 that this number of queries would have shown in 80 % of the cases."""
    quote: ComparisonQuote

    @property
    def sentence(self) -> str:
        """What the golden queries say."""
        return self.changes.sentence
