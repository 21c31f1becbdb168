"""top_k equals a stable sort of all values, in whatever blocks and batches the vectors come."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from chunkmill import similarity
from chunkmill.errors import InvalidInput
from chunkmill.similarity import Measure, arrays

Array = NDArray[Any]


def sorted_all(queries: Array, vectors: Array, k: int, measure: Measure) -> tuple[Array, Array]:
    """All values in float64, rounded to float32, and sorted so that equal ones keep their order."""
    a, b = queries.astype(np.float64), vectors.astype(np.float64)
    values = np.empty((len(a), len(b)))
    for i, query in enumerate(a):
        products = (b * query).sum(axis=1)
        if measure == Measure.COSINE:
            lengths = np.sqrt((b * b).sum(axis=1)) * np.sqrt((query * query).sum())
            values[i] = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
        elif measure == Measure.DOT:
            values[i] = products
        elif measure == Measure.EUCLIDEAN:
            values[i] = np.sqrt(((b - query) ** 2).sum(axis=1))
        else:
            values[i] = np.abs(b - query).sum(axis=1)
    rounded = values.astype(np.float32)
    order = np.argsort(rounded if measure.is_distance else -rounded, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(rounded, order, axis=1)


@settings(max_examples=40)
@given(
    n=st.integers(1, 300), q=st.integers(1, 8), d=st.integers(1, 20), k=st.integers(1, 40),
    distinct=st.integers(1, 300), measure=st.sampled_from(Measure), block=st.sampled_from([256, 4096, 2**25]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_the_nearest_are_those_of_a_stable_sort_of_everything(
    n: int, q: int, d: int, k: int, distinct: int, measure: Measure, block: int, seed: int
) -> None:
    """Small whole numbers, of which many vectors are equal: every sum is exact, so that equal values are ties."""
    random = np.random.default_rng(seed)
    kinds = random.integers(-3, 4, (distinct, d)).astype(np.float32)
    vectors = kinds[random.integers(0, distinct, n)]
    queries = random.integers(-3, 4, (q, d)).astype(np.float32)
    ids, values = sorted_all(queries, vectors, k, measure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK_BYTES", block)
        nearest = similarity.top_k(queries, vectors, k, measure)
    np.testing.assert_array_equal(nearest.values, values)
    np.testing.assert_array_equal(nearest.ids, ids)
    assert nearest.ids.dtype == np.int64


@pytest.mark.parametrize("measure", Measure)
def test_equal_vectors_are_ties_wherever_they_stand(measure: Measure) -> None:
    """In a product of matrices, equal rows may have values that differ in the last bit."""
    random = np.random.default_rng(5)
    kinds = random.standard_normal((7, 384)).astype(np.float32)
    rows = random.integers(0, 7, 3001)
    queries = random.standard_normal((5, 384)).astype(np.float32)
    ids, values = sorted_all(queries, kinds[rows], 700, measure)
    nearest = similarity.top_k(queries, kinds[rows], 700, measure)
    np.testing.assert_array_equal(nearest.ids, ids)
    np.testing.assert_allclose(nearest.values, values, rtol=1e-6)
    alone = similarity.top_k(queries[3], kinds[rows], 700, measure)
    np.testing.assert_array_equal(alone.ids, ids[3])
    np.testing.assert_array_equal(alone.values, nearest.values[3])


@pytest.mark.parametrize("measure", [Measure.COSINE, Measure.EUCLIDEAN, Measure.MANHATTAN])
def test_the_nearest_are_those_of_scikit_learn(measure: Measure) -> None:
    from sklearn.neighbors import NearestNeighbors

    random = np.random.default_rng(6)
    vectors, queries = random.standard_normal((5000, 48)), random.standard_normal((20, 48))
    reference = NearestNeighbors(n_neighbors=15, metric=str(measure), algorithm="brute").fit(vectors)
    distances, ids = reference.kneighbors(queries)
    nearest = similarity.top_k(queries, vectors, 15, measure)
    np.testing.assert_array_equal(nearest.ids, ids)
    values = 1 - nearest.values if measure == Measure.COSINE else nearest.values
    np.testing.assert_allclose(values, distances, rtol=1e-9)


@pytest.mark.parametrize("measure", Measure)
def test_batches_give_what_the_whole_array_gives(measure: Measure) -> None:
    random = np.random.default_rng(7)
    vectors = random.integers(-2, 3, (1000, 6)).astype(np.float32)
    queries = vectors[:9] + np.float32(0.5)
    whole = similarity.top_k(queries, vectors, 25, measure)

    def batches(names: Any) -> Iterator[tuple[Any, Array]]:
        yield [], vectors[:0]
        for start in range(0, 1000, 77):
            yield names[start : start + 77], vectors[start : start + 77]

    texts = similarity.top_k_of_batches(queries, batches([f"chunk {i}" for i in range(1000)]), 25, measure)
    assert texts.ids.tolist() == [[f"chunk {i}" for i in row] for row in whole.ids]
    np.testing.assert_array_equal(texts.values, whole.values)
    numbers = similarity.top_k_of_batches(queries, batches(np.arange(1000) * 10), 25, measure)
    assert numbers.ids.dtype == np.int64
    np.testing.assert_array_equal(numbers.ids, whole.ids * 10)


def test_the_best_of_a_long_stream_need_only_one_batch_of_memory() -> None:
    """Each batch is better than all before it, so that nothing can be left out unseen."""

    def batches() -> Iterator[tuple[range, Array]]:
        for number in range(200):
            yield range(number * 500, number * 500 + 500), np.full((500, 64), number, np.float32)

    query = np.ones(64, np.float32)
    similarity.top_k_of_batches(query, [([1], query[np.newaxis])], 1)  # what is imported then is not counted
    tracemalloc.start()
    nearest = similarity.top_k_of_batches(query, batches(), 3, "dot")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert nearest.ids.tolist() == [99_500, 99_501, 99_502]
    assert peak < 3 * 2**20  # all batches have 25.6 MB


def test_few_vectors_no_vectors_and_no_queries() -> None:
    vectors = np.eye(3, dtype=np.float32)
    assert similarity.top_k(vectors[0], vectors, 10).ids.tolist() == [0, 1, 2]
    assert similarity.top_k(vectors, [], 10).values.shape == (3, 0)
    assert similarity.top_k([], vectors, 2).ids.shape == (0, 2)
    assert similarity.top_k_of_batches(vectors[0], [], 2).ids.shape == (0,)


@pytest.mark.parametrize("measure", Measure)
def test_values_beyond_float32_are_infinite_and_ties(measure: Measure) -> None:
    vectors = np.float32([[-3e38] * 4, [3e38] * 4, [1, 0, 0, 0], [3e38] * 4])
    nearest = similarity.top_k(np.float32([3e38] * 4), vectors, 3, measure)
    assert nearest.ids[:2].tolist() == [1, 3]
    assert not np.isnan(nearest.values).any()


def test_a_later_batch_may_need_float64() -> None:
    batches = [([0], np.float32([[1, 0]])), ([1], np.array([[1.0, 1e-12]])), ([2], np.float32([[0, 1]]))]
    nearest = similarity.top_k_of_batches(np.float32([1, 1]), batches, 3, "dot")
    assert (nearest.ids.tolist(), nearest.values.dtype) == ([1, 0, 2], np.float64)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([(["a"], [[1.0, 2]]), (["b"], [[1.0, float("nan")]])], "batch 1 has NaN at row 0, position 1"),
        ([(["a"], [[1.0, 2, 3]])], "queries has vectors of 2 numbers and batch 0 of 3"),
        ([(["a"], [[1.0, 2], [3, 4]])], r"batch 0 has 1 ids and vectors of the shape \(2, 2\)"),
        ([(["a", "b"], [1.0, 2])], "batch 0 has 2 ids"),
        ([7], "batch 0 is not a pair of ids and vectors"),
    ],
)
def test_a_wrong_batch_is_named(batches: list[Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        similarity.top_k_of_batches([1.0, 2], batches, 1)


def test_k_and_measure_are_checked() -> None:
    with pytest.raises(InvalidInput, match="k is 0; it must be at least 1"):
        similarity.top_k([1.0], [[1.0]], 0)
    with pytest.raises(InvalidInput, match="measure is 'l3'"):
        similarity.top_k([1.0], [[1.0]], 1, "l3")
