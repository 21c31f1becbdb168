"""Tests that need a CUDA device: `make gpu` runs them. Where there is none they are skipped with the reason.

``GPU_TESTS_DEVICE=cpu`` rehearses them on the CPU, but for those that ask for the ``cuda`` fixture: so a defect in a
test itself shows before anybody has paid for a GPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from chunkmill_workers.engine import Engine
from tests.acceptance.conftest import Processes, processes
from tests.engine.conftest import TOYS, minilm, toy_engine, toy_path

__all__ = ["Processes", "minilm", "processes", "toy_engine", "toy_path"]

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
MODELS = [*TOYS, "all-MiniLM-L6-v2"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "gpu" in item.keywords and DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: run `make gpu` on a machine with one")


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    """For what only a real device can show. What a test did to it is undone."""
    if DEVICE != "cuda":
        pytest.skip("rehearsal without a CUDA device")
    yield torch.device("cuda", 0)
    forbid_waits(False)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture
def load(toy_path: Callable[[str], Path]) -> Callable[..., Engine]:
    """An engine on the device, by the name in TOYS or the bundled model's. Several TokenBatches even for few texts."""

    def build(name: str, dtype: str = "auto", **options: Any) -> Engine:
        path = str(toy_path(name)) if name in TOYS else name
        return Engine.load(path, device=DEVICE, dtype=dtype, **{"batch_tokens": 512} | options)

    return build


@pytest.fixture
def exact(toy_engine: Callable[[str], Engine], minilm: Engine) -> Callable[[str], Engine]:
    """The same models in fp32 on the CPU."""
    return lambda name: toy_engine(name) if name in TOYS else minilm


def forbid_waits(forbid: bool) -> None:
    """Whatever makes the host wait for the device raises, in this whole process; or it may again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that this is a prototype
        torch.cuda.set_sync_debug_mode("error" if forbid else "default")


def cosines(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) of the rows of two (n, d) matrices."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    similarities: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return similarities


def assert_equal_in_fp32(vectors: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """1e-5 of a vector's length: promise 6."""
    lengths = np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1.0)
    np.testing.assert_allclose(vectors / lengths, expected / lengths, atol=1e-5, rtol=0)
