"""Few numbers of slots reach the matrix products of a CPU, because oneDNN compiles and keeps a product for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.encoder import linear
from chunkmill_workers.engine.encoder.architectures import Build, build_encoder
from chunkmill_workers.engine.encoder.encoder import _rounded
from tests.engine.conftest import FAMILIES, libraries, save_transformer

CPU = torch.device("cpu")
TOKENS = 96


@pytest.fixture(scope="module", params=["bert", "modernbert", "qwen3"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[NativeBackend, set[int]]:
    """A backend, and the numbers of slots that its products have had. Positions are learned, rotary, and rotary with
    grouped heads."""
    seen: set[int] = set()
    assert request.param in FAMILIES
    folder = save_transformer(tmp_path_factory.mktemp("model"), request.param, max_position_embeddings=TOKENS)
    model = libraries()[1].AutoModel.from_pretrained(folder).eval()

    def counted(weight: torch.Tensor, bias: Any, slots: int, activation: str | None) -> linear.Linear:
        act = linear.ACTIVATIONS[activation] if activation else lambda values: values

        def product(x: torch.Tensor) -> torch.Tensor:
            seen.add(len(x))
            return act(torch.nn.functional.linear(x, weight, bias))

        return product

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "packable", lambda _: True)
        patch.setattr(linear, "_packed", counted)
        encoder = build_encoder(model, Build(torch.float32, CPU, 256, TOKENS))
    return NativeBackend(encoder, device=CPU, pad_id=model.config.pad_token_id or 0), seen


def rows_of(lengths: Sequence[int]) -> list[Any]:
    numbers = np.random.default_rng(7)
    return [numbers.integers(5, 60, length).astype(np.int32) for length in lengths]


def test_few_numbers_of_slots_reach_the_products(backend: tuple[NativeBackend, set[int]]) -> None:
    made, seen = backend
    asked = set()
    for n in (1, 2, 3, 7):
        for longest in range(1, TOKENS + 1, 5):
            rows = rows_of([longest] * n)
            asked.add(n * longest)
            made(rows)
            made(rows, only=np.zeros(n, np.int64))
    assert len(asked) > 50
    assert seen <= {_rounded(slots) for slots in range(1, 7 * TOKENS + 1)}
    assert len(seen) < 30


def test_what_is_rounded_up_changes_no_vector(backend: tuple[NativeBackend, set[int]]) -> None:
    made, _ = backend
    exact = NativeBackend(made._encoder, device=CPU, pad_id=made._pad_id)
    exact._encoder = replace(made._encoder, rounds=False)
    assert made._encoder.rounds
    for lengths in ([1], [5, 17, 96], [31, 1], [64, 1], [9] * 9):
        rows, last = rows_of(lengths), np.array(lengths) - 1
        expected, vectors = exact(rows).vectors, made(rows).vectors
        assert vectors.shape == expected.shape
        inside = np.arange(max(lengths)) < np.array(lengths)[:, None]
        np.testing.assert_allclose(vectors.numpy()[inside], expected.numpy()[inside], atol=1e-6)
        picked = made(rows, only=last).vectors
        assert picked.shape == (len(rows), 1, expected.shape[-1])
        np.testing.assert_allclose(picked, exact(rows, only=last).vectors, atol=1e-6)


@pytest.mark.parametrize("slots", [1, 8, 9, 63, 64, 65, 96, 97, 1_000, 1_024, 1_025, 4_095, 16_384, 100_001])
def test_little_is_computed_for_nothing(slots: int) -> None:
    assert slots <= _rounded(slots) <= max(slots + 31, slots * 33 / 32)
    assert slots > 64 or _rounded(slots) < slots + 8
