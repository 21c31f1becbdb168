"""k-means: Lloyd's algorithm and mini-batches, from k-means++ or from given centres."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from chunkmill.domain.arguments import as_number, as_word
from chunkmill.errors import InvalidInput
from chunkmill.similarity.arrays import (
    BLOCK_BYTES,
    Float64s,
    Floats,
    Rows,
    fitting,
    require_same_dimensions,
    result_type,
    slices,
)
from chunkmill.similarity.measures import Measure, unit_of, unit_rows
from chunkmill.system.numbers import NDArray, np

MEASURES = (Measure.EUCLIDEAN, Measure.COSINE)
Labels: TypeAlias = "NDArray[np.int64]"
FEW_CENTRES = 400
"""Up to so many centres, the rows of each are summed by a product of matrices: for 4,096 × 384 and 100 centres that
takes 2 ms here, and sorting by label and ``add.reduceat`` 7 ms. The product's time grows with the centres."""
STALE_BATCHES = 10
"""After this many mini-batches without a better mean distance the run ends, as in scikit-learn."""


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """What :func:`kmeans` made of ``n`` vectors."""

    centres: Floats
    """``(k, d)``. With ``measure="cosine"`` they have length 1."""
    labels: Labels
    """``(n,)`` int64: the number of the nearest centre; of equally near ones, the lowest."""
    inertia: float
    """The sum of the squared distances to the nearest centres; with ``measure="cosine"`` the sum of 1 - cosine."""
    iterations: int
    """How many times the centres were moved: Lloyd iterations, or mini-batches."""
    converged: bool
    """Whether the run ended by itself, and not because of ``max_iterations``."""


def kmeans(
    vectors: object,
    k: int,
    *,
    measure: Measure | str = Measure.EUCLIDEAN,
    start: object = None,
    batch_size: int | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Clusters:
    """Divide ``vectors`` ``(n, d)`` into ``k`` clusters, ``1 <= k <= n``, each around the mean of its vectors.

    The first centres are chosen by greedy k-means++ (Arthur and Vassilvitskii 2007), or are ``start`` ``(k, d)``. Then
    Lloyd's algorithm moves them until no label changes, or until the sum of their squared moves is at most
    ``tolerance`` × the mean variance of the dimensions, or for ``max_iterations``. With ``batch_size``, random samples
    of that many rows move them instead (Sculley 2010); this ends when 10 samples in a row bring no better mean
    distance, and a last look at all vectors gives the labels. A cluster that loses all its vectors gets the vector
    that is farthest from its centre. Only if there are fewer than ``k`` different vectors do clusters stay empty.

    ``measure="cosine"`` is spherical k-means (Dhillon and Modha 2001): vectors and centres have length 1, so only
    directions count. A vector of zeros has none and is refused. The same ``seed`` gives the same result on the same
    machine. Vectors are read block by block in each iteration, so they may be a memory-mapped file; memory
    grows with ``n`` by a few numbers for each vector. Raises :class:`InvalidInput`.
    """
    rows = Rows("vectors", vectors)
    if (chosen := as_word(Measure, measure, "measure")) not in MEASURES:
        raise InvalidInput(f"measure is {str(chosen)!r}; the clusters of k-means need one of: {', '.join(MEASURES)}.")
    if not len(rows) or rows.is_vector:
        raise InvalidInput(f"vectors has the shape {rows.shape}; it must be at least one row (n, d).")
    k = as_number("k", k, least=1, most=len(rows))
    if batch_size is not None:
        batch_size = min(as_number("batch_size", batch_size, least=1), len(rows))
    max_iterations = as_number("max_iterations", max_iterations, least=1)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise InvalidInput(f"tolerance is {tolerance!r}; it must be a number of at least 0.")
    random = np.random.default_rng(as_number("seed", seed, least=0))
    first = None if start is None else Rows("start", start)
    if first is not None and (first.is_vector or len(first) != k):
        raise InvalidInput(f"start has the shape {first.shape}; it must be one row for each of the {k} centres.")
    if first is not None:
        require_same_dimensions(rows, first)
    data = _Data(rows, chosen, result_type(rows) if first is None else result_type(rows, first))
    centres = _plus_plus(data, k, random) if first is None else data.moved(first, slice(0, k)).astype(np.float64)
    if batch_size is None:
        centres, iterations, converged = _lloyd(data, centres, max_iterations, tolerance * data.variance)
    else:
        centres, iterations, converged = _mini_batches(data, centres, batch_size, max_iterations, random)
    return _clusters(data, centres, iterations, converged)


class _Data:
    """The vectors as k-means sees them: moved so that their mean is the origin, or brought to length 1.

    Moving changes no distance. It keeps float32 exact enough for vectors that are far from the origin and near to each
    other. Where squares could overflow or vanish, all is also multiplied by ``scale``, a power of two.
    """

    def __init__(self, rows: Rows, measure: Measure, dtype: np.dtype[Any]) -> None:
        self.rows, self.dtype, self.is_cosine = rows, dtype, measure == Measure.COSINE
        self.step = fitting(8 * rows.dimensions, most=4096)
        self.origin = np.zeros(rows.dimensions, dtype=dtype)
        self.scale, self.variance = 1.0, 1.0
        if not self.is_cosine:
            peak = max(float(np.abs(rows.take(part, dtype)).max()) for part in slices(len(rows), self.step))
            exponent = int(np.frexp(peak)[1])
            # float32 squares are summed in float32, from 2**-126 to 2**127.
            if not -40 < exponent < 50:
                self.scale = math.ldexp(1.0, max(-1000, min(1000, -exponent)))
            mean = np.zeros(rows.dimensions)
            for part in slices(len(rows), self.step):
                mean += (rows.take(part, np.float64) * self.scale).sum(axis=0) / len(rows)
            self.origin = mean.astype(dtype)
        self.kept: Floats | None = None
        if len(rows) * rows.dimensions * dtype.itemsize <= BLOCK_BYTES:
            self.kept = self.moved(rows, slice(0, len(rows)))
        self.squares = np.empty(len(rows), dtype=dtype)
        total = np.zeros(rows.dimensions)
        for part, block in self:
            np.einsum("ij,ij->i", block, block, out=self.squares[part])
            total += block.sum(axis=0, dtype=np.float64)
        lengths = float(self.squares.mean(dtype=np.float64))
        self.variance = max(0.0, lengths - float(np.sum((total / len(rows)) ** 2))) / rows.dimensions

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[slice, Floats]]:
        for part in slices(len(self.rows), self.step):
            yield part, self.some(part)

    def some(self, part: slice | NDArray[np.intp]) -> Floats:
        """``(b, d)``: some of the vectors."""
        return self.moved(self.rows, part) if self.kept is None else self.kept[part]

    def moved(self, rows: Rows, part: slice | NDArray[np.intp]) -> Floats:
        """``(b, d)``: some rows of the vectors, or of the first centres, moved or brought to length 1."""
        block = rows.take(part, self.dtype)
        if self.is_cosine:
            units = unit_rows(block)
            zeros = np.flatnonzero(~units.any(axis=1))
            if len(zeros):
                row = range(len(rows))[part][zeros[0]] if isinstance(part, slice) else part[zeros[0]]
                raise InvalidInput(
                    f"{rows.argument} has only zeros in row {row}, which has no direction. Leave the row out, "
                    'or use measure="euclidean".'
                )
            return units
        if self.scale != 1.0:
            with np.errstate(under="ignore"):
                block = (block.astype(np.float64) * self.scale).astype(self.dtype)
        moved: Floats = block - self.origin
        return moved

    def fit(self, centres: Float64s, before: Float64s) -> Float64s:
        """Centres as they may be: of length 1 for cosines. A mean without a direction stays where it was ``before``."""
        if not self.is_cosine:
            return centres
        units = unit_rows(centres)
        there = np.any(units, axis=1, keepdims=True)
        return np.where(there, units, before)


def _plus_plus(data: _Data, k: int, random: np.random.Generator) -> Float64s:
    """Greedy k-means++: the next centre is drawn with a probability that grows with the squared distance to the
    nearest one so far; of ``2 + log k`` draws, the one that leaves the smallest sum of squared distances stays."""
    draws = 2 + int(math.log(k))
    centres = np.empty((k, data.rows.dimensions))
    chosen = [int(random.integers(len(data)))]
    centres[0] = data.some(np.array(chosen))[0]
    nearest = _squared_distances(data, centres[:1])[0]
    for number in range(1, k):
        nearest[chosen] = 0
        summed = np.cumsum(nearest)
        if summed[-1] > 0:
            drawn = np.searchsorted(summed, random.random(draws) * summed[-1], side="right")
            candidates = np.minimum(drawn, len(data) - 1)
        else:  # all vectors equal a centre: any that is not one yet is as good
            free = np.ones(len(data), dtype=np.bool_)
            free[chosen] = False
            candidates = np.flatnonzero(free)[:1]
        rows = data.some(candidates).astype(np.float64)
        left = np.minimum(_squared_distances(data, rows), nearest)
        best = int(left.sum(axis=1).argmin())
        nearest, centres[number] = left[best], rows[best]
        chosen.append(int(candidates[best]))
    return centres


def _squared_distances(data: _Data, centres: Float64s) -> Float64s:
    """``(c, n)``: the squared distances from a few centres to all vectors, at least 0."""
    done = np.empty((len(centres), len(data)))
    few = centres.astype(data.dtype)
    lengths = np.einsum("ij,ij->i", few, few, dtype=np.float64)
    for part, block in data:
        done[:, part] = data.squares[part] - 2 * (few @ block.T) + lengths[:, np.newaxis]
    return np.maximum(done, 0, out=done)


def _nearest(block: Floats, centres: Floats, offsets: Floats) -> tuple[Labels, Floats]:
    """``(b,)`` labels, and ``x·c - |c|²/2`` of the nearest centre, which is the largest of all centres."""
    # With few centres this product is three times as fast as that of the transposed matrices.
    products = (block @ centres.T).T if len(centres) <= 64 else centres @ block.T
    products -= offsets[:, np.newaxis]
    labels = np.zeros(len(block), dtype=np.int64)
    best = products[0].copy()
    nearer = np.empty(len(block), dtype=np.bool_)
    # Row by row over the centres this is seven times as fast as argmax over an array of (vectors, centres).
    for number in range(1, len(centres)):
        np.greater(products[number], best, out=nearer)
        np.copyto(labels, number, where=nearer)
        np.maximum(best, products[number], out=best)
    return labels, best


def _sums(block: Floats, labels: Labels, k: int) -> tuple[Float64s, Labels]:
    """``(k, d)``: the sum of the rows with each label, and ``(k,)``: their number."""
    counts = np.bincount(labels, minlength=k)
    if k <= FEW_CENTRES:
        belongs = np.zeros((k, len(block)), dtype=block.dtype)
        belongs[labels, np.arange(len(block))] = 1
        return (belongs @ block).astype(np.float64), counts
    sums = np.zeros((k, block.shape[1]))
    order = np.argsort(labels, kind="stable")
    present = np.flatnonzero(counts)
    firsts = np.cumsum(counts)[present] - counts[present]
    sums[present] = np.add.reduceat(block[order], firsts, axis=0)
    return sums, counts


def _offsets(data: _Data, centres: Float64s) -> Floats:
    """``(k,)``: half the squared lengths of the centres. Those of length 1 differ only by rounding."""
    if data.is_cosine:
        return np.zeros(len(centres), dtype=data.dtype)
    half: Floats = (np.einsum("ij,ij->i", centres, centres) / 2).astype(data.dtype)
    return half


class _Assignment:
    """Which centre each vector is nearest to, and the sums of the vectors of each centre."""

    def __init__(self, data: _Data, k: int) -> None:
        self.labels = np.full(len(data), -1, dtype=np.int64)
        self.sums = np.zeros((k, data.rows.dimensions))
        self.counts = np.zeros(k, dtype=np.int64)

    def update(self, data: _Data, centres: Float64s) -> int:
        """Assign all vectors anew. Returns how many labels changed.

        Later iterations change few labels, and then only those vectors are added and taken away, in float64.
        """
        narrow, offsets = centres.astype(data.dtype), _offsets(data, centres)
        k, before, changed = len(centres), self.labels, 0
        self.labels = np.empty_like(before)
        again = before[0] < 0
        for part, block in data:
            self.labels[part], _ = _nearest(block, narrow, offsets)
            moved = np.flatnonzero(self.labels[part] != before[part])
            changed += len(moved)
            if again:
                sums, counts = _sums(block, self.labels[part], k)
            else:
                rows = block[moved].astype(np.float64)
                sums, counts = _sums(rows, self.labels[part][moved], k)
                less, fewer = _sums(rows, before[part][moved], k)
                sums -= less
                counts -= fewer
            self.sums += sums
            self.counts += counts
        return changed


def _squares_to_own(data: _Data, centres: Float64s, labels: Labels) -> Iterator[tuple[slice, Float64s]]:
    """The squared distance of each vector to its centre, from differences in float64."""
    for part, block in data:
        for some in slices(len(block), 512):
            apart = block[some] - centres[labels[part][some]]
            yield slice(part.start + some.start, part.start + some.stop), np.einsum("ij,ij->i", apart, apart)


def _fill_empty(data: _Data, centres: Float64s, assigned: _Assignment) -> Labels:
    """Give each empty cluster the vector that is farthest from its own centre. Returns the clusters that got one."""
    labels, sums, counts = assigned.labels, assigned.sums, assigned.counts
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return empty
    far = np.empty(len(data))
    for part, squares in _squares_to_own(data, centres, labels):
        far[part] = squares
    # Equal vectors are not quite at their mean, because of rounding. They do not fill two clusters.
    noise = (8 * unit_of(data.dtype)) ** 2 * float(np.einsum("ij,ij->i", centres, centres).max())
    done = 0
    for row in np.argsort(-far, kind="stable"):
        if done == len(empty) or far[row] <= noise:
            break
        if counts[labels[row]] < 2:  # it is alone, and its cluster would be the next empty one
            continue
        vector = data.some(np.array([row]))[0].astype(np.float64)
        sums[labels[row]] -= vector
        counts[labels[row]] -= 1
        sums[empty[done]], counts[empty[done]] = vector, 1
        labels[row] = empty[done]
        done += 1
    return empty[:done]


def _lloyd(data: _Data, centres: Float64s, most: int, least_move: float) -> tuple[Float64s, int, bool]:
    assigned = _Assignment(data, len(centres))
    for iteration in range(1, most + 1):
        changed = assigned.update(data, centres)
        filled = _fill_empty(data, centres, assigned)
        if not len(filled) and not changed:
            return centres, iteration - 1, True
        there = assigned.counts > 0
        moved = centres.copy()
        moved[there] = assigned.sums[there] / assigned.counts[there, np.newaxis]
        moved = data.fit(moved, centres)
        shift = float(np.sum((moved - centres) ** 2))
        centres = moved
        if not len(filled) and shift <= least_move:
            return centres, iteration, True
    return centres, most, False


def _mini_batches(
    data: _Data, centres: Float64s, size: int, most: int, random: np.random.Generator
) -> tuple[Float64s, int, bool]:
    """Each centre moves towards the mean of its part of a sample, the less the more vectors it has seen."""
    seen = np.zeros(len(centres), dtype=np.int64)
    smoothed, best, stale = math.inf, math.inf, 0
    weight = min(1.0, 2 * size / (len(data) + 1))  # of one sample in the moving mean, as in scikit-learn
    for iteration in range(1, most + 1):
        picked = np.sort(random.choice(len(data), size, replace=False))
        sums, counts = np.zeros_like(centres), np.zeros(len(centres), dtype=np.int64)
        narrow, offsets, distance = centres.astype(data.dtype), _offsets(data, centres), 0.0
        for some in slices(size, data.step):
            block, squares = data.some(picked[some]), data.squares[picked[some]]
            labels, products = _nearest(block, narrow, offsets)
            distance += float(
                np.maximum(squares - 2 * products + (1 if data.is_cosine else 0), 0).sum(dtype=np.float64)
            )
            more, number = _sums(block, labels, len(centres))
            sums += more
            counts += number
        seen += counts
        there = counts > 0
        moved = centres.copy()
        moved[there] += (sums[there] - counts[there, np.newaxis] * centres[there]) / seen[there, np.newaxis]
        unused = np.flatnonzero(seen == 0)
        if len(unused) and iteration % STALE_BATCHES == 0:
            moved[unused] = data.some(np.sort(random.choice(len(data), len(unused), replace=False)))
        centres = data.fit(moved, centres)
        smoothed = distance / size if math.isinf(smoothed) else smoothed + weight * (distance / size - smoothed)
        best, stale = (smoothed, 0) if smoothed < best else (best, stale + 1)
        if stale >= STALE_BATCHES:
            return centres, iteration, True
    return centres, most, False


def _clusters(data: _Data, centres: Float64s, iterations: int, converged: bool) -> Clusters:
    """Labels and inertia of the centres as they are, which are the ones that are returned."""
    for _ in range(len(centres)):  # a vector that fills one cluster may have been the last of another
        assigned = _Assignment(data, len(centres))
        assigned.update(data, centres)
        filled = _fill_empty(data, centres, assigned)
        if not len(filled):
            break
        centres[filled] = assigned.sums[filled]
    labels = assigned.labels
    inertia = sum(float(squares.sum()) for _, squares in _squares_to_own(data, centres, labels))
    if data.is_cosine:
        return Clusters(centres.astype(data.dtype), labels, inertia / 2, iterations, converged)
    with np.errstate(over="ignore"):
        shown = ((centres + data.origin) / data.scale).astype(data.dtype)
        return Clusters(shown, labels, inertia / data.scale / data.scale, iterations, converged)
