"""What a GPU says late, or says of itself: on a stand-in, and where no device is needed, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkmill.errors import EngineError, ModelLoadError
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.run import Runner, TokenBatch
from chunkmill_workers.engine.windows import Ids

from .stand_in_gpu import CUDA, Event, stand_in_gpu


class Device:
    """A backend on the stand-in that raises what it is told to."""

    name, packed, concurrent = "native", True, False
    device, dtype, embedding_rows = CUDA, torch.float16, 100

    def __init__(self) -> None:
        self.raises: Callable[[Sequence[Ids]], Exception | None] = lambda rows: None
        self.passes: list[int] = []

    def __call__(self, rows: Sequence[Ids], *, only: Any = None) -> TokenVectors:
        self.passes.append(len(rows))
        if error := self.raises(rows):
            raise error
        return TokenVectors(torch.zeros(len(rows), 1, 4, device=CUDA), torch.ones(len(rows), device=CUDA))


class Plain:
    """A head that does nothing."""

    def only(self, lengths: Any, skips: Any) -> None:
        return None

    def __call__(self, hidden: TokenVectors, *, skips: Any) -> torch.Tensor:
        return hidden.vectors[:, 0]

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    noticed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: noticed.append(True))
    return noticed


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, emptied: list[bool]) -> Any:
    with stand_in_gpu(monkeypatch):
        yield Device()


def runner_of(device: Device, shrink: Callable[[int], object] = lambda tokens: None) -> Runner:
    probe = np.array([1, 2], np.int32)
    return Runner(device, Plain(), probe=probe, dimensions=4, exact=lambda: device, shrink=shrink)  # type: ignore[arg-type]


def batch_of(rows: int) -> TokenBatch:
    ids = [np.full(10, row, np.int32) for row in range(rows)]
    return TokenBatch(ids, np.zeros(rows, np.bool_), np.zeros(rows, np.int32))


def test_what_a_kernel_says_after_its_start_is_heard_when_the_pass_ends(
    device: Device, monkeypatch: pytest.MonkeyPatch, emptied: list[bool]
) -> None:
    waits: list[int] = []

    def synchronize(self: Event) -> None:
        waits.append(1)
        if len(waits) == 1:
            raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(Event, "synchronize", synchronize)
    runner = runner_of(device)

    started = runner.launch(batch_of(4))
    assert started.failed is None, "nothing is known yet"
    outcome = runner.finish(started)

    assert not outcome.failures
    assert device.passes == [4, 2, 2]
    assert not emptied, "memory was not short"


def test_memory_that_is_short_is_given_back_before_the_halves_run(device: Device, emptied: list[bool]) -> None:
    lessons: list[int] = []
    runner = runner_of(device, lessons.append)
    device.raises = lambda rows: torch.OutOfMemoryError("no room") if len(rows) > 2 else None

    outcome = runner.finish(runner.launch(batch_of(8)))

    assert not outcome.failures
    assert device.passes == [8, 4, 2, 2, 4, 2, 2]
    assert len(emptied) == 3
    assert lessons == [80], "the pass that did not fit, and not its halves: memory may be short for this moment only"


def test_one_shortage_halves_the_token_limit_once_however_small_the_passes_became(device: Device) -> None:
    lessons: list[int] = []
    runner = runner_of(device, lessons.append)
    device.raises = lambda rows: torch.OutOfMemoryError("no room") if len(rows) > 1 else None

    outcome = runner.finish(runner.launch(batch_of(8)))

    assert not outcome.failures
    assert device.passes == [8, 4, 2, 1, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1]
    assert lessons == [80]


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"]
)
def test_memory_that_is_short_elsewhere_than_in_torchs_allocator(message: str, device: Device) -> None:
    lessons: list[int] = []
    runner = runner_of(device, lessons.append)
    device.raises = lambda rows: RuntimeError(message) if len(rows) > 1 else None

    assert not runner.finish(runner.launch(batch_of(2))).failures
    assert lessons == [20]


def test_a_device_that_is_lost_blames_no_text(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """After such an error every call of CUDA fails, also the one that gives memory back."""
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail() -> None:
        raise lost

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    device.raises = lambda rows: lost
    runner = runner_of(device)

    with pytest.raises(EngineError, match=r"no longer runs on cuda:0.*illegal memory access.*Restart the worker"):
        runner.finish(runner.launch(batch_of(8)))


def test_a_model_that_does_not_fit_the_device_says_so(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(NativeBackend, "build", build)

    with pytest.raises(ModelLoadError, match=r"does not fit cpu: tried to allocate 3 GiB"):
        Engine.load(str(toy_path("bert-mean")), device="cpu")


def test_an_fp32_twin_that_does_not_fit_costs_the_text_that_needs_it(
    toy_path: Callable[[str], Path],
) -> None:
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32", threads=1)
    inner = engine._backend
    poison = engine._tokenizer.encode(["poison"])[0]
    assert isinstance(poison, np.ndarray)

    class Overflowing:
        name, device, dtype, packed, concurrent = "native", inner.device, torch.float16, False, False

        def __call__(self, rows: Sequence[Ids], *, only: Any = None) -> TokenVectors:
            hidden = inner(rows, only=only)
            with torch.inference_mode():
                for at, row in enumerate(rows):
                    if row.tolist() == poison.tolist():
                        hidden.vectors[at, 0, 0] = float("inf")
            return hidden

    def exact() -> Any:
        raise ModelLoadError("the model does not fit cuda:0")

    engine._runner.backend, engine._runner._exact = Overflowing(), exact  # type: ignore[assignment]

    results = list(engine.stream(["fine", "poison", "good"]))

    failures = [failure for result in results for failure in result.failures]
    assert [(failure.index, failure.code) for failure in failures] == [(1, "not_finite")]
    assert "cannot be loaded in fp32: the model does not fit cuda:0" in failures[0].reason
    assert sorted(index for result in results for index in result.indices) == [0, 2]
