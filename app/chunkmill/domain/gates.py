"""The gates between a collection and its new space: what is measured, and what may pass. Pure.

A space that is only almost as good should not pass by luck, so that the gate of quality looks at the lower bound of the
difference and not at its mean. An equal space then passes only if there are enough queries for the loss that is
allowed; :func:`queries_for` and :func:`loss_for` say how the two go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from statistics import NormalDist

from chunkmill.domain.printed import PrintedResult
from chunkmill.domain.ranking import LEVEL, POWER, paired_bootstrap
from chunkmill.errors import InvalidInput
from chunkmill.system.numbers import ArrayLike, np

NDCG_LOSS = 0.01
"""How much nDCG@10 a new space may lose, if nothing else is said. Measured on 1,430 docstrings of Python's library with
all-MiniLM-L6-v2, in 20 runs of 500 queries: int8 loses a tenth of it and passes in all runs; noise that leaves 86 % of
the first ten hits loses 0.008 and passes in one, and noise that leaves 81 % in none (decision 82)."""
FEWEST_QUERIES = 200
"""Fewer queries do not judge a space. With 50 the interval of a difference is 0.03 to 0.08 to both sides."""
MOST_QUERIES = 10_000_000
"""More queries than this are not asked for: the difference is too small to be seen."""


@dataclass(frozen=True, slots=True)
class Gates(PrintedResult):
    """What a new space must show before a collection moves to it. A gate that is None is left out."""

    missing: int = 0
    """How many chunks may have a vector in the old space and none in the new one."""
    canary: bool = True
    """Whether the golden texts of the new space must have been embedded, by which workers are compared."""
    recall: float | None = 0.98
    """The least share of the ten nearest chunks that a search through the serving index of the new space returns."""
    ndcg_loss: float | None = NDCG_LOSS
    """How much nDCG@10 may be lost: the lower 95 % bound of the difference must not be below minus this."""
    queries: int = FEWEST_QUERIES
    """The quality is judged by at least so many golden queries."""
    p95_ratio: float | None = 1.25
    """How many times longer the slowest twentieth of the searches may take than in the old space."""
    price: Decimal | None = None
    """The most US dollars that a million tokens may cost in the new space."""

    def __post_init__(self) -> None:
        """Raise :class:`InvalidInput`, which names the gate, if a limit can never be meant."""
        _require("missing", self.missing, 0, math.inf, whole=True)
        _require("queries", self.queries, 2, math.inf, whole=True)
        if not isinstance(self.canary, bool):
            raise InvalidInput(f"Gates: canary is {self.canary!r}; it must be True or False.")
        for name, low, high in (("recall", 0.0, 1.0), ("ndcg_loss", 0.0, 1.0), ("p95_ratio", 0.0, math.inf)):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), low, high)
        if self.price is not None:
            price: object = self.price
            if isinstance(price, bool) or not isinstance(price, int | Decimal):
                raise InvalidInput(f"Gates: price is {price!r}; it must be a Decimal, such as Decimal('0.02').")
            if not Decimal(price).is_finite() or price < 0:
                raise InvalidInput(f"Gates: price is {price!r}; it must be an amount of US dollars, 0 or more.")


@dataclass(frozen=True, slots=True)
class CollectionMeasurement:
    """What was measured of a collection in its old and its new space. None stands for what could not be measured."""

    chunks: int
    """Chunks of the collection."""
    missing: int
    """Those that have a vector in the old space and none in the new one."""
    dead: int = 0
    """Those of the missing ones that stand on the dead list of the new space."""
    canary: bool | None = None
    """Whether the new space has golden texts; None if it is a provider's, of which there are none."""
    recall: float | None = None
    """Of a search through the serving index, against the exact search."""
    recall_queries: int = 0
    old_ndcg: Sequence[float] = ()
    """nDCG@10 of each judged query in the old space, from 0.0 to 1.0."""
    new_ndcg: Sequence[float] = ()
    """The same of the same queries in the new space."""
    old_p95: float | None = None
    """Seconds."""
    new_p95: float | None = None
    timed: int = 0
    """How many searches were timed in both."""
    price: Decimal | None = None
    """US dollars for a million tokens in the new space."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Gate → why it could not be measured, as a sentence."""


@dataclass(frozen=True, slots=True)
class GateResult(PrintedResult):
    """What one gate says."""

    name: str
    """``coverage``, ``canary``, ``recall``, ``ndcg``, ``p95`` or ``price``."""
    passed: bool
    measured: float | None
    """None if it could not be measured; the gate is not passed then. For ``ndcg`` it is the lower bound."""
    limit: float | None
    """What ``measured`` may be at most, or for ``recall`` and ``ndcg`` at least."""
    sentence: str


def check(gates: Gates, measured: CollectionMeasurement) -> list[GateResult]:
    """What each gate says of what was measured, in a fixed order. A space may go on if all of them are passed."""
    results = [_coverage(gates, measured)]
    if gates.canary:
        results.append(_canary(measured))
    if gates.recall is not None:
        results.append(_recall(gates.recall, measured))
    if gates.ndcg_loss is not None:
        results.append(_quality(gates.ndcg_loss, gates.queries, measured))
    if gates.p95_ratio is not None:
        results.append(_speed(gates.p95_ratio, measured))
    if gates.price is not None:
        results.append(_price(Decimal(gates.price), measured))
    return results


def all_passed(results: Sequence[GateResult]) -> bool:
    return all(result.passed for result in results)


def _coverage(gates: Gates, measured: CollectionMeasurement) -> GateResult:
    missing = measured.missing
    passed = missing <= gates.missing
    if not missing:
        sentence = f"All {measured.chunks:,} chunks that can be searched now can be searched in the new space."
    else:
        sentence = f"{missing:,} of {measured.chunks:,} chunks can be searched now and have no vector in the new space"
        sentence += f", {measured.dead:,} of them are on its dead list" if measured.dead else ""
        sentence += f"; {gates.missing:,} may be missing."
        if not passed and measured.dead:
            sentence += " Retry or drop the dead chunks (`chunkmill dead list`), or allow so many to be missing."
    return GateResult("coverage", passed, float(missing), float(gates.missing), sentence)


def _canary(measured: CollectionMeasurement) -> GateResult:
    if measured.canary is None:
        return GateResult("canary", True, None, None, "The new space is a provider's, which embeds no golden texts.")
    if measured.canary:
        sentence = "A worker has embedded the golden texts of the new space, and all others are compared with it."
        return GateResult("canary", True, 1.0, 1.0, sentence)
    sentence = "No worker has embedded the golden texts of the new space yet. Start a worker that serves its model."
    return GateResult("canary", False, 0.0, 1.0, sentence)


def _recall(least: float, measured: CollectionMeasurement) -> GateResult:
    if measured.recall is None:
        return _unmeasured("recall", least, measured)
    passed = measured.recall >= least
    sentence = (
        f"A search through the serving index returns {measured.recall:.1%} of the ten nearest chunks "
        f"({measured.recall_queries:,} queries); at least {least:.1%} are wanted."
    )
    if not passed:
        sentence += " Build the index again with `chunkmill index COLLECTION`, without INDEX_COMPACT."
    return GateResult("recall", passed, measured.recall, least, sentence)


def _quality(loss: float, fewest: int, measured: CollectionMeasurement) -> GateResult:
    n = len(measured.new_ndcg)
    if n != len(measured.old_ndcg):
        raise ValueError(f"{len(measured.old_ndcg)} queries were judged in the old space and {n} in the new one")
    if n == 0 and "ndcg" in measured.unmeasured:
        return _unmeasured("ndcg", -loss, measured)
    if n < max(2, fewest):
        sentence = (
            f"{n:,} golden queries are too few to judge by; {max(2, fewest):,} are needed. To load some: `chunkmill "
            "golden load COLLECTION QUERIES QRELS`. If chunks have titles, they can be the queries: `chunkmill golden "
            "titles COLLECTION`. To go on without them: `chunkmill reembed resume COLLECTION --ndcg-loss off`."
        )
        return GateResult("ndcg", False, None, -loss, sentence)
    difference = paired_bootstrap(measured.new_ndcg, measured.old_ndcg)
    passed = difference.low >= -loss
    sentence = (
        f"nDCG@10 changes by {difference.mean:+.4f} (95 %: {difference.low:+.4f} to {difference.high:+.4f}, {n:,} "
        f"queries); the lower bound must not be below {-loss:+.4f}."
    )
    if not passed:
        differences = np.asarray(measured.new_ndcg, np.float64) - np.asarray(measured.old_ndcg, np.float64)
        sentence += _what_it_takes(differences, loss, is_worse=difference.high < 0)
    return GateResult("ndcg", passed, difference.low, -loss, sentence)


def _what_it_takes(differences: np.ndarray[tuple[int], np.dtype[np.float64]], loss: float, *, is_worse: bool) -> str:
    if is_worse:
        return " The new space is worse."
    spread = float(differences.std(ddof=1))
    needed = queries_for(loss, spread)
    if needed is None or needed <= len(differences):
        return " That it is as good is not shown."
    return (
        f" These queries cannot tell: if it is as good, {needed:,} queries show it in {POWER:.0%} of the cases, or so "
        f"many as these if a loss of {loss_for(len(differences), spread):.3f} is allowed."
    )


def _speed(most: float, measured: CollectionMeasurement) -> GateResult:
    if measured.new_p95 is None or measured.old_p95 is None:
        return _unmeasured("p95", most, measured)
    ratio = measured.new_p95 / measured.old_p95 if measured.old_p95 > 0 else math.inf
    sentence = (
        f"95 % of {measured.timed:,} searches take at most {measured.new_p95 * 1e3:,.1f} ms in the new space and "
        f"{measured.old_p95 * 1e3:,.1f} ms in the old one, which is {ratio:.2f} times as long; {most:g} times are "
        "allowed."
    )
    if ratio > most:
        sentence += (
            " A machine with other work may be the reason. To measure again: `chunkmill reembed judge COLLECTION`."
        )
    return GateResult("p95", ratio <= most, ratio, most, sentence)


def _price(most: Decimal, measured: CollectionMeasurement) -> GateResult:
    if measured.price is None:
        return _unmeasured("price", float(most), measured)
    sentence = f"A million tokens cost {measured.price:f} USD in the new space; {most:f} USD are allowed."
    return GateResult("price", measured.price <= most, float(measured.price), float(most), sentence)


def _unmeasured(name: str, limit: float, measured: CollectionMeasurement) -> GateResult:
    return GateResult(name, False, None, limit, measured.unmeasured.get(name, "It was not measured."))


def queries_for(loss: float, spread: float, *, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many queries it takes until an equally good space passes with the probability ``power``.

    ``spread`` is the standard deviation of the differences of nDCG. The lower bound of the interval of ``level`` is
    then above minus ``loss`` with that probability (the normal approximation for a test of non-inferiority: Julious,
    2004). None if it takes more than ten million, as it does if no loss is allowed.
    """
    if loss <= 0:
        return None if spread > 0 else 2
    needed = math.ceil((_sigmas(level, power) * spread / loss) ** 2)
    return None if needed > MOST_QUERIES else max(2, needed)


def loss_for(n: int, spread: float, *, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest loss to allow so that an equally good space passes with the probability ``power`` by ``n`` queries.

    The other way around of :func:`queries_for`.
    """
    return _sigmas(level, power) * spread / math.sqrt(n)


def p95(seconds: ArrayLike) -> float | None:
    """The time that 95 % of the searches take at most; None of no searches."""
    given = np.asarray(seconds, dtype=np.float64)
    return float(np.quantile(given, 0.95)) if len(given) else None


def _sigmas(level: float, power: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)


def _require(name: str, given: object, least: float, most: float, *, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if isinstance(given, bool) or not isinstance(given, kinds) or not least <= given <= most:
        what = "whole number" if whole else "number"
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise InvalidInput(f"Gates: {name} is {given!r}; it must be a {what}, {bounds}.")
