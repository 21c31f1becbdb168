"""The verdict on a worker's golden vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest

from chunkmill.spaces.canaries import Canary, Maker
from chunkmill_workers.local.canary import compare
from chunkmill_workers.local.golden import TEXTS, VERSION

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((5, 64)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
N_TOKENS = np.array([0, 3, 7, 11, 300], np.int32)
VECTORS[0] = 0.0


def made(dtype: str = "float32", *, vectors: np.ndarray = VECTORS, n_tokens: np.ndarray = N_TOKENS) -> Canary:
    return Canary(vectors, n_tokens, Maker("host:1", "cpu", dtype, {"torch": "2"}))


def turned(text: int, cosine: float) -> np.ndarray:
    """VECTORS with one row turned until its cosine to what it was is ``cosine``."""
    vectors = VECTORS.astype(np.float64)
    aside = RNG.standard_normal(64)
    aside -= (aside @ vectors[text]) * vectors[text]
    aside /= np.linalg.norm(aside)
    vectors[text] = cosine * vectors[text] + math.sqrt(1 - cosine**2) * aside
    return vectors.astype(np.float32)


def test_equal_vectors_agree_where_there_is_none_too() -> None:
    verdict = compare(made(), made())
    assert verdict.problem is None
    assert verdict.similarity == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("mine", "reference", "gate"),
    [
        ("float32", "float32", 0.999_996),
        ("bfloat16", "float32", 0.999_879),
        ("float32", "float16", 0.999_879),
        ("float16", "bfloat16", 0.999_6),
    ],
)
def test_the_gate_is_the_sum_of_what_each_side_may_be_off(mine: str, reference: str, gate: float) -> None:
    inside, outside = 1 - 0.9 * (1 - gate), 1 - 1.1 * (1 - gate)
    agrees = compare(made(mine, vectors=turned(3, inside)), made(reference))
    assert (agrees.problem, agrees.gate) == (None, pytest.approx(gate, abs=1e-6))
    drifts = compare(made(mine, vectors=turned(3, outside)), made(reference))
    assert drifts.similarity == pytest.approx(outside, abs=1e-7)
    assert drifts.problem == (
        f"golden text 3 has a similarity of {drifts.similarity:.7f} to the reference, "
        f"and at least {drifts.gate:.7f} is wanted"
    )


def test_one_text_that_drifts_is_enough_and_the_worst_is_named() -> None:
    vectors = turned(1, 0.98)
    vectors[4] = turned(4, 0.9)[4]
    assert "golden text 4" in str(compare(made("bfloat16", vectors=vectors), made("bfloat16")).problem)


def test_a_length_that_differs_is_drift() -> None:
    scaled = VECTORS * np.float32(1.1)  # of the same direction: a normalisation that got lost
    assert compare(made(vectors=scaled), made()).problem is not None


def test_another_number_of_tokens_is_drift_at_equal_vectors() -> None:
    n_tokens = N_TOKENS.copy()
    n_tokens[4] = 301  # past the limit, where the vector does not tell
    problem = compare(made(n_tokens=n_tokens), made()).problem
    assert problem == "golden text 4 has 301 tokens here, 300 in the reference: the tokenizer differs"


def test_a_vector_for_what_the_reference_found_empty_is_drift() -> None:
    vectors = VECTORS.copy()
    vectors[0, 0] = 1.0
    assert "golden text 0" in str(compare(made(vectors=vectors), made()).problem)


@pytest.mark.parametrize("side", ["mine", "reference"])
def test_what_is_not_finite_never_agrees(side: str) -> None:
    vectors = VECTORS.copy()
    vectors[2, 5] = np.nan
    bad, good = made(vectors=vectors), made()
    verdict = compare(bad, good) if side == "mine" else compare(good, bad)
    assert "golden text 2" in str(verdict.problem)


@pytest.mark.parametrize("cut", [(slice(None), slice(32)), (slice(4), slice(None))])
def test_another_shape_is_named(cut: tuple[slice, slice]) -> None:
    other = made(vectors=VECTORS[cut], n_tokens=N_TOKENS[cut[0]])
    assert "another shape" in str(compare(made(), other).problem)


def test_a_reference_knows_its_maker() -> None:
    maker = Maker("host:1", "cuda:0 (NVIDIA L4)", "float16", {"torch": "2.13.0", "tokenizers": "0.22"})
    assert str(maker) == "host:1: float16 on cuda:0 (NVIDIA L4), tokenizers 0.22, torch 2.13.0"
    assert json.dumps(dataclasses.asdict(maker))


def test_a_change_of_the_golden_texts_is_a_new_version() -> None:
    """Workers of two releases share a space: under one version they must embed the same texts."""
    digest = hashlib.sha256(json.dumps(TEXTS).encode()).hexdigest()
    assert {1: "df43dde655d7edeb"}[VERSION] == digest[:16]
