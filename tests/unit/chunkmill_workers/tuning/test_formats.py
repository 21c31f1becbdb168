"""Which number formats a tuning tries on a GPU. Only the GPU's capability is made up."""

from __future__ import annotations

import pytest
import torch

from chunkmill.domain.spaces import Precision
from chunkmill.errors import InvalidInput
from chunkmill.machine import Machine
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Constraints
from chunkmill_workers.tuning.tune import Order, _grid

T4, V100, L4, H100 = (7, 5), (7, 0), (8, 9), (9, 0)


def formats(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *asked: str) -> set[tuple[str, str]]:
    """The backends and formats that are worth trying for a model that may run on every backend."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine = Machine(cpu="a processor", cores=4, features=("avx512_bf16", "amx_bf16"), gpu="a GPU")
    order = Order("a-model", Precision.FLOAT, Constraints(min_cosine=0.9999), ["a text", "another"], dtypes=asked)  # type: ignore[arg-type]
    return set(_grid(order, Settings(), machine, "native", [4], 10_000.0).kinds)


@pytest.mark.parametrize("capability", [T4, V100])
def test_a_gpu_without_bf16_is_tuned_among_the_formats_that_it_has(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    assert formats(monkeypatch, capability) == {("native", "float16"), ("native", "float32")}
    assert formats(monkeypatch, capability, "bfloat16", "float32") == {("native", "float32")}
    with pytest.raises(InvalidInput, match="none of the backends and dtypes asked for suits this device"):
        formats(monkeypatch, capability, "bfloat16")


@pytest.mark.parametrize("capability", [L4, H100])
def test_a_gpu_with_bf16_is_tuned_with_it_too(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    assert formats(monkeypatch, capability) == {
        ("native", "float16"), ("native", "bfloat16"), ("native", "float32")
    }  # fmt: skip
    assert formats(monkeypatch, capability, "bfloat16") == {("native", "bfloat16")}
