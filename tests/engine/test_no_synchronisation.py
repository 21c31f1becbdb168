"""A pass is started without waiting for the device: nothing in it copies through pageable memory or asks for a number.

On a device that is not there (:mod:`.stand_in_gpu`); tests/gpu asks the same of a real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.loop import DeviceLoop
from chunkmill_workers.engine.run import Pass, PassResult, TokenBatch
from chunkmill_workers.engine.token_limit import TokenLimit
from tests.support.waiting import PATIENCE

from .conftest import TOYS, libraries, sample
from .stand_in_gpu import CUDA, StandInGpu, Synchronised, stand_in_gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGpu]:
    libraries()  # they cannot be imported while torch.cuda is another one
    with stand_in_gpu(monkeypatch) as synchronisations:
        yield synchronisations


def batch_of(engine: Engine, *, windows: bool = False) -> TokenBatch:
    prompt = engine.spec.document_prompt
    rows = [ids[: engine.max_tokens] for ids in engine._tokenizer.encode(sample(12), prompt)]  # type: ignore[index]
    skip = engine._tokenizer.frame(prompt).skip if prompt else 0
    marks = np.zeros(len(rows), np.bool_)
    marks[::3] = windows
    return TokenBatch(rows, marks, np.full(len(rows), skip, np.int32))


@pytest.mark.parametrize(
    ("dtype", "windows"),
    [
        ("auto", True),
        ("fp32", False),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("auto", False), ("fp32", True))),
    ],
)
@pytest.mark.parametrize("name", [*TOYS, "all-MiniLM-L6-v2"])
def test_starting_a_pass_does_not_wait_for_the_device(
    name: str, dtype: str, windows: bool, toy_path: Callable[[str], Path], gpu: StandInGpu
) -> None:
    engine = Engine.load(str(toy_path(name)) if name in TOYS else name, device="cuda", dtype=dtype)
    batch = batch_of(engine, windows=windows)
    gpu.log.clear()
    gpu.armed = True

    started = engine._runner.launch(batch)

    assert started.failed is None, started.failed
    assert started.vectors is not None
    assert started.vectors.shape == (len(batch.rows), engine.dimensions)
    assert started.vectors.dtype == torch.float32
    assert isinstance(engine._backend, NativeBackend)
    assert engine._backend.packed == (dtype == "auto" and "mpnet" not in name)
    # Down to the host the vectors go on a stream of their own, which waits for the pass and keeps their memory.
    assert gpu.log[-4:] == [
        "the copies' stream waits for the device's thread's stream",
        "device to host on the copies' stream",
        "kept for the copies' stream",
        "event on the copies' stream",
    ]
    if engine._backend.packed:
        assert gpu.log.count("host to device") <= 4, "ids with offsets, and what few texts have beside them"


def test_the_number_format_of_each_family(toy_path: Callable[[str], Path], gpu: StandInGpu) -> None:
    """fp16 where activations fit it; bf16 for what was trained in it."""
    dtypes = {
        name: Engine.load(str(toy_path(name)), device="cuda").dtype
        for name in ("bert-mean", "xlm-roberta-cls", "mpnet-dense", "nomic-sqrt", "modernbert-max", "qwen3-last")
    }

    assert dtypes.pop("modernbert-max") == dtypes.pop("qwen3-last") == "bfloat16"
    assert set(dtypes.values()) == {"float16"}


def _on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=CUDA)


WAITING: dict[str, Callable[[], Any]] = {
    "item": lambda: _on_gpu(1).item(),
    "a condition": lambda: bool(_on_gpu(1) > 0),
    "int": lambda: int(_on_gpu(1)),
    "nonzero": lambda: _on_gpu(3).nonzero(),
    "mask": lambda: _on_gpu(3)[_on_gpu(3, dtype=torch.bool)],
    "assignment by mask": lambda: _on_gpu(3).__setitem__(_on_gpu(3, dtype=torch.bool), 1.0),
    "index from the host": lambda: _on_gpu(3)[torch.tensor([0, 1])],
    "index from a list": lambda: _on_gpu(3)[[0, 1]],
    "masked_select": lambda: _on_gpu(3).masked_select(_on_gpu(3, dtype=torch.bool)),
    "repeat_interleave": lambda: torch.repeat_interleave(_on_gpu(3, dtype=torch.int64)),
    "segment_reduce": lambda: torch.segment_reduce(_on_gpu(3, 2), "sum", lengths=_on_gpu(1, dtype=torch.int64)),
    "cpu": lambda: _on_gpu(3).cpu(),
    "to cpu": lambda: _on_gpu(3).to("cpu"),
    "tolist": lambda: _on_gpu(3).tolist(),
    "from a list": lambda: torch.tensor([1, 2], device=CUDA),
    "pageable": lambda: torch.zeros(3).to(CUDA, non_blocking=True),
    "blocking": lambda: torch.zeros(3).pin_memory().to(CUDA),
    "to pageable": lambda: torch.empty(3).copy_(_on_gpu(3), non_blocking=True),
    "synchronize": lambda: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("what", WAITING)
def test_the_stand_in_notices_who_waits(what: str, gpu: StandInGpu) -> None:
    gpu.armed = True

    with pytest.raises(Synchronised):
        WAITING[what]()


class Slow:
    """A runner on a GPU: its passes are done when the test says so."""

    packed, concurrent, device = True, False, CUDA

    def __init__(self) -> None:
        self.backend = self
        self.calls: list[str] = []
        self.launchers: set[int] = set()
        self.two_under_way, self.done = threading.Event(), threading.Event()

    def launch(self, batch: TokenBatch) -> Pass:
        self.calls.append("launch")
        self.launchers.add(threading.get_ident())
        if len(self.calls) == 2:
            self.two_under_way.set()
        return Pass(batch)

    def finish(self, started: Pass) -> PassResult:
        assert self.done.wait(PATIENCE)
        self.calls.append("finish")
        return PassResult(np.zeros((len(started.batch.rows), 1), np.float32))


def test_one_thread_keeps_two_passes_under_way() -> None:
    runner = Slow()
    device = DeviceLoop(runner, TokenLimit(10), threads=4)  # type: ignore[arg-type]
    name = device.open()
    device.add(name, [np.full(10, number, np.int32) for number in range(5)], np.zeros(5, np.bool_), 0)

    assert runner.two_under_way.wait(PATIENCE), "the second pass waits for the first to end"
    assert runner.calls == ["launch", "launch"]
    runner.done.set()
    assert sum(len(done.at) for done in device.results(name)) == 5
    assert runner.calls[:4] == ["launch", "launch", "finish", "launch"]
    assert len(runner.launchers) == 1, "streams belong to threads"
