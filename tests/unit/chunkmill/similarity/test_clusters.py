"""k-means against scikit-learn, and what holds of every result. The import of scikit-learn takes more than a second,
so that only the tests that need it pay for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkmill import similarity
from chunkmill.errors import InvalidInput
from chunkmill.similarity import Measure, arrays, clusters

Array = NDArray[Any]


def groups(n: int, k: int, d: int, *, seed: int, width: float = 1.0, offset: float = 0.0) -> tuple[Array, Array]:
    """Vectors around ``k`` points, and the number of the point of each."""
    random = np.random.default_rng(seed)
    points = random.standard_normal((k, d)) * 10
    belongs = random.permutation(np.arange(n) % k)
    return (points[belongs] + width * random.standard_normal((n, d)) + offset).astype(np.float32), belongs


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("k", [1, 6, 450])
def test_lloyd_ends_where_scikit_learn_does(k: int, offset: float) -> None:
    """From the same centres, in float64; 450 centres are summed in the other way."""
    vectors = groups(2000, 12, 20, seed=1, width=8, offset=offset)[0].astype(np.float64)
    start = vectors[:k]
    ours = similarity.kmeans(vectors, k, start=start, tolerance=0)
    from sklearn.cluster import KMeans

    theirs = KMeans(k, init=start, n_init=1, tol=0, max_iter=300, algorithm="lloyd").fit(vectors)
    assert ours.converged
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    np.testing.assert_allclose(ours.centres, theirs.cluster_centers_, rtol=1e-9, atol=1e-9)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-9)


@settings(max_examples=40)
@given(
    n=st.integers(1, 120), d=st.integers(1, 6), k=st.integers(1, 20), distinct=st.integers(1, 40),
    measure=st.sampled_from([Measure.EUCLIDEAN, Measure.COSINE]), batch=st.sampled_from([None, 1, 16, 1000]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_what_holds_of_every_result(
    n: int, d: int, k: int, distinct: int, measure: Measure, batch: int | None, seed: int
) -> None:
    random = np.random.default_rng(seed)
    k = min(k, n)
    vectors = random.integers(-4, 5, (distinct, d))[random.integers(0, distinct, n)].astype(np.float32)
    if measure == Measure.COSINE:
        vectors[~vectors.any(axis=1)] = 1
    ours = similarity.kmeans(vectors, k, measure=measure, batch_size=batch, seed=seed, tolerance=0)
    again = similarity.kmeans(vectors, k, measure=measure, batch_size=batch, seed=seed, tolerance=0)
    np.testing.assert_array_equal(ours.centres, again.centres)
    assert (ours.centres.shape, ours.labels.shape) == ((k, d), (n,))
    assert (ours.centres.dtype, ours.labels.dtype) == (np.float32, np.int64)
    seen = similarity.normalise(vectors) if measure == Measure.COSINE else vectors
    squares = ((seen[:, None].astype(np.float64) - ours.centres) ** 2).sum(axis=2)
    own = squares[np.arange(n), ours.labels]
    assert (own <= squares.min(axis=1) + 1e-4).all()  # the label is the nearest centre's
    assert ours.inertia == pytest.approx(own.sum() / (2 if measure == Measure.COSINE else 1), rel=1e-3, abs=1e-3)
    different = len(np.unique(seen.round(5), axis=0))
    assert len(np.unique(ours.labels)) == min(k, different)  # a cluster is empty only if there is no vector for it
    if measure == Measure.COSINE:
        np.testing.assert_allclose(np.linalg.norm(ours.centres, axis=1), 1, atol=1e-6)
    elif batch is None and ours.converged:
        for label in np.unique(ours.labels):
            np.testing.assert_allclose(ours.centres[label], seen[ours.labels == label].mean(axis=0), atol=1e-5)


def test_a_cluster_that_is_empty_from_the_start_gets_the_farthest_vector() -> None:
    vectors = np.float32([[0, 0], [1, 0], [0, 1], [100, 100], [101, 100], [40, 0]])
    start = np.float32([[0, 0], [100, 100], [1e6, 1e6]])
    ours = similarity.kmeans(vectors, 3, start=start)
    assert ours.converged
    assert ours.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert ours.centres[2].tolist() == [40, 0]


@pytest.mark.parametrize("batch", [None, 200])
def test_plus_plus_starts_in_every_group(batch: int | None) -> None:
    vectors, belongs = groups(3000, 10, 16, seed=2, width=0.01)
    for seed in range(10):
        ours = similarity.kmeans(vectors, 10, seed=seed, batch_size=batch)
        assert len(set(zip(ours.labels.tolist(), belongs.tolist(), strict=True))) == 10


def test_mini_batches_come_near_to_scikit_learns() -> None:
    from sklearn.cluster import MiniBatchKMeans

    vectors, _ = groups(5000, 30, 16, seed=3, width=5)
    ours = np.median([similarity.kmeans(vectors, 30, batch_size=256, seed=i).inertia for i in range(5)])
    theirs = np.median(
        [MiniBatchKMeans(30, batch_size=256, n_init=1, random_state=i).fit(vectors).inertia_ for i in range(5)]
    )
    whole = similarity.kmeans(vectors, 30).inertia
    assert ours < 1.05 * theirs
    assert ours < 1.1 * whole


def test_cosine_groups_by_direction_alone() -> None:
    random = np.random.default_rng(4)
    directions = similarity.normalise(random.standard_normal((5, 32)))
    belongs = np.arange(500) % 5
    lengths = 10.0 ** random.uniform(-6, 6, 500)
    vectors = (directions[belongs] + 0.02 * random.standard_normal((500, 32))) * lengths[:, np.newaxis]
    ours = similarity.kmeans(vectors.astype(np.float32), 5, measure="cosine")
    assert len(set(zip(ours.labels.tolist(), belongs.tolist(), strict=True))) == 5
    cosines = similarity.cosine(vectors, ours.centres)[np.arange(500), ours.labels]
    assert ours.inertia == pytest.approx((1 - cosines).sum(), rel=1e-3)


@pytest.mark.parametrize("size", [1e-44, 1e-25, 1e25, 3e38])
def test_clusters_of_very_small_and_very_large_numbers(size: float) -> None:
    vectors = np.float32([[size, 0], [size, size], [-size, 0], [-size, -size]])
    ours = similarity.kmeans(vectors, 2)
    assert ours.labels[0] == ours.labels[1] != ours.labels[2] == ours.labels[3]
    assert np.isfinite(ours.centres).all()
    assert not np.isnan(ours.inertia)


def test_groups_far_from_the_origin_are_told_apart_in_float32() -> None:
    vectors, belongs = groups(1000, 4, 8, seed=5, width=0.5, offset=1e5)
    ours = similarity.kmeans(vectors, 4)
    assert len(set(zip(ours.labels.tolist(), belongs.tolist(), strict=True))) == 4


def test_vectors_that_are_not_kept_in_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = groups(1500, 7, 12, seed=6)
    whole = similarity.kmeans(vectors, 7)
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(clusters, "BLOCK_BYTES", 4096)
    parts = similarity.kmeans(vectors, 7)
    np.testing.assert_array_equal(parts.labels, whole.labels)
    np.testing.assert_allclose(parts.centres, whole.centres, rtol=1e-5, atol=1e-5)


def test_what_ends_a_run_is_told() -> None:
    vectors, _ = groups(2000, 40, 8, seed=7, width=6)
    stopped = similarity.kmeans(vectors, 40, max_iterations=2, tolerance=0)
    assert (stopped.iterations, stopped.converged) == (2, False)
    ended = similarity.kmeans(vectors, 40, tolerance=0)
    assert ended.converged
    assert 2 < ended.iterations < 300
    assert ended.inertia < stopped.inertia


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 4}, "k is 4; it must be at most 3"),
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"measure": "dot"}, "measure is 'dot'; the clusters of k-means need one of: euclidean, cosine"),
        ({"measure": "cosine"}, "vectors has only zeros in row 1, which has no direction"),
        ({"start": [[1, 2]]}, r"start has the shape \(1, 2\); it must be one row for each of the 2 centres"),
        ({"start": [[1], [2]]}, "vectors has vectors of 2 numbers and start of 1"),
        ({"start": [[1, 2], [float("inf"), 2]]}, "start has an infinite number at row 1, position 0"),
        ({"vectors": [[1, 2], [3, 4], [5, float("nan")]]}, "vectors has NaN at row 2, position 1"),
        ({"vectors": [1, 2, 3]}, r"vectors has the shape \(3,\); it must be at least one row"),
        ({"vectors": []}, r"vectors has the shape \(0,\)"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"tolerance": -1}, "tolerance is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_clustered_is_named(arguments: dict[str, Any], message: str) -> None:
    given = {"vectors": [[1, 2], [0, 0], [3, 4]], "k": 2} | arguments
    with pytest.raises(InvalidInput, match=message):
        similarity.kmeans(**given)
