"""The principal components of vectors, by a randomized singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass

from chunkmill.domain.arguments import as_number
from chunkmill.errors import InvalidInput
from chunkmill.similarity.arrays import Float64s, Rows, fitting, slices
from chunkmill.system.numbers import np

OVERSAMPLED = 10
"""How many more directions than asked for are followed, as Halko, Martinsson and Tropp (2011) advise."""
ROUNDS = 7
"""How often they are multiplied with the vectors. Vectors of texts have many directions of nearly the same weight, and
with 7 rounds, as in scikit-learn, two components of such vectors are right to four digits."""


@dataclass(frozen=True, slots=True)
class Components:
    """The ``k`` directions in which vectors differ most, and where each vector lies along them.

    ``points`` is ``(n, k)``, ``directions`` is ``(k, d)`` with rows of length 1, ``mean`` is ``(d,)``, and
    ``explained`` is ``(k,)``: which share of all the variance each direction has, from 0 to 1.
    """

    points: Float64s
    directions: Float64s
    mean: Float64s
    explained: Float64s


def principal_components(vectors: object, k: int = 2, *, seed: int = 0) -> Components:
    """Project ``(n, d)`` vectors onto the ``k`` orthogonal directions in which they differ most (PCA).

    The directions are those of a randomized singular value decomposition with power iterations (Halko, Martinsson and
    Tropp, "Finding structure with randomness", 2011). The vectors are read block by block and never copied, so that
    beyond the points it takes ``O(d * (k + 10))`` bytes, however many vectors there are. Each direction points to where
    its largest number is positive, so the same vectors give the same points.

    There are at most ``min(n, d)`` directions; for what is beyond them, and for vectors that are all the same, points
    and shares are 0. Raises :class:`~chunkmill.errors.InvalidInput`.
    """
    rows = Rows("vectors", vectors)
    if rows.is_vector and len(rows.shape) == 1 and rows.shape[0]:
        raise InvalidInput("vectors is a single vector; principal components need several vectors as the rows (n, d).")
    k, seed = as_number("k", k, least=1, most=1_000), as_number("seed", seed, least=0)
    n, d = len(rows), rows.dimensions
    width = min(k + OVERSAMPLED, n, d)
    step = fitting(8 * d, most=max(n, 1))
    mean, scale = _mean_and_scale(rows, step)
    directions, variances = np.zeros((k, d)), np.zeros(k)
    total = _variance(rows, mean, scale, step)
    if total > 0 and width:
        basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, width)))[0]
        for _ in range(ROUNDS):
            basis = np.linalg.qr(_multiplied(rows, mean, scale, basis, step))[0]
        # Of the small matrix all is computed exactly (Rayleigh and Ritz).
        values, turned = np.linalg.eigh(basis.T @ _multiplied(rows, mean, scale, basis, step))
        most = min(k, width)
        chosen = (basis @ turned[:, ::-1])[:, :most].T
        chosen *= np.where(chosen[np.arange(most), np.abs(chosen).argmax(axis=1)] < 0, -1.0, 1.0)[:, np.newaxis]
        variances[:most] = np.maximum(values[::-1][:most], 0.0)
        # A direction in which nothing differs is one of many, and chance alone chose it.
        is_real = variances[:most] > 1e-12 * total
        directions[:most][is_real], variances[:most][~is_real] = chosen[is_real], 0.0
    points = np.zeros((n, k))
    for part in slices(n, step):
        points[part] = (rows.take(part, np.float64) - mean) @ directions.T
    return Components(points, directions, mean, variances / total if total > 0 else np.zeros(k))


def _mean_and_scale(rows: Rows, step: int) -> tuple[Float64s, float]:
    """The mean, and the largest distance of a number from it, by which products are divided so that none overflows."""
    n, mean = len(rows), np.zeros(rows.dimensions)
    for part in slices(n, step):
        mean += (rows.take(part, np.float64) / n).sum(axis=0)
    largest = 0.0
    for part in slices(n, step):
        with np.errstate(over="ignore"):
            largest = max(largest, float(np.abs(rows.take(part, np.float64) - mean).max(initial=0.0)))
    if not np.isfinite(largest):
        raise InvalidInput("vectors has numbers that are too far apart for float64; divide all of them by one number.")
    return mean, largest or 1.0


def _variance(rows: Rows, mean: Float64s, scale: float, step: int) -> float:
    return sum(float(np.square(_centred(rows, mean, scale, part)).sum()) for part in slices(len(rows), step))


def _multiplied(rows: Rows, mean: Float64s, scale: float, basis: Float64s, step: int) -> Float64s:
    """``(d, width)``: the basis times the covariance of the vectors, which is never made, as it is d × d."""
    product: Float64s = np.zeros_like(basis)
    for part in slices(len(rows), step):
        block = _centred(rows, mean, scale, part)
        product += block.T @ (block @ basis)
    return product


def _centred(rows: Rows, mean: Float64s, scale: float, part: slice) -> Float64s:
    centred: Float64s = (rows.take(part, np.float64) - mean) / scale
    return centred
