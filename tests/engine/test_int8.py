"""The int8 profile: near fp32, the same alone as in a batch, and refused where it cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chunkmill.domain.spaces import Precision
from chunkmill.errors import InvalidSetting
from chunkmill_workers.engine import Engine, precision

from .conftest import ODD_TEXTS, stdlib_docstrings
from .faulty import FaultyBackend, has_word

native = pytest.mark.skipif(not precision.cpu_has_int8(), reason="this processor has no VNNI and no AMX-INT8")


@pytest.fixture(scope="module")
def int8() -> Engine:
    return Engine.load("all-MiniLM-L6-v2", device="cpu", precision=Precision.INT8)


@native
def test_vectors_stay_near_fp32(int8: Engine, minilm: Engine) -> None:
    docstrings = list(stdlib_docstrings()[::8])

    cosines = (int8.embed(docstrings).vectors * minilm.embed(docstrings).vectors).sum(1)
    odd = (int8.embed(ODD_TEXTS).vectors * minilm.embed(ODD_TEXTS).vectors).sum(1)

    assert cosines.mean() >= 0.998  # 0.9991 measured; the promise is 0.995
    assert cosines.min() >= 0.99
    assert odd.min() >= 0.98


@native
def test_a_text_alone_is_itself_in_a_batch(int8: Engine) -> None:
    texts = [*stdlib_docstrings()[:40], *ODD_TEXTS]

    together = int8.embed(texts).vectors
    alone = np.vstack([int8.embed([text]).vectors for text in texts])

    assert (together * alone).sum(1).min() >= 0.9999


@native
def test_its_vectors_are_a_space_of_their_own(int8: Engine, minilm: Engine) -> None:
    assert int8.spec.precision is Precision.INT8
    assert int8.spec.fingerprint != minilm.spec.fingerprint


def test_it_is_refused_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill.machine._cpuinfo", lambda: {"flags": "avx2 avx512f avx512_bf16"})

    with pytest.raises(InvalidSetting, match="EMBEDDING_PRECISION=float"):
        Engine.load("all-MiniLM-L6-v2", device="cpu", precision=Precision.INT8)


def test_it_is_refused_for_other_backends(toy_path: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidSetting, match="native"):
        Engine.load(str(toy_path("bert-mean")), device="cpu", precision=Precision.INT8, backend="transformers")


@native
def test_a_vector_that_is_not_finite_is_computed_again_in_int8(int8: Engine, minilm: Engine) -> None:
    """One in fp32 would be no vector of its space.

    Attention that holds scores of any size is rounded in another way on some processors, and so is all after it.
    """
    texts = ["fine", "poison", "good"]
    expected = int8.embed(texts).vectors
    careful = Engine.load("all-MiniLM-L6-v2", device="cpu", precision=Precision.INT8)
    careful._runner.backend = careful._backend.careful_twin()
    expected[1] = careful.embed(texts).vectors[1]
    assert np.abs(expected - minilm.embed(texts).vectors).max(1).min() > 1e-4
    engine = Engine.load("all-MiniLM-L6-v2", device="cpu", precision=Precision.INT8)
    engine._runner.backend = faulty = FaultyBackend(engine._backend)
    faulty.spoils = has_word(engine, "poison")

    np.testing.assert_allclose(engine.embed(texts).vectors, expected, atol=1e-5)
