"""Whole matrices of measures, made of blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chunkmill.domain.arguments import as_word
from chunkmill.errors import InvalidInput
from chunkmill.similarity.arrays import Floats, Rows, fitting, require_same_dimensions, result_type, slices
from chunkmill.similarity.measures import Comparison, Measure, comparison
from chunkmill.system.numbers import np

REFERENCE_ROWS = 1024
"""How many rows tell where the origin of Euclidean distances should be."""


def cosine(a: object, b: object, *, out: Floats | None = None) -> Floats:
    """The cosine of the angle between vectors, from -1 (opposite) to 1 (the same direction).

    Two vectors ``(d,)`` give a number, a vector and vectors ``(m, d)`` give ``(m,)``, and vectors ``(n, d)`` and
    ``(m, d)`` give the matrix ``(n, m)``. A vector of zeros has no direction; its cosine with anything is 0.

    ``out`` is an array of the result's shape and type, such as a ``numpy.memmap``, that the result is written into and
    that is returned. Apart from the result, memory does not grow with n and m. Rows are brought to length 1 in float64
    and rounded to the result's type, in which the products are summed: with float32 the absolute error is at most
    (d + 4) × 2**-24, and usually near 1e-7. Raises :class:`InvalidInput`.
    """
    return _matrix(Measure.COSINE, a, b, out)


def dot(a: object, b: object, *, out: Floats | None = None) -> Floats:
    """The dot product. Shapes and ``out`` are those of :func:`cosine`.

    Products are summed in the result's type: with float32 the error is at most d × 2**-24 times the lengths of both.
    Give float64 if products of very different size cancel. A sum that overflows on its way to a smaller result is made
    again with more room; a result beyond the type is infinite. Raises :class:`InvalidInput`.
    """
    return _matrix(Measure.DOT, a, b, out)


def euclidean(a: object, b: object, *, out: Floats | None = None) -> Floats:
    """The Euclidean (L2) distance. Shapes and ``out`` are those of :func:`cosine`.

    It is computed in float64 and rounded to the result's type. The relative error is at most 2**-23 with float32 and
    2**-39 with float64, also for vectors that are nearly equal, denormal or very long; equal vectors are at 0 exactly.
    Raises :class:`InvalidInput`.
    """
    return _matrix(Measure.EUCLIDEAN, a, b, out)


def manhattan(a: object, b: object, *, out: Floats | None = None) -> Floats:
    """The Manhattan (L1) distance: the sum of absolute differences. Shapes and ``out`` are those of :func:`cosine`.

    Differences are summed in the result's type: with float32 the relative error is at most (d + 2) × 2**-24.
    Raises :class:`InvalidInput`.
    """
    return _matrix(Measure.MANHATTAN, a, b, out)


def blocks(a: object, b: object, measure: Measure | str = Measure.COSINE) -> Iterator[tuple[slice, slice, Floats]]:
    """The matrix of ``a`` ``(n, d)`` and ``b`` ``(m, d)`` in parts, for matrices that are larger than the memory.

    Yields ``(rows, columns, part)``: the part is ``matrix[rows, columns]``. Each pair is in exactly one part, a part
    has at most 32 MiB, and all parts of the same columns follow each other. Both arrays may be memory-mapped files.
    Raises :class:`InvalidInput`, for a number that is not finite when its block is reached.
    """
    chosen = as_word(Measure, measure, "measure")
    left, right = Rows("a", a), Rows("b", b)
    require_same_dimensions(left, right)
    return _blocks(chosen, left, right)


def _blocks(measure: Measure, a: Rows, b: Rows) -> Iterator[tuple[slice, slice, Floats]]:
    dtype = result_type(a, b)
    for rows, columns, compare, left, right in _tiles(measure, a, b, dtype):
        part = np.empty((len_of(rows), len_of(columns)), dtype=dtype)
        compare.compare(left, right, part)
        yield rows, columns, part


def _matrix(measure: Measure, a: object, b: object, out: Floats | None) -> Floats:
    left, right = Rows("a", a), Rows("b", b)
    require_same_dimensions(left, right)
    dtype = result_type(left, right)
    shape = (*(() if left.is_vector else (len(left),)), *(() if right.is_vector else (len(right),)))
    if out is None:
        out = np.empty(shape, dtype=dtype)
    elif not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype or not out.flags.writeable:
        shown = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise InvalidInput(f"out is {shown}; it must be a writable array of {dtype} with the shape {shape}.")
    whole = out
    if left.is_vector:
        whole = whole[np.newaxis]
    if right.is_vector:
        whole = whole[..., np.newaxis]
    for rows, columns, compare, first, second in _tiles(measure, left, right, dtype):
        compare.compare(first, second, whole[rows, columns])
    result: Floats = out[()] if out.ndim == 0 else out
    return result


def _tiles(
    measure: Measure, a: Rows, b: Rows, dtype: np.dtype[Any]
) -> Iterator[tuple[slice, slice, Comparison, Any, Any]]:
    """The prepared blocks of all pairs: for each block of ``b`` all blocks of ``a``, which are smaller.

    A block of ``a`` is prepared again for each block of ``b``. That costs little, because it is then compared with
    thousands of rows.
    """
    if not len(a) or not len(b):
        return
    compare = comparison(measure, dtype, b.take(slice(0, REFERENCE_ROWS), dtype))
    wide = fitting(8 * b.dimensions, most=len(b))
    high = fitting(8 * max(wide, b.dimensions), most=8192)
    for columns in slices(len(b), wide):
        right = compare.prepare(b.take(columns, dtype))
        for rows in slices(len(a), high):
            yield rows, columns, compare, compare.prepare(a.take(rows, dtype)), right


def len_of(part: slice) -> int:
    return int(part.stop - part.start)
