"""Principal components against scikit-learn's exact ones, on vectors as models make them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkmill.errors import InvalidInput
from chunkmill.similarity import components, principal_components


def topics(n: int, d: int, *, seed: int = 3) -> NDArray[np.float32]:
    """``(n, d)`` unit vectors around a few centres, far from the origin, as those of texts are."""
    chance = np.random.default_rng(seed)
    centres = chance.standard_normal((5, d)) + 2
    vectors = centres[chance.integers(5, size=n)] + 0.5 * chance.standard_normal((n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(400, 64), (30, 200)])
def test_points_and_shares_are_those_of_the_exact_decomposition(
    n: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.decomposition import PCA  # every pytest process would import it as it collects the tests

    monkeypatch.setattr(components, "fitting", lambda *_, **__: 7)  # blocks that do not divide n
    vectors = topics(n, d)
    exact = PCA(3, svd_solver="full").fit(vectors.astype(np.float64))
    made = principal_components(vectors, 3)
    np.testing.assert_allclose(made.explained, exact.explained_variance_ratio_, rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.sum(made.directions[:2] * exact.components_[:2], axis=1)), 1, atol=1e-4)
    np.testing.assert_allclose(made.points, (vectors - made.mean) @ made.directions.T, atol=1e-12)
    np.testing.assert_allclose(made.directions @ made.directions.T, np.eye(3), atol=1e-9)
    largest = np.abs(made.directions).argmax(axis=1)
    assert (made.directions[np.arange(3), largest] > 0).all()


def test_the_same_vectors_give_the_same_points() -> None:
    vectors = topics(100, 32)
    assert (principal_components(vectors).points == principal_components(vectors).points).all()


@pytest.mark.parametrize(
    ("vectors", "n"), [([], 0), (np.ones((4, 3)), 4), (np.zeros((1, 8)), 1), ([[1.0], [3.0]], 2), (np.eye(2), 2)]
)
def test_what_does_not_differ_lies_at_zero(vectors: NDArray[np.float64], n: int) -> None:
    made = principal_components(vectors, 2)
    assert made.points.shape == (n, 2)
    assert np.isfinite(made.points).all()
    assert made.explained[1] == 0
    assert (made.points[:, 1] == 0).all()


def test_very_large_and_very_small_numbers_neither_overflow_nor_vanish() -> None:
    for size in (1e200, 1e-200):
        made = principal_components(size * np.array([[1.0, 0.0], [3.0, 0.1], [5.0, 0.0]]), 1)
        np.testing.assert_allclose(made.explained, 1, atol=0.01)
        np.testing.assert_allclose(np.abs(made.points[0, 0] - made.points[2, 0]), 4 * size, rtol=1e-3)


def test_a_single_vector_and_what_is_no_number_are_refused() -> None:
    for wrong, said in (([1.0, 2.0], "single vector"), ([[1.0, np.nan]], "vectors has NaN at row 0, position 1")):
        with pytest.raises(InvalidInput, match=said):
            principal_components(wrong)
    with pytest.raises(InvalidInput, match="k is 0"):
        principal_components(np.ones((2, 2)), 0)
