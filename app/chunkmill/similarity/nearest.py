"""The nearest of many vectors, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from chunkmill.domain.arguments import as_number, as_word
from chunkmill.errors import InvalidInput
from chunkmill.similarity.arrays import Floats, Rows, fitting, require_same_dimensions, result_type, slices
from chunkmill.similarity.measures import Comparison, Measure, comparison
from chunkmill.system.numbers import NDArray, np


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The nearest vectors, nearest first."""

    ids: NDArray[Any]
    """``(k,)`` for one query and ``(q, k)`` for ``q`` queries: row numbers (int64), or the ids that the batches gave.
    There are fewer columns if there are fewer than ``k`` vectors."""
    values: Floats
    """The measure of each, in the same shape: cosines and products from the largest to the smallest, distances from the
    smallest to the largest."""


def top_k(queries: object, vectors: object, k: int, measure: Measure | str = Measure.COSINE) -> Nearest:
    """The ``k`` of ``vectors`` ``(n, d)`` nearest to each of ``queries``, ``(d,)`` or ``(q, d)``, by looking at all.

    Of vectors with equal values, the one with the lower row number comes first. Values are computed in float64 and
    rounded to the result's type, so equal vectors always have equal values, and the answer does not depend on how the
    vectors are divided into blocks. Memory grows with ``q × k`` and not with ``n``: ``vectors`` may be a memory-mapped
    file. Raises :class:`InvalidInput`.
    """
    search = _Search(queries, k, measure)
    rows = Rows("vectors", vectors)
    step = search.step(rows)
    for part in slices(len(rows), step):
        search.add(rows, part, np.arange(part.start, part.stop, dtype=np.int64))
    return search.nearest(np.dtype(np.int64))


def top_k_of_batches(
    queries: object,
    batches: Iterable[tuple[Sequence[Any] | NDArray[Any], object]],
    k: int,
    measure: Measure | str = Measure.COSINE,
) -> Nearest:
    """:func:`top_k` of vectors that come in batches ``(ids, vectors)``, such as those of ``client.iter_vectors``.

    A batch has ``b`` ids and vectors ``(b, d)``, and may be empty. Of vectors with equal values, the one that came
    first is first. ``ids`` of the result is an array of int64 if all ids are whole numbers, else of objects. Only the
    batch in hand and the ``q × k`` nearest are in memory. Raises :class:`InvalidInput`, which counts batches from 0.
    """
    search = _Search(queries, k, measure)
    whole = True
    for number, batch in enumerate(batches):
        try:
            ids, vectors = batch
        except (TypeError, ValueError):
            raise InvalidInput(f"batch {number} is not a pair of ids and vectors.") from None
        rows = Rows(f"batch {number}", vectors)
        if rows.is_vector or len(ids) != len(rows):
            raise InvalidInput(
                f"batch {number} has {len(ids)} ids and vectors of the shape {rows.shape}; "
                "it must have one id for each row."
            )
        names = np.fromiter(ids, dtype=object, count=len(ids))
        whole = whole and all(isinstance(name, int | np.integer) and not isinstance(name, bool) for name in names)
        for part in slices(len(rows), search.step(rows)):
            search.add(rows, part, names[part])
    return search.nearest(np.dtype(np.int64) if whole else np.dtype(object))


class _Search:
    """The best of what was seen so far, for each query.

    Each block is compared as a whole, which is fast and not exact. What may belong to the ``k`` best by the bound of
    that error is compared again exactly, and only exact values decide. All values are turned so that larger is better.
    """

    def __init__(self, queries: object, k: int, measure: Measure | str) -> None:
        self.k = as_number("k", k, least=1)
        self.measure = as_word(Measure, measure, "measure")
        self.queries = Rows("queries", queries)
        self.sign = -1.0 if self.measure.is_distance else 1.0
        self.values: list[Floats] = [np.empty(0, dtype=self.queries.dtype) for _ in range(len(self.queries))]
        self.ids: list[NDArray[Any]] = [np.empty(0, dtype=object) for _ in range(len(self.queries))]
        self.dtype = self.queries.dtype
        self.compare: Comparison | None = None
        self.seen = 0

    def step(self, rows: Rows) -> int:
        """How many rows are compared at a time."""
        return fitting(8 * rows.dimensions, most=2048)

    def add(self, rows: Rows, part: slice, names: NDArray[Any]) -> None:
        """Compare the rows ``part``, which are called ``names``, with all queries."""
        self.seen += part.stop - part.start
        dimensions = require_same_dimensions(self.queries, rows)
        dtype = result_type(self.queries, rows)
        if self.compare is None or dtype != self.dtype:  # the first batch decides, unless a later one needs float64
            self.dtype = np.result_type(self.dtype, dtype)
            self.compare = comparison(self.measure, self.dtype, rows.take(part, self.dtype))
            self.values = [values.astype(self.dtype) for values in self.values]
        block = rows.take(part, self.dtype)
        right = self.compare.prepare(block)
        for some in slices(len(self.queries), fitting(8 * max(len(block), dimensions), most=1024)):
            asked = self.queries.take(some, self.dtype)
            left = self.compare.prepare(asked)
            values = np.empty((len(asked), len(block)), dtype=self.dtype)
            self.compare.compare(left, right, values)
            values *= self.sign
            absolute, relative = self.compare.slack(left, right)
            self._merge(self.compare, some.start, asked, block, values, absolute, relative, names)

    def _merge(
        self,
        compare: Comparison,
        first: int,
        asked: Floats,
        block: Floats,
        values: Floats,
        absolute: NDArray[np.float64],
        relative: float,
        names: NDArray[Any],
    ) -> None:
        floors = np.full(len(asked), -np.inf)
        for row, query in enumerate(range(first, first + len(asked))):
            if len(self.values[query]) == self.k:
                floors[row] = _below(self.sign * float(self.values[query][-1]), absolute[row], relative, times=1)
        may = values >= self._rounded_down(floors)[:, np.newaxis]
        for row in np.flatnonzero(may.any(axis=1)).tolist():
            query = first + row
            if len(self.values[query]) < self.k < len(block):
                kth = np.partition(values[row], len(block) - self.k)[len(block) - self.k]
                floor = _below(float(kth), absolute[row], relative, times=2)
                may[row] &= values[row] >= self._rounded_down(np.array(floor))
            chosen = np.flatnonzero(may[row])
            exact = self.sign * compare.exact(asked[row], block[chosen])
            merged = np.concatenate([self.sign * self.values[query], exact])
            order = np.argsort(-merged, kind="stable")[: self.k]
            self.values[query] = self.sign * merged[order]
            self.ids[query] = np.concatenate([self.ids[query], names[chosen]])[order]

    def _rounded_down(self, floors: NDArray[np.float64]) -> Floats:
        """In the type of the values, and not above: a bound that was rounded up could exclude what it should not."""
        with np.errstate(over="ignore"):
            down: Floats = np.nextafter(floors.astype(self.dtype), self.dtype.type(-np.inf))
        return down

    def nearest(self, ids: np.dtype[Any]) -> Nearest:
        count = min(self.k, self.seen)
        values = np.array(self.values, dtype=self.dtype).reshape(len(self.queries), count) + 0.0  # -0.0 becomes 0.0
        chosen = np.empty((len(self.queries), count), dtype=ids)
        for row, names in enumerate(self.ids):
            chosen[row] = names
        return Nearest(chosen[0], values[0]) if self.queries.is_vector else Nearest(chosen, values)


def _below(value: float, absolute: float, relative: float, *, times: int) -> float:
    """The least that ``compare`` may say of what is at least ``value``."""
    with np.errstate(invalid="ignore"):
        floor = value - times * (absolute + (relative * abs(value) if relative else 0.0))
    return -np.inf if np.isnan(floor) else float(floor)
