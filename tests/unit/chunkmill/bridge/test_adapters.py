"""Adapters of bridges: what they learn from pairs, and how they are written down."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from chunkmill.bridge import fitting
from chunkmill.bridge.adapters import Adapter
from chunkmill.bridge.fitting import Jury, Pairs, fit_all, fit_low_rank, fit_network, fit_rotation
from chunkmill.domain.bridges import AdapterKind
from chunkmill.domain.vectors import to_unit_length

Floats = NDArray[np.float32]


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "EPOCHS", 20)


def topics(n: int, d: int, seed: int) -> Floats:
    """Vectors of length 1 around 40 topics."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, d))
    made = centres[random.integers(0, 40, n)] + 0.7 * random.standard_normal((n, d))
    return to_unit_length((made + 0.5).astype(np.float32))


def turned(d: int, e: int, seed: int = 1) -> Floats:
    """``(d, e)`` with orthogonal rows or columns."""
    made = np.linalg.qr(np.random.default_rng(seed).standard_normal((max(d, e), min(d, e))))[0]
    return np.asarray(made if d > e else made.T, np.float32)


def share(adapter: Adapter, new: Floats, old: Floats, n: int = 400) -> float:
    """Of the neighbours that the last ``n`` texts have among the others, which share is found."""
    return Jury(Pairs(old[-n:], new[-n:]), Pairs(old[:-n], new[:-n])).share(adapter)


@pytest.mark.parametrize(("d", "e"), [(24, 24), (24, 32)])
def test_a_rotation_is_learnt_exactly(d: int, e: int) -> None:
    new = topics(1_000, d, 2)
    old = new @ turned(d, e)

    adapter = fit_rotation(Pairs.of(new[:500], old[:500]))

    cosines = (adapter.carry(7 * new[500:]) * old[500:]).sum(axis=1)
    assert adapter.dimensions == (d, e)
    assert cosines.min() > 0.999
    assert np.allclose(np.linalg.norm(adapter.carry(new), axis=1), 1, atol=1e-5)


def test_a_cut_space_is_carried_into_and_out_of() -> None:
    new = topics(1_400, 32, 3)
    cut = to_unit_length(new[:, :16])

    into, out_of = fit_rotation(Pairs.of(new[:1_000], cut[:1_000])), fit_rotation(Pairs.of(cut[:1_000], new[:1_000]))

    assert (into.dimensions, out_of.dimensions) == ((32, 16), (16, 32))
    assert share(into, new, cut) > 0.5
    assert share(out_of, cut, new) > 0.5


def test_few_pairs_do_a_low_rank_map_no_harm() -> None:
    new = topics(480, 64, 5)
    random = np.random.default_rng(6)
    old = to_unit_length(new @ turned(64, 64) + 0.08 * random.standard_normal((480, 64)).astype(np.float32))
    learnt, aside = Pairs.of(new[:80], old[:80]).split(0)
    rotation = fit_rotation(learnt)

    adapter = fit_low_rank(learnt, rotation, Jury(aside, learnt))

    # Least squares alone would be far below: there are fewer pairs than unknown numbers in each row.
    assert share(adapter, new, old) > share(rotation, new, old) - 0.03


def test_each_kind_of_adapter_finds_more_where_spaces_bend() -> None:
    new, random = topics(900, 24, 7), np.random.default_rng(8)
    hidden = np.maximum(4 * new @ random.standard_normal((24, 64)).astype(np.float32), 0)
    old = to_unit_length(hidden @ random.standard_normal((64, 24)).astype(np.float32) + 2 * new)

    rotation, affine, network = fit_all(Pairs.of(new[:500], old[:500]))

    assert [one.kind for one in (rotation, affine, network)] == list(AdapterKind)
    assert share(affine, new, old) > share(rotation, new, old) + 0.01
    assert share(network, new, old) > share(affine, new, old) + 0.01


def test_a_network_that_learns_nothing_is_the_map_that_it_began_with() -> None:
    new = topics(400, 24, 9)
    old = to_unit_length(new @ turned(24, 24))
    learnt, aside = Pairs.of(new, old).split(0)
    jury = Jury(aside, learnt)
    start = fit_low_rank(learnt, fit_rotation(learnt), jury)

    network = fit_network(learnt, start, jury)

    assert jury.share(network) >= jury.share(start)


def test_the_gradients_are_those_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    new, random = topics(64, 6, 10), np.random.default_rng(11)
    old = to_unit_length(new @ turned(6, 5))
    learnt, aside = Pairs.of(new, old).split(0)
    start = fit_low_rank(learnt, fit_rotation(learnt), Jury(aside, learnt))
    weights = [(0.5 * random.standard_normal(shape)).astype(np.float32) for shape in ((6, 3), (3,), (3, 5))]
    spread = np.float32(2.0)

    def loss() -> float:
        carried = fitting._network(start, weights, spread).carry(new).astype(np.float64)
        wanted = fitting._softmax(new @ new.T)
        cross = -(wanted * np.log(fitting._softmax(carried @ old.T))).sum(axis=1)
        return float((cross - fitting.ANCHOR * (carried * old).sum(axis=1)).mean())

    gradients = fitting._gradients(weights, spread, start, new, old)

    for weight, gradient in zip(weights, gradients, strict=True):
        for _ in range(4):
            place = tuple(int(random.integers(0, size)) for size in weight.shape)
            kept = weight[place]
            weight[place] = kept + 2e-2
            above = loss()
            weight[place] = kept - 2e-2
            slope = (above - loss()) / 4e-2
            weight[place] = kept
            assert gradient[place] == pytest.approx(slope, rel=0.02, abs=0.003)


def test_the_same_pairs_give_the_same_adapters() -> None:
    new = topics(300, 16, 12)
    old = to_unit_length(np.tanh(3 * new @ turned(16, 16)))

    once, again = (list(fit_all(Pairs.of(new, old))) for _ in range(2))

    assert [one.to_bytes() for one in once] == [one.to_bytes() for one in again]


@pytest.fixture
def learnt() -> list[Adapter]:
    new = topics(100, 12, 13)
    return list(fit_all(Pairs.of(new, to_unit_length(new[:, :8]))))


@pytest.mark.parametrize("number", range(3))
def test_an_adapter_is_read_as_it_was_written(learnt: list[Adapter], number: int) -> None:
    adapter, vectors = learnt[number], topics(20, 12, 14)
    data = adapter.to_bytes()
    shapes = dict(sorted(adapter.shapes().items()))  # a JSON object of Postgres has an order of its own

    again = Adapter.from_bytes(adapter.kind.value, shapes, data)

    assert np.array_equal(again.carry(vectors), adapter.carry(vectors))
    assert data[:4] == np.float32(adapter.arrays["mean_from"][0]).astype("<f4").tobytes()
    assert (len(data), again.dimensions) == (adapter.nbytes, (12, 8))


def test_a_damaged_adapter_is_refused(learnt: list[Adapter]) -> None:
    network = learnt[2]
    kind, shapes, data = network.kind.value, network.shapes(), network.to_bytes()
    infinite = np.float32(np.inf).tobytes()

    for wrong in (
        (kind, shapes, data[:-1]),
        (kind, shapes, data + bytes(4)),
        (kind, shapes, infinite + data[4:]),
        (kind, shapes | {"mean_from": [8], "mean_to": [12]}, data),
        (kind, shapes | {"mean_from": [-12]}, data),
        (kind, {name: shapes[name] for name in shapes if name != "bias"}, data),
        ("rotation", shapes, data),
        ("unknown", shapes, data),
    ):
        with pytest.raises(ValueError, match=r"adapter|bytes|AdapterKind"):
            Adapter.from_bytes(*wrong)


def test_too_few_pairs_and_pairs_that_do_not_match_are_refused() -> None:
    new = topics(40, 8, 15)

    for others in (new[:31], new[:39]):
        with pytest.raises(ValueError, match="pairs"):
            Pairs.of(new[: len(others) - (len(others) == 39)], others)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_directions_are_those_of_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(16).standard_normal(shape)

    directions = fitting._directions(matrix)

    wanted = np.linalg.svd(matrix, full_matrices=False)[2]
    assert np.abs((directions * wanted).sum(axis=1)) == pytest.approx(np.ones(len(wanted)))
