"""The measures: how rows are prepared, and what one block of a matrix is.

A measure reads a block of rows once (``prepare``) and then compares prepared blocks (``compare``). :meth:`exact` gives
the same numbers for a few rows with sums in float64, always in the same order, so that equal rows have equal results
wherever they stand in a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

from chunkmill.similarity.arrays import Float64s, Floats, Rows, fitting, slices
from chunkmill.system.numbers import NDArray, np

SAFE_EXPONENT = 500
"""The squares of numbers from 2**-500 to 2**500 neither overflow nor vanish in float64, nor does a sum of them."""


class Measure(StrEnum):
    """How alike two vectors are (``cosine``, ``dot``: large is near), or how far apart (the others: small is near)."""

    COSINE = "cosine"
    DOT = "dot"
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"

    @property
    def is_distance(self) -> bool:
        return self in (Measure.EUCLIDEAN, Measure.MANHATTAN)


def normalise(vectors: object) -> Floats:
    """The vectors at length 1 (L2 norm): an array of the same shape, ``(d,)`` or ``(n, d)``.

    A vector of zeros has no direction and stays a vector of zeros. Lengths are computed in float64, with a scale for
    each row if its squares could overflow or vanish, so very large and denormal numbers keep their direction.
    Raises :class:`InvalidInput`.
    """
    rows = Rows("vectors", vectors)
    done = np.empty(rows.array.shape, dtype=rows.dtype)
    for part in slices(len(rows), fitting(8 * rows.dimensions, most=8192)):
        done[part] = unit_rows(rows.take(part, rows.dtype))
    return done[0] if rows.is_vector else done


def unit_rows(block: Floats) -> Floats:
    """``(b, d)`` rows of length 1, or of zeros, in the type of the block."""
    done = np.empty_like(block)
    for part in slices(len(block), fitting(8 * block.shape[1], most=128)):  # which stay in the cache
        wide = scaled(block[part])
        length = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        if block.dtype == np.float32 and length.min() > 1e-30 and length.max() < 1e38:
            np.divide(block[part], length.astype(np.float32)[:, np.newaxis], out=done[part])
        else:
            factor = np.divide(1.0, length, out=np.zeros_like(length), where=length > 0)
            np.multiply(wide, factor[:, np.newaxis], out=done[part], casting="same_kind")
    return done


def exponents(block: Floats) -> NDArray[np.int32]:
    """``(b,)``: the binary exponent of the largest absolute number of each row; 0 for zeros."""
    peak = np.maximum(block.max(axis=1), -block.min(axis=1))
    return np.asarray(np.frexp(peak)[1], dtype=np.int32)


def scaled(block: Floats) -> Float64s:
    """The rows in float64, each multiplied by a power of two if it is float64 with numbers whose squares are not safe.

    A square of a float32 is always safe in float64.
    """
    wide: Float64s = block.astype(np.float64)
    if block.dtype == np.float64 and block.size:
        exponent = scales(block)
        if exponent.any():
            np.ldexp(wide, -exponent[:, np.newaxis], out=wide)
    return wide


class Comparison(Protocol):
    """One measure of rows of one type."""

    def prepare(self, block: Floats) -> Any:
        """What ``compare`` needs of a block ``(b, d)``."""

    def compare(self, a: Any, b: Any, out: Floats) -> None:
        """Write the measures of two prepared blocks into ``out``, ``(n, m)``."""

    def exact(self, query: Floats, rows: Floats) -> Floats:
        """``(c,)``: the measures of ``query`` ``(d,)`` and ``rows`` ``(c, d)``, with sums in float64."""

    def slack(self, a: Any, b: Any) -> tuple[Float64s, float]:
        """How far ``compare`` may be from ``exact``: an absolute bound for each row of ``a``, and a relative one."""


def comparison(measure: Measure, dtype: np.dtype[Any], reference: Floats) -> Comparison:
    """How ``measure`` compares rows of ``dtype``. ``reference`` ``(b, d)`` is some of the rows, such as the first."""
    match measure:
        case Measure.COSINE:
            return Cosine(dtype)
        case Measure.DOT:
            return Dot(dtype)
        case Measure.EUCLIDEAN:
            return Euclidean(dtype, reference)
        case Measure.MANHATTAN:
            return Manhattan(dtype)


class Cosine:
    """The product of rows that were brought to length 1, from -1 to 1. With a vector of zeros it is 0."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.unit = unit_of(dtype)

    def prepare(self, block: Floats) -> Floats:
        return unit_rows(block)

    def compare(self, a: Floats, b: Floats, out: Floats) -> None:
        np.matmul(a, b.T, out=out)
        np.clip(out, -1, 1, out=out)

    def exact(self, query: Floats, rows: Floats) -> Floats:
        wide, asked = scaled(rows), scaled(query[np.newaxis])[0]
        lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide)) * np.sqrt(np.einsum("i,i", asked, asked))
        products = np.einsum("ij,j->i", wide, asked)
        cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
        clipped: Floats = np.clip(cosines, -1, 1).astype(rows.dtype)
        return clipped

    def slack(self, a: Floats, b: Floats) -> tuple[Float64s, float]:
        return np.full(len(a), error_of_sums(a.shape[1], self.unit)), 0.0


@dataclass(frozen=True, slots=True)
class Products:
    """Rows, and the largest absolute number among them."""

    block: Floats
    peak: float


class Dot:
    """The sum of products, in the type of the result: the error is at most ``d`` roundings of ``|a| |b|``.

    Where that sum could overflow, it is made in float64. What overflows there is made of scaled rows.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.unit = unit_of(dtype)

    def prepare(self, block: Floats) -> Products:
        peak = max(float(block.max()), -float(block.min())) if block.size else 0.0
        return Products(block, peak)

    def compare(self, a: Products, b: Products, out: Floats) -> None:
        exponent = int(np.frexp(a.peak)[1]) + int(np.frexp(b.peak)[1]) + a.block.shape[1].bit_length()
        if exponent < np.finfo(self.dtype).maxexp - 1:
            np.matmul(a.block, b.block.T, out=out)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            products = a.block.astype(np.float64) @ b.block.T.astype(np.float64)
            for row in np.flatnonzero(~np.isfinite(products).all(axis=1)):
                products[row] = scaled_products(a.block[row], b.block, products[row])
            out[...] = products

    def exact(self, query: Floats, rows: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            products = np.einsum("ij,j->i", rows.astype(np.float64), query.astype(np.float64))
            return scaled_products(query, rows, products).astype(rows.dtype)

    def slack(self, a: Products, b: Products) -> tuple[Float64s, float]:
        dimensions = a.block.shape[1]
        with np.errstate(over="ignore"):
            bounds = lengths_of(a.block) * lengths_of(b.block).max(initial=0.0)
            vanishing = dimensions * float(np.finfo(self.dtype).smallest_subnormal)
            return bounds * error_of_sums(dimensions, self.unit) + vanishing, 0.0


class Points:
    """Rows; and, when it is needed, the same in float64 and moved, with the squares of their lengths."""

    def __init__(self, block: Floats, origin: Float64s) -> None:
        self.block, self.origin = block, origin

    def __len__(self) -> int:
        return len(self.block)

    @cached_property
    def moved(self) -> Float64s:
        return self.block - self.origin

    @cached_property
    def squares(self) -> Float64s:
        squares: Float64s = np.einsum("ij,ij->i", self.moved, self.moved)
        return squares

    @cached_property
    def are_safe(self) -> bool:
        """Whether squares of these rows neither overflow nor vanish in float64."""
        if self.block.dtype == np.float32 or not self.block.size:
            return True
        return bool(np.abs(exponents(np.vstack([self.block, self.origin]))).max() <= SAFE_EXPONENT)


class Euclidean:
    """``sqrt(|a|² + |b|² - 2 a·b)`` in float64, and the length of ``a - b`` itself where that would cancel.

    Distances stay the same if all points are moved, so the mean of ``reference`` is moved to the origin: points that
    are far from the origin and near to each other then cancel less. For pairs whose squared distance is a small part
    of ``|a|² + |b|²``, the rounding errors of that sum are a large part of it. ``small_part`` is where they would reach
    ``precision``, by the usual bound for sums (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); the
    differences of these pairs are computed one by one, so vectors that differ in one bit have exact distances too.
    """

    FEW = 4
    """Up to so many rows, their differences take no longer than preparing the product of matrices."""

    def __init__(self, dtype: np.dtype[Any], reference: Floats) -> None:
        self.dtype = dtype
        self.precision = 2.0**-25 if dtype == np.float32 else 2.0**-40
        dimensions = reference.shape[1]
        self.small_part = (2 * dimensions + 8) * 2.0**-54 / self.precision
        self.origin = (reference.astype(np.float64) / max(1, len(reference))).sum(axis=0)  # the sum cannot overflow

    def prepare(self, block: Floats) -> Points:
        return Points(block, self.origin)

    def compare(self, a: Points, b: Points, out: Floats) -> None:
        if len(a) > len(b):
            a, b, out = b, a, out.T
        if len(a) <= self.FEW or not (a.are_safe and b.are_safe):
            for row, point in enumerate(a.block):
                out[row] = self.exact(point, b.block)
            return
        squared = a.moved @ b.moved.T
        squared *= -2
        squared += a.squares[:, np.newaxis]
        squared += b.squares
        close = squared <= (self.small_part * (a.squares + b.squares.max()))[:, np.newaxis]
        np.maximum(squared, 0, out=squared)
        with np.errstate(over="ignore"):
            out[...] = np.sqrt(squared, out=squared)
        for row in np.flatnonzero(close.any(axis=1)).tolist():
            columns = np.flatnonzero(close[row])
            out[row, columns] = self.exact(a.block[row], b.block[columns])

    def exact(self, query: Floats, rows: Floats) -> Floats:
        done = np.empty(len(rows), dtype=self.dtype)
        for part in slices(len(rows), fitting(8 * rows.shape[1], most=128)):
            apart = rows[part].astype(np.float64)
            with np.errstate(over="ignore"):
                apart -= query
                done[part] = (
                    np.sqrt(np.einsum("ij,ij->i", apart, apart)) if self.dtype == np.float32 else lengths_of(apart)
                )
        far = np.flatnonzero(np.isinf(done)) if self.dtype == np.float64 else ()
        if len(far):  # a difference has overflowed, which its half cannot
            with np.errstate(over="ignore"):
                done[far] = 2 * lengths_of(rows[far] / 2 - query / 2)
        return done

    def slack(self, a: Points, b: Points) -> tuple[Float64s, float]:
        return np.zeros(len(a)), 4 * self.precision + 4 * unit_of(self.dtype)


class Manhattan:
    """The sum of ``|a - b|``, from the differences themselves in the type of the result. Nothing can cancel, so the
    relative error is at most ``d`` roundings."""

    CACHED = 384 * 1024
    """Bytes of differences that are made and summed at once, which stay in a core's cache. With 256 rows of 384 float32
    a pair takes 171 ns, with 64 rows 220 ns, and SciPy's ``cdist`` takes 213 ns (two cores of a Xeon)."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def prepare(self, block: Floats) -> Floats:
        return block

    def compare(self, a: Floats, b: Floats, out: Floats) -> None:
        if len(a) > len(b):
            a, b, out = b, a, out.T  # the loop below is over the rows of the smaller one
        ones = np.ones(b.shape[1], dtype=self.dtype)
        step = max(1, self.CACHED // (ones.nbytes or 1))
        buffer = np.empty((min(step, len(b)), b.shape[1]), dtype=self.dtype)
        with np.errstate(over="ignore"):
            for columns in slices(len(b), step):
                part = b[columns]
                apart = buffer[: len(part)]
                for row, vector in enumerate(a):
                    np.subtract(part, vector, out=apart)
                    np.abs(apart, out=apart)
                    out[row, columns] = apart @ ones

    def exact(self, query: Floats, rows: Floats) -> Floats:
        done = np.empty(len(rows), dtype=self.dtype)
        for part in slices(len(rows), fitting(8 * rows.shape[1], most=128)):
            apart = rows[part].astype(np.float64)
            with np.errstate(over="ignore"):
                apart -= query
                done[part] = np.abs(apart, out=apart).sum(axis=1)
        return done

    def slack(self, a: Floats, b: Floats) -> tuple[Float64s, float]:
        return np.zeros(len(a)), error_of_sums(a.shape[1], unit_of(self.dtype))


def scaled_products(query: Floats, rows: Floats, products: Float64s) -> Float64s:
    """``products`` ``(b,)`` of ``query`` and ``rows``, with those that overflowed made again of scaled rows.

    They are infinite then only if the product is.
    """
    wrong = np.flatnonzero(~np.isfinite(products))
    if len(wrong):
        rows, asked = rows[wrong], query[np.newaxis]
        again = np.einsum("ij,j->i", scaled(rows), scaled(asked)[0])
        products = products.copy()
        products[wrong] = np.ldexp(again, scales(rows) + scales(asked))
    return products


def unit_of(dtype: np.dtype[Any]) -> float:
    """The relative error of one rounding."""
    return float(np.finfo(dtype).eps) / 2


def error_of_sums(dimensions: int, unit: float) -> float:
    """The most by which two sums of products can differ, relative to the sum of absolute products (Higham, 3.1)."""
    return (2 * dimensions + 16) * unit


def scales(block: Floats) -> NDArray[np.int32]:
    """The binary exponents by which :func:`scaled` divides the rows."""
    if block.dtype == np.float64 and block.size:
        exponent = exponents(block)
        if np.abs(exponent).max() > SAFE_EXPONENT:
            return exponent
    return np.zeros(len(block), dtype=np.int32)


def lengths_of(block: Floats) -> Float64s:
    """``(b,)`` float64: the lengths of the rows. They are infinite only if they are beyond float64."""
    wide = scaled(block)
    with np.errstate(over="ignore", under="ignore"):
        lengths: Float64s = np.ldexp(np.sqrt(np.einsum("ij,ij->i", wide, wide)), scales(block))
    return lengths
