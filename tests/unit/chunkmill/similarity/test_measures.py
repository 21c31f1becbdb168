"""The four measures against SciPy and scikit-learn, and on numbers that break the usual formulas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
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
MEASURES: dict[Measure, Callable[..., Array]] = {
    Measure.COSINE: similarity.cosine,
    Measure.DOT: similarity.dot,
    Measure.EUCLIDEAN: similarity.euclidean,
    Measure.MANHATTAN: similarity.manhattan,
}
TYPES = [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int64, np.bool_]


def expected(measure: Measure, a: Array, b: Array) -> Array:
    """By libraries, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not len(a) or not len(b):
        return np.empty((len(a), len(b)))
    if measure == Measure.COSINE:
        return libraries_cosine(a, b)
    if measure == Measure.DOT:
        return a @ b.T
    from scipy.spatial.distance import cdist

    distances: Array = cdist(a, b, "euclidean" if measure == Measure.EUCLIDEAN else "cityblock")
    return distances


def libraries_cosine(a: Array, b: Array | None = None) -> Array:
    """By scikit-learn, whose import takes more than a second: only the tests that need it pay for it."""
    from sklearn.metrics.pairwise import cosine_similarity

    cosines: Array = cosine_similarity(a, b)
    return cosines


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 1024)


def close(measure: Measure, given: Array, a: Array, b: Array) -> None:
    d = a.shape[1]
    unit = float(np.finfo(given.dtype).eps)
    wanted = expected(measure, a, b)
    lengths = np.linalg.norm(a.astype(np.float64), axis=1)[:, None] * np.linalg.norm(b.astype(np.float64), axis=1)
    if measure == Measure.COSINE:
        assert np.abs(given - wanted).max(initial=0) <= (d + 4) * unit
        assert np.abs(given).max(initial=0) <= 1
    elif measure == Measure.DOT:
        assert (np.abs(given - wanted) <= d * unit * lengths).all()
    elif measure == Measure.EUCLIDEAN:
        assert (np.abs(given - wanted) <= (2.0**-23 if given.dtype == np.float32 else 2.0**-39) * wanted).all()
    else:
        assert (np.abs(given - wanted) <= (d + 2) * unit * wanted).all()


@settings(max_examples=40)
@given(
    n=st.integers(0, 40), m=st.integers(0, 40), d=st.integers(1, 70),
    first=st.sampled_from(TYPES), second=st.sampled_from(TYPES),
    spread=st.integers(-6, 6), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_matrices_are_those_of_scipy_and_scikit_learn(
    n: int, m: int, d: int, first: type, second: type, spread: int, seed: int
) -> None:
    random = np.random.default_rng(seed)

    def some(rows: int, kind: type) -> Array:
        size = 2.0 ** random.integers(-abs(spread), abs(spread) + 1, (rows, 1))
        made = random.standard_normal((rows, d)) * size
        return made.astype(kind) if np.issubdtype(kind, np.floating) else (made * 5).clip(0, 100).astype(kind)

    a, b = some(n, first), some(m, second)
    if n and m:
        b[-1], a[0] = 0, 0  # vectors of zeros
    for measure, function in MEASURES.items():
        result = function(a, b)
        assert result.shape == (n, m)
        assert result.dtype == np.result_type(
            np.float32, *(np.float64 if k == np.int64 else k for k in (first, second))
        )
        close(measure, result, a, b)


@pytest.mark.parametrize("measure", Measure)
@pytest.mark.usefixtures("small_blocks")
def test_the_result_is_the_same_in_small_blocks(measure: Measure) -> None:
    random = np.random.default_rng(1)
    a, b = (random.standard_normal((n, 33)).astype(np.float32) for n in (60, 41))
    close(measure, MEASURES[measure](a, b), a, b)
    close(measure, MEASURES[measure](b, a), b, a)
    seen = np.zeros((60, 41), np.int64)
    for rows, columns, part in similarity.blocks(a, b, measure):
        assert part.nbytes <= 1024
        seen[rows, columns] += 1
        close(measure, part, a[rows], b[columns])
    assert (seen == 1).all()


@pytest.mark.parametrize("measure", Measure)
def test_one_vector_and_many_have_the_shapes_that_are_promised(measure: Measure) -> None:
    function = MEASURES[measure]
    a, b = np.float32([[1, 2, 3], [-1, 0, 5]]), np.float32([[4, 0, 1], [1, 2, 3], [0, 1, 0]])
    whole = function(a, b)
    assert function(a[0], b[1]).shape == ()
    assert float(function(a[0], b[2])) == pytest.approx(whole[0, 2], rel=1e-6)
    np.testing.assert_allclose(function(a[1], b), whole[1], rtol=1e-6)
    np.testing.assert_allclose(function(a, b[0]), whole[:, 0], rtol=1e-6)
    assert function([], b).shape == (0, 3)
    assert function(a, []).shape == (2, 0)
    assert function(a[0], []).shape == (0,)


@pytest.mark.parametrize("measure", Measure)
def test_any_layout_is_read_and_nothing_that_is_given_changes(measure: Measure, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    base = random.standard_normal((40, 24)).astype(np.float32)
    base.flags.writeable = False
    np.save(tmp_path / "a.npy", base)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    wanted = MEASURES[measure](base[::2].copy(), base[1::2].copy())
    for a, b in [
        (base[::2], base[1::2]),
        (np.asfortranarray(base[::2]), base[1::2][::-1][::-1]),
        (mapped[::2], base[1::2]),
        (base[::2].astype(">f4"), base[1::2]),
    ]:
        np.testing.assert_array_equal(MEASURES[measure](a, b), wanted)
    lists = MEASURES[measure](base[::2].tolist(), base[1::2].tolist())
    assert lists.dtype == np.float64
    np.testing.assert_allclose(lists, wanted, rtol=1e-4, atol=1e-5)


def test_a_result_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    a, b = np.eye(3, 4, dtype=np.float32), np.eye(5, 4, dtype=np.float32)
    out = np.memmap(tmp_path / "out", dtype=np.float32, mode="w+", shape=(3, 5))
    assert similarity.dot(a, b, out=out) is out
    np.testing.assert_array_equal(out, a @ b.T)
    for wrong in (np.empty((5, 3), np.float32), np.empty((3, 5)), [[0.0]]):
        with pytest.raises(
            InvalidInput, match=r"out is .*; it must be a writable array of float32 with the shape \(3, 5\)"
        ):
            similarity.dot(a, b, out=wrong)  # type: ignore[arg-type]


def exact_distance(a: Array, b: Array) -> float:
    """By fractions, which round nothing until the root."""
    square = sum((Fraction(float(x)) - Fraction(float(y))) ** 2 for x, y in zip(a, b, strict=True))
    if not square:
        return 0.0
    shift = square.numerator.bit_length() - square.denominator.bit_length() >> 1
    return float(np.ldexp(np.sqrt(float(square / Fraction(4) ** shift)), shift))


@pytest.mark.parametrize(("kind", "error"), [(np.float32, 2.0**-23), (np.float64, 2.0**-39)])
@pytest.mark.parametrize("offset", [0.0, 1e-30, 1.0, 1e6, 1e30])
def test_distances_of_nearly_equal_vectors_do_not_cancel(kind: Any, error: float, offset: float) -> None:
    """Each vector differs from the one before it in the last bit of one number, or is far from all others."""
    random = np.random.default_rng(3)
    one = (random.standard_normal(96) + offset).astype(kind)
    vectors = [one]
    for i in range(6):
        vectors.append(vectors[-1].copy())
        vectors[-1][i] = np.nextafter(vectors[-1][i], kind(np.inf))
    vectors += [-one, one * kind(1.5), np.zeros(96, kind)]
    many = np.array(vectors)
    given = similarity.euclidean(many, many)
    for i, a in enumerate(many):
        for j, b in enumerate(many):
            assert abs(given[i, j] - exact_distance(a, b)) <= error * exact_distance(a, b), (i, j)
    assert (np.diag(given) == 0).all()
    np.testing.assert_allclose(similarity.euclidean(many[0], many), given[0], rtol=2 * error, atol=0)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-22, 1e22, 3e38])
def test_float32_of_any_size_keeps_direction_and_distance(size: float) -> None:
    a, b = np.float32([[size, 0], [size, size]]), np.float32([[0, size], [size, 0]])
    np.testing.assert_allclose(similarity.cosine(a, b), [[0, 1], [2**-0.5, 2**-0.5]], atol=1e-7)
    np.testing.assert_allclose(similarity.normalise(a), [[1, 0], [2**-0.5, 2**-0.5]], atol=1e-7)
    small = float(np.float32(size))
    with np.errstate(over="ignore"):
        wanted = np.array([[2**0.5 * small, 0], [small, small]]).astype(np.float32)
        products = np.array([[0, small**2], [small**2, small**2]]).astype(np.float32)
    np.testing.assert_array_equal(similarity.euclidean(a, b), wanted)
    np.testing.assert_allclose(similarity.dot(a, b), products, rtol=1e-6)


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-160, 1e160, 1.7e308])
def test_float64_of_any_size_keeps_direction_and_distance(size: float) -> None:
    a, b = np.array([[size, 0], [size, size]]), np.array([[0, size], [size, 0]])
    np.testing.assert_allclose(similarity.cosine(a, b), [[0, 1], [2**-0.5, 2**-0.5]], atol=1e-15)
    np.testing.assert_allclose(similarity.normalise(a), [[1, 0], [2**-0.5, 2**-0.5]], atol=1e-15)
    distances = similarity.euclidean(np.repeat(a, 4, axis=0), np.repeat(b, 4, axis=0))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(distances[::4, ::4], [[np.float64(2**0.5) * size, 0], [size, size]], rtol=1e-15)


def test_very_different_lengths_in_one_call_disturb_no_other_pair() -> None:
    random = np.random.default_rng(4)
    for kind, sizes in ((np.float32, [1e-40, 1e-20, 1, 1e18, 1e37]), (np.float64, [1e-300, 1e-160, 1, 1e150, 1e300])):
        directions = random.standard_normal((5, 16))
        vectors = np.concatenate([directions * size for size in sizes]).astype(kind)
        given = similarity.euclidean(vectors, vectors)
        for i in range(0, 25, 3):
            for j in range(25):
                wanted = exact_distance(vectors[i], vectors[j])
                assert given[i, j] == pytest.approx(wanted, rel=2e-7, abs=0)
        angles = similarity.cosine(vectors[5:], vectors[5:])
        for k in range(0, 20, 5):
            np.testing.assert_allclose(angles[:5, k : k + 5], libraries_cosine(directions), atol=1e-6)


def test_a_sum_that_overflows_on_its_way_is_made_again() -> None:
    a, b = np.float32([[1e30, 1e30, 2]]), np.float32([[1e30, -1e30, 2], [1e30, 1e30, 0]])
    assert similarity.dot(a, b).tolist() == [[pytest.approx(0, abs=1e53 / 1e20 * 1e11), np.inf]]
    wide = similarity.dot([1e300, 1e-300], [[1e-300, 1e300], [1e300, 0], [-1e300, 0]])
    assert wide.tolist() == [2, np.inf, -np.inf]
    assert similarity.dot([1e200, 0, 1], [[1e200, 0, 0]]).tolist() == [np.inf]
    assert not np.isnan(similarity.dot([1e200, 1e200], [[1e200, -1e200]])).any()
    assert similarity.manhattan(np.float32([3e38]), np.float32([[-3e38], [3e38]])).tolist() == [np.inf, 0]


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1)
)
def test_no_finite_input_makes_nan(rows: list[list[float]]) -> None:
    for kind in (np.float32, np.float64):
        vectors = np.array(rows, dtype=kind)
        units = similarity.normalise(vectors)
        lengths = np.linalg.norm(units.astype(np.float64), axis=1)
        assert (np.abs(lengths - vectors.any(axis=1)) < 3e-7).all()
        for function in MEASURES.values():
            assert not np.isnan(function(vectors, vectors)).any()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([[1, 2], [NAN, 2]], r"b has NaN at row 1, position 0"),
        ([[1, 2], [1, 2], [0, -INF]], r"b has an infinite number at row 2, position 1"),
        ([1, INF], r"b has an infinite number at position 1"),
        (np.array([[1, NAN]], np.float16), r"b has NaN at row 0, position 1"),
        ([[1, 2, 3]], r"a has vectors of 2 numbers and b of 3; only vectors of one space"),
        ([[1, 2], [1]], r"b \(see row 1, which differs from row 0\) is not a vector"),
        ([["x", "y"]], r"b has the type <U1; it must have real numbers"),
        ([[1j, 2]], r"b has the type complex128"),
        (None, r"b has the type object"),
        (iter([[1, 2]]), r"b has the type object"),
        (np.zeros((2, 2, 2)), r"b has the shape \(2, 2, 2\); it must be one vector"),
        (3.0, r"b has the shape \(\)"),
        (np.zeros((3, 0)), r"b has the shape \(3, 0\); a vector has at least one number"),
        (np.ma.masked_equal([[1, 2]], 2), r"b has masked numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("measure", Measure)
def test_what_cannot_be_compared_is_named(measure: Measure, wrong: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{message}"):
        MEASURES[measure](np.float32([[1, 2]]), wrong)


@pytest.mark.usefixtures("small_blocks")
def test_a_wrong_number_is_named_by_its_row_in_the_whole_array() -> None:
    vectors = np.ones((500, 7), np.float32)
    vectors[433, 5] = NAN
    for call in (
        similarity.normalise,
        lambda given: similarity.top_k(vectors[0], given, 3),
        lambda given: list(similarity.blocks(vectors[:2], given)),
    ):
        with pytest.raises(InvalidInput, match=r"has NaN at row 433, position 5"):
            call(vectors)  # type: ignore[operator]


def test_large_numbers_that_are_finite_are_taken() -> None:
    vectors = np.full((3, 5), 3e38, np.float32)
    np.testing.assert_allclose(similarity.normalise(vectors), 5**-0.5, rtol=1e-6)
    with pytest.raises(
        InvalidInput, match="measure is 'cosinus'; it must be one of: cosine, dot, euclidean, manhattan"
    ):
        similarity.blocks(vectors, vectors, "cosinus")


def test_importing_the_toolkit_brings_nothing_along_but_numpy() -> None:
    script = (
        "import sys; from chunkmill import similarity; "
        "print({'sqlalchemy', 'psycopg', 'celery', 'redis', 'torch', 'scipy', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
