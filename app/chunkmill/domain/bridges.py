"""What is said of a bridge: queries of one model that are answered in the space of another."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from chunkmill.domain.printed import PrintedResult


class AdapterKind(StrEnum):
    """How the vectors of one space become those of another, from the simplest to the most flexible."""

    ROTATION = "rotation"
    """Orthogonal Procrustes with a shift and a scale: it turns the space and distorts nothing."""
    LOW_RANK = "low_rank"
    """A rotation, corrected by a map of low rank."""
    NETWORK = "network"
    """Both, and a residual network with one small hidden layer."""


@dataclass(frozen=True, slots=True)
class BridgeTrial(PrintedResult):
    """One kind of adapter that was tried. Each number is a mean over the queries, from 0.0 to 1.0."""

    kind: AdapterKind
    ndcg: float
    """nDCG@10."""
    recall: float
    """recall@10: which share of the right answers is among the first 10."""
    same_hits: float
    """Which share of the first 10 hits after a full re-embedding are among the first 10."""
    bytes: int
    """The size of the adapter, which every client that uses it holds in memory."""


@dataclass(frozen=True, slots=True)
class BridgeQuote(PrintedResult):
    """What workers would have to embed for a bridge, and what that would cost."""

    collection: str
    name: str
    """The model of the queries."""
    query_space: str
    """The fingerprint of the space that queries would be embedded into."""
    space: str
    """The fingerprint of the space that would be searched, which is the collection's."""
    queries: int
    """How many queries would judge it. All of them are embedded."""
    texts: int
    """How many stored texts it would be learnt from and judged by."""
    to_embed: int
    """How many of these have no vector in the space of the queries yet."""
    tokens: int
    """How many tokens the queries and these texts have: a provider's as for an enqueue, and a local model's by an
    estimate from their characters."""
    usd: Decimal | None
    """0 for local models. None if a provider's model has no price."""
    known_usd: Decimal
    """The part of it that is known: that of the models with a price."""


@dataclass(frozen=True, slots=True)
class Bridge(PrintedResult):
    """A bridge of a collection, and what its queries lose against a full re-embedding.

    All rankings are among ``ranked`` chunks, and by queries that the adapter was not learnt from.
    """

    collection: str
    name: str
    """The model of the queries. ``search(bridge=…)`` takes it."""
    query_space: str
    """The fingerprint of the space that queries are embedded into."""
    space: str
    """The fingerprint of the space that is searched, which is the collection's."""
    kind: AdapterKind
    """The kind of adapter that was chosen."""
    pairs: int
    """From how many texts with a vector in both spaces it was learnt."""
    embedded: int
    """How many stored texts were embedded with the model for this bridge, and not stored."""
    ranked: int
    """Among how many chunks each query ranked."""
    queries: int
    """How many queries judged it."""
    queries_from: str
    """``golden`` if these are golden queries of the collection, ``titles`` if they are titles of its chunks."""
    full_ndcg: float
    """nDCG@10 after a full re-embedding."""
    ndcg: float
    """nDCG@10 through the bridge. Each query was judged with a kind that was chosen without it."""
    loss: float
    """``full_ndcg`` minus ``ndcg``."""
    low: float
    """The lower bound of the 95 % confidence interval of ``loss``."""
    high: float
    """The upper bound."""
    full_recall: float
    """recall@10 after a full re-embedding."""
    recall: float
    """recall@10 through the bridge."""
    same_hits: float
    """Which share of the first 10 hits after a full re-embedding are among the first 10 through the bridge."""
    old_ndcg: float | None
    """nDCG@10 of the same queries with the collection's own model; None if that was not asked."""
    trials: tuple[BridgeTrial, ...]
    """All kinds that were tried, each judged by all queries."""
    because: str
    """A sentence that says what the numbers mean."""
    created_at: datetime | None = None
