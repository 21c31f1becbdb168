"""Layers on a torch whose private operations are missing or have changed. They are replaced at torch's own door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from chunkmill_workers.engine.encoder.linear import make_linear, packable


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    packable.cache_clear()
    yield
    packable.cache_clear()


def absent(*_: object) -> None:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def changed(weight: torch.Tensor, slots: int) -> None:
    raise TypeError("_linear_pointwise() takes 5 positional arguments")


@pytest.mark.parametrize("operation", [absent, changed])
def test_a_torch_without_the_private_operations_multiplies_in_the_ordinary_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, operation: object
) -> None:
    weight, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", operation)

    layers = [
        make_linear(weight, bias, dtype=torch.float32, device=torch.device("cpu"), slots=3, activation="gelu")
        for _ in range(2)
    ]

    assert not packable(torch.float32)
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    for layer in layers:
        torch.testing.assert_close(layer(x), expected)
    assert caplog.text.count("no layers of oneDNN") == 1


def test_other_number_formats_are_not_packed() -> None:
    assert not packable(torch.float16)
