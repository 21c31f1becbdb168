"""Learns adapters from pairs: the vectors of the same texts in two spaces. Pure, and the same for the same seed.

Rows are brought to length 1 first, because searches compare directions. A tenth of the pairs is kept aside, by which
the rank, the ridge and the end of the training are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from chunkmill.bridge.adapters import Adapter, Floats, gelu, gelu_slope
from chunkmill.domain.bridges import AdapterKind
from chunkmill.domain.vectors import to_unit_length
from chunkmill.system.numbers import NDArray, np

Doubles: TypeAlias = "NDArray[np.float64]"

MIN_PAIRS = 32
"""From fewer pairs nothing is learnt."""
ASIDE_SHARE, FEW_ASIDE, MOST_ASIDE = 0.1, 64, 500
"""Which share of the pairs is kept aside, and how many at most; of few pairs it is a third, up to ``FEW_ASIDE``."""
RIDGES = (100.0, 10.0, 1.0, 0.1, 0.01)
"""The ridges that are tried, as multiples of the mean variance of a direction."""
EARNED = 0.002
"""A less cautious map is chosen only if the share of the neighbours that it finds is larger by more than this."""
RANKS = (16, 64, 256)
"""The ranks that are tried, if they are below both dimensions."""
HIDDEN = 256
"""How many hidden units a network has."""
EPOCHS, PATIENCE = 60, 8
"""A network is trained for so many passes over the pairs at most, and ends after so many that were no better."""
BATCH = 256
LEARNING_RATE = 1e-3
DECAY = 1e-3
MEAN_WEIGHT, SQUARE_WEIGHT, SMALLEST = 0.9, 0.999, 1e-8
"""The constants of Adam (Kingma and Ba, 2015)."""
SHARPNESS = 20.0
"""What a cosine is multiplied by before neighbours are weighed against each other."""
ANCHOR = 4.0
"""What the cosine to the old vector weighs beside the order of the neighbours."""
NEIGHBOURS = 10
"""Adapters are compared by how many of the first so many neighbours they find."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """``(n, d)`` and ``(n, e)`` float32 of length 1: row i of both stands for the same text."""

    old: Floats
    """In the space that is searched."""
    new: Floats
    """In the space of the queries."""

    @classmethod
    def of(cls, new: Floats, old: Floats) -> Pairs:
        """Raises :class:`ValueError` if the rows do not match, or are fewer than ``MIN_PAIRS``."""
        if len(new) != len(old) or len(new) < MIN_PAIRS:
            raise ValueError(f"{len(new)} and {len(old)} vectors are not {MIN_PAIRS} pairs or more")
        return cls(old=to_unit_length(old), new=to_unit_length(new))

    def __len__(self) -> int:
        return len(self.new)

    def split(self, seed: int) -> tuple[Pairs, Pairs]:
        """The pairs to learn from, and those that are kept aside."""
        order = np.random.default_rng(seed).permutation(len(self))
        n_aside = min(MOST_ASIDE, max(min(FEW_ASIDE, len(self) // 3), round(len(self) * ASIDE_SHARE)))
        aside, learnt = order[:n_aside], order[n_aside:]
        return Pairs(self.old[learnt], self.new[learnt]), Pairs(self.old[aside], self.new[aside])


class Jury:
    """Says how many of the neighbours that a text has among the pairs are found through an adapter.

    Texts that an adapter was not learnt from stand for queries, because they are what there is of any model. A mean
    cosine to the old vectors would not do: a map that shrinks all vectors towards their mean has a better one, and
    tells neighbours apart less well.
    """

    def __init__(self, aside: Pairs, learnt: Pairs) -> None:
        self._aside, self._pool = aside, learnt
        self._k = min(NEIGHBOURS, len(learnt))
        self._wanted = _nearest(aside.new, learnt.new, self._k)

    def share(self, adapter: Adapter) -> float:
        """From 0.0 to 1.0."""
        got = _nearest(adapter.carry(self._aside.new), self._pool.old, self._k)
        hits = (got[:, :, np.newaxis] == self._wanted[:, np.newaxis, :]).any(axis=2)
        return float(hits.mean())


def fit_all(pairs: Pairs, *, seed: int = 0) -> Iterator[Adapter]:
    """An adapter of each kind, from the simplest to the most flexible."""
    learnt, aside = pairs.split(seed)
    jury = Jury(aside, learnt)
    yield fit_rotation(pairs)
    rotation = fit_rotation(learnt)
    affine = fit_low_rank(learnt, rotation, jury)
    yield affine
    yield fit_network(learnt, affine, jury, seed=seed)


def fit_rotation(pairs: Pairs) -> Adapter:
    """The rotation, with a shift and a scale, that brings the new vectors nearest to the old ones.

    This is orthogonal Procrustes (Schönemann, 1966; with shift and scale Schönemann and Carroll, 1970). If the spaces
    have different dimensions, the rotation is cut: it keeps the directions in which the two vary together.
    """
    mean_new, mean_old, new, old = _centred(pairs)
    left, singular, right = np.linalg.svd(new.T @ old, full_matrices=False)
    scale = singular.sum() / max(float(np.square(new).sum()), 1e-30)
    return _adapter(AdapterKind.ROTATION, mean_from=mean_new, mean_to=mean_old, rotation=scale * (left @ right))


def fit_low_rank(pairs: Pairs, rotation: Adapter, jury: Jury) -> Adapter:
    """The rotation, and the map of a low rank that comes nearest to what the rotation leaves.

    That is reduced-rank regression (Izenman, 1975) with a ridge (Mukherjee and Zhu, 2011). A large ridge leaves the
    rotation as it is, so that few pairs do no harm. The jury chooses ridge and rank.
    """
    mean_new, mean_old, new, old = _centred(pairs)
    left = old - new @ rotation.arrays["rotation"].astype(np.float64)
    values, basis = np.linalg.eigh(new.T @ new)
    values = np.maximum(values, 0)
    seen = basis.T @ (new.T @ left)
    best, share = None, -1.0
    for ridge in RIDGES:
        shrunk = 1 / (values + ridge * max(float(values.mean()), 1e-30))
        # The ridge is a set of further rows of the new vectors, whose old vectors are zeros; these are fitted too.
        directions = _directions(np.sqrt(shrunk)[:, np.newaxis] * seen)
        full = (basis * shrunk) @ seen
        for rank in _ranks(len(directions)):
            up = directions[:rank]
            adapter = _adapter(
                AdapterKind.LOW_RANK,
                mean_from=mean_new,
                mean_to=mean_old,
                rotation=rotation.arrays["rotation"].astype(np.float64),
                down=full @ up.T,
                up=up,
            )
            candidate = jury.share(adapter)
            if candidate > share + EARNED:
                best, share = adapter, candidate
    assert best is not None  # noqa: S101 - there are ridges and ranks
    return best


def fit_network(pairs: Pairs, start: Adapter, jury: Jury, *, seed: int = 0) -> Adapter:
    """A network that adds to the map ``start``, of :func:`fit_low_rank`, what one hidden layer can learn of the rest.

    It is trained by Adam on what matters for a search: the neighbours of a carried vector among the old vectors of a
    batch are to be those that its text has among the new ones. The loss is the cross-entropy between the two softmaxes,
    as in the distillation of a similarity matrix (Tung and Mori, 2019), and ``ANCHOR`` times what the cosine to the old
    vector lacks. The jury ends it.
    """
    random = np.random.default_rng(seed)
    d, e = start.dimensions
    weights: list[Floats] = [
        (random.standard_normal((d, HIDDEN)) / np.sqrt(d)).astype(np.float32),
        np.zeros(HIDDEN, np.float32),
        np.zeros((HIDDEN, e), np.float32),
    ]
    # Centred vectors of length 1 have small numbers, which a first layer of this size would not tell apart.
    spread = np.float32(1 / max(float((pairs.new - start.arrays["mean_from"]).std()), 1e-12))
    means = [np.zeros_like(weight) for weight in weights]
    squares = [np.zeros_like(weight) for weight in weights]
    best, n_worse, step = _network(start, weights, spread), 0, 0
    share = jury.share(best)
    for _ in range(EPOCHS):
        order = random.permutation(len(pairs))
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            gradients = _gradients(weights, spread, start, pairs.new[rows], pairs.old[rows])
            step += 1
            for weight, gradient, mean, square in zip(weights, gradients, means, squares, strict=True):
                mean += (1 - MEAN_WEIGHT) * (gradient - mean)
                square += (1 - SQUARE_WEIGHT) * (gradient * gradient - square)
                unbiased = mean / (1 - MEAN_WEIGHT**step)
                size = np.sqrt(square / (1 - SQUARE_WEIGHT**step)) + SMALLEST
                weight -= LEARNING_RATE * (unbiased / size + DECAY * weight)
        adapter = _network(start, weights, spread)
        candidate = jury.share(adapter)
        if candidate > share:
            best, share, n_worse = adapter, candidate, 0
        else:
            n_worse += 1
            if n_worse == PATIENCE:
                break
    return best


def _network(start: Adapter, weights: list[Floats], spread: np.float32) -> Adapter:
    inner, bias, outer = weights
    return Adapter(
        AdapterKind.NETWORK, {**start.arrays, "inner": inner * spread, "bias": bias.copy(), "outer": outer.copy()}
    )


def _gradients(
    weights: list[Floats], spread: np.float32, start: Adapter, new: Floats, old: Floats
) -> tuple[Floats, Floats, Floats]:
    """Those of the loss of a batch, by the three arrays of the network."""
    inner, bias, outer = weights
    centred: Floats = new - start.arrays["mean_from"]
    narrow: Floats = centred @ start.arrays["down"]
    carried: Floats = centred @ start.arrays["rotation"]
    carried += start.arrays["mean_to"]
    carried += narrow @ start.arrays["up"]
    inputs: Floats = centred * spread
    before: Floats = inputs @ inner
    before += bias
    active = gelu(before)
    carried += active @ outer
    length: Floats = np.maximum(np.linalg.norm(carried, axis=1, keepdims=True), 1e-12)
    unit: Floats = carried / length
    near: Floats = unit @ old.T
    near_wanted: Floats = new @ new.T
    wrong: Floats = _softmax(near)
    wrong -= _softmax(near_wanted)
    by_unit: Floats = wrong @ old
    by_unit *= SHARPNESS
    by_unit -= ANCHOR * old
    by_unit /= len(new)
    by_carried: Floats = by_unit - (by_unit * unit).sum(axis=1, keepdims=True) * unit
    by_carried /= length
    by_before: Floats = by_carried @ outer.T
    by_before *= gelu_slope(before)
    by_inner: Floats = inputs.T @ by_before
    by_outer: Floats = active.T @ by_carried
    return by_inner, by_before.sum(axis=0), by_outer


def _softmax(cosines: Floats) -> Floats:
    """The shares of the neighbours of each row, by their cosines."""
    weights = np.exp(SHARPNESS * (cosines - cosines.max(axis=1, keepdims=True)))
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _nearest(queries: Floats, vectors: Floats, k: int) -> NDArray[np.intp]:
    """``(n, k)``: the rows of ``vectors`` nearest to each query by cosine, in no order. All have length 1."""
    return np.argpartition(queries @ vectors.T, len(vectors) - k, axis=1)[:, len(vectors) - k :]


def _directions(matrix: Doubles) -> Doubles:
    """The right singular vectors of a matrix as rows, those of the largest singular values first.

    They come from the products of its rows or columns, which takes a tenth of the time of a singular value
    decomposition, and loses digits only of directions in which there is next to nothing.
    """
    d, e = matrix.shape
    _, vectors = np.linalg.eigh(matrix @ matrix.T if d < e else matrix.T @ matrix)
    if d >= e:
        return np.ascontiguousarray(vectors.T[::-1])
    rows: Doubles = (vectors.T @ matrix)[::-1]
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return rows


def _ranks(full: int) -> list[int]:
    return [rank for rank in RANKS if rank < full] or [full]


def _centred(pairs: Pairs) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """The means of both, and both without them, in float64."""
    new, old = pairs.new.astype(np.float64), pairs.old.astype(np.float64)
    mean_new, mean_old = new.mean(axis=0), old.mean(axis=0)
    return mean_new, mean_old, new - mean_new, old - mean_old


def _adapter(kind: AdapterKind, **arrays: Doubles) -> Adapter:
    return Adapter(kind, {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()})
