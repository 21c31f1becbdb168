"""The device's thread: who is next, what shares a pass, what happens when something breaks. No time is measured."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chunkmill.errors import EngineError
from chunkmill_workers.engine import Engine, loop
from chunkmill_workers.engine.loop import DeviceLoop
from chunkmill_workers.engine.run import Pass, PassResult, TokenBatch
from chunkmill_workers.engine.token_limit import TokenLimit
from chunkmill_workers.engine.windows import Ids
from tests.support.waiting import PATIENCE, running, together, until


@dataclass
class FakeRunner:
    """Answers each row with its first id, when the test lets it: the device is not what these tests are about."""

    packed: bool = True
    concurrent: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    served: list[list[int]] = field(default_factory=list)
    error: Exception | None = None
    fails: set[int] = field(default_factory=set)
    """First ids of rows that get no vector."""

    def __post_init__(self) -> None:
        self.backend = self
        self.running, self.go_on = threading.Event(), threading.Event()

    def launch(self, batch: TokenBatch) -> Pass:
        self.served.append([int(row[0]) for row in batch.rows])
        self.running.set()
        assert self.go_on.wait(PATIENCE)
        return Pass(batch)

    def finish(self, started: Pass) -> PassResult:
        if self.error is not None:
            raise self.error
        marks = [int(row[0]) for row in started.batch.rows]
        failures = {at: ("forward_failed", f"row {mark}") for at, mark in enumerate(marks) if mark in self.fails}
        return PassResult(np.array([[mark] for mark in marks], np.float32), failures)


def rows(*marks: int, length: int = 10) -> list[Ids]:
    return [np.full(length, mark, np.int32) for mark in marks]


def add(device: DeviceLoop, token_ids: list[Ids], *, urgent: bool = False, large: bool = False) -> int:
    name = device.open(urgent=urgent, large=large)
    device.add(name, token_ids, np.zeros(len(token_ids), np.bool_), 0)
    return name


def values(device: DeviceLoop, name: int) -> dict[int, float]:
    """{row: what came back for it}."""
    return {
        int(at): float(vector[0])
        for done in device.results(name)
        for at, vector in zip(done.at, done.rows.vectors, strict=True)
    }


@pytest.fixture
def held() -> Iterator[tuple[FakeRunner, DeviceLoop]]:
    """A device that is busy with row 99 until the test sets ``go_on``; passes of up to 20 tokens."""
    runner = FakeRunner()
    device = DeviceLoop(runner, TokenLimit(20))  # type: ignore[arg-type]
    add(device, rows(99))
    assert runner.running.wait(PATIENCE)
    yield runner, device
    runner.go_on.set()


def test_streams_are_served_in_order_of_arrival_and_share_passes(held: tuple[FakeRunner, DeviceLoop]) -> None:
    runner, device = held
    first = add(device, rows(1, 2, 3))
    second = add(device, rows(11, 12, 13))

    runner.go_on.set()

    assert values(device, first) == {0: 1, 1: 2, 2: 3}
    assert values(device, second) == {0: 11, 1: 12, 2: 13}
    assert runner.served == [[99], [1, 2], [3, 11], [12, 13]]


def test_an_urgent_stream_goes_first(held: tuple[FakeRunner, DeviceLoop]) -> None:
    runner, device = held
    bulk = add(device, rows(1, 2, 3, 4))
    query = add(device, rows(7), urgent=True)

    runner.go_on.set()
    values(device, query)
    values(device, bulk)

    assert runner.served == [[99], [7], [1, 2], [3, 4]]


def test_a_flood_of_urgent_streams_starves_nobody(held: tuple[FakeRunner, DeviceLoop]) -> None:
    runner, device = held
    bulk = add(device, rows(1, length=20))
    queries = [add(device, rows(10 + at, length=20), urgent=True) for at in range(20)]

    runner.go_on.set()
    for caller in [*queries, bulk]:
        values(device, caller)

    assert runner.served.index([1]) == 1 + loop.URGENT_RUN


def test_after_a_flood_let_one_bulk_pass_by_urgent_streams_go_first_again(
    held: tuple[FakeRunner, DeviceLoop],
) -> None:
    runner, device = held
    bulk = add(device, rows(1, 2, 3, length=20))
    queries = [add(device, rows(10 + at, length=20), urgent=True) for at in range(2 * loop.URGENT_RUN + 2)]

    runner.go_on.set()
    for caller in [*queries, bulk]:
        values(device, caller)

    places = [runner.served.index([mark]) for mark in (1, 2, 3)]
    assert places == [1 + loop.URGENT_RUN, 2 + 2 * loop.URGENT_RUN, 5 + 2 * loop.URGENT_RUN]


def test_of_urgent_streams_the_large_ones_come_after_the_others_and_before_bulk_work(
    held: tuple[FakeRunner, DeviceLoop],
) -> None:
    runner, device = held
    bulk = add(device, rows(1, 2, length=20))
    large = add(device, rows(11, 12, length=20), urgent=True, large=True)
    query = add(device, rows(21, length=20), urgent=True)

    runner.go_on.set()
    for caller in (query, large, bulk):
        values(device, caller)

    assert runner.served == [[99], [21], [11], [12], [1], [2]]


def test_a_flood_of_queries_lets_large_streams_and_bulk_work_by_in_turns(
    held: tuple[FakeRunner, DeviceLoop],
) -> None:
    runner, device = held
    bulk = add(device, rows(1, 2, length=20))
    large = add(device, rows(11, 12, length=20), urgent=True, large=True)
    queries = [add(device, rows(100 + at, length=20), urgent=True) for at in range(4 * loop.URGENT_RUN)]

    runner.go_on.set()
    for caller in [*queries, large, bulk]:
        values(device, caller)

    places = {mark: runner.served.index([mark]) for mark in (1, 11, 2, 12)}
    first = 1 + loop.URGENT_RUN
    assert places[1] == first
    assert places[11] == first + 1, "it was passed over as often"
    assert places[2] <= first + 2 + loop.URGENT_RUN
    assert places[12] <= first + 3 + loop.URGENT_RUN


def test_bulk_passes_are_short_while_somebody_may_ask_again(
    held: tuple[FakeRunner, DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that runs cannot be interrupted. A fast device needs no shorter passes."""
    runner, device = held
    device._token_limit = TokenLimit(1_000)
    clock = SimpleNamespace(now=5_000.0)
    frozen = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=loop.time.perf_counter)
    monkeypatch.setattr(loop, "time", frozen)

    def passes_of(rate: float, since: float, *, large: bool = False) -> list[int]:
        runner.served.clear()
        device._note_rate = lambda *_: None  # type: ignore[method-assign]
        values(device, add(device, rows(7, length=50), urgent=True))
        device._rate = rate
        clock.now += since
        values(device, add(device, rows(*range(1, 21), length=50), urgent=large, large=large))
        return [len(served) for served in runner.served if served != [7]]

    runner.go_on.set()
    assert passes_of(1_000, since=0.5) == [5, 5, 5, 5], "SHORT_PASS_TOKENS"
    assert passes_of(1_000, since=0.5, large=True) == [5, 5, 5, 5]
    assert passes_of(10_000, since=0.5) == [10, 10], "what it computes in SHORT_PASS_SECONDS"
    assert passes_of(1_000_000, since=0.5) == [20]
    assert passes_of(1_000, since=loop.WAITED_SECONDS + 0.1) == [20]


def test_a_failure_in_a_shared_pass_is_reported_to_the_stream_that_has_the_row(
    held: tuple[FakeRunner, DeviceLoop],
) -> None:
    runner, device = held
    first, second = add(device, rows(1, 2, 3)), add(device, rows(11, 12))
    runner.fails = {11}

    runner.go_on.set()

    failed = {
        name: {int(done.at[at]): why for done in device.results(name) for at, why in done.rows.failures.items()}
        for name in (first, second)
    }
    assert [3, 11] in runner.served, "they shared no pass"
    assert failed == {first: {}, second: {0: ("forward_failed", "row 11")}}


def test_what_waits_for_a_stream_that_failed_is_not_run(
    held: tuple[FakeRunner, DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even to fill the passes of another stream, which goes on."""
    runner, device = held
    first, second = add(device, rows(1, 2, 3, 4)), add(device, rows(11))
    real = runner.finish

    def finish(started: Pass) -> PassResult:
        if started.batch.rows[0][0] == 1:
            raise EngineError("the device is gone")
        return real(started)

    monkeypatch.setattr(runner, "finish", finish)
    runner.go_on.set()

    with pytest.raises(EngineError, match="gone"):
        values(device, first)
    assert values(device, second) == {0: 11}
    assert runner.served == [[99], [1, 2], [11]]
    assert device.waiting == 0


def test_rows_of_like_length_share_a_pass_whoever_they_belong_to(held: tuple[FakeRunner, DeviceLoop]) -> None:
    runner, device = held
    first = add(device, [*rows(1, length=12), *rows(2, length=4)])
    second = add(device, [*rows(11, length=20), *rows(12, length=8)])

    runner.go_on.set()
    values(device, first)
    values(device, second)

    assert runner.served == [[99], [1, 12], [11], [2]] or runner.served == [[99], [1, 12], [2], [11]]


def test_closing_a_stream_takes_back_its_rows_alone(held: tuple[FakeRunner, DeviceLoop]) -> None:
    runner, device = held
    first = add(device, rows(1, 2))
    second = add(device, rows(11, 12))

    assert device.close(first) == []
    runner.go_on.set()

    assert values(device, second) == {0: 11, 1: 12}
    assert runner.served == [[99], [11, 12]]
    assert device.close(first) == [], "closing twice is harmless"


def test_a_broken_device_is_reported_to_all_and_a_new_stream_tries_again(held: tuple[FakeRunner, DeviceLoop]) -> None:
    runner, device = held
    first, second = add(device, rows(1, 2, 3)), add(device, rows(11))
    runner.error = EngineError("the device is gone")

    runner.go_on.set()

    for name in (first, second):
        with pytest.raises(EngineError, match="gone"):
            values(device, name)
        assert device.close(name) == [], "nothing more comes, and nobody waits for it"
    runner.error = None
    assert values(device, add(device, rows(5))) == {0: 5}


def test_a_defect_in_the_thread_reaches_who_waits(
    held: tuple[FakeRunner, DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, device = held

    def broken(*_: object, **__: object) -> slice:
        raise ZeroDivisionError

    name = add(device, rows(1))
    monkeypatch.setattr(loop, "choose", broken)
    runner.go_on.set()

    with pytest.raises(ZeroDivisionError):
        values(device, name)
    monkeypatch.undo()
    assert values(device, add(device, rows(5))) == {0: 5}, "the next caller gets a new thread"


def test_the_token_limit_is_asked_before_every_pass() -> None:
    runner, limit = FakeRunner(), TokenLimit(40)
    runner.go_on.set()
    device = DeviceLoop(runner, limit)  # type: ignore[arg-type]

    values(device, add(device, rows(1, 2, 3, 4)))
    limit.shrink(20)
    values(device, add(device, rows(5, 6, 7, 8)))

    assert runner.served == [[1, 2, 3, 4], [5], [6], [7], [8]]


def test_a_dropped_engine_goes_away(toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "IDLE_SECONDS", 0.05)
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32")
    engine.embed(["one text"])
    (thread,) = engine._loop._threads
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not engine._loop._threads

    engine.embed(["and another, after the thread has gone"])
    watched = weakref.ref(engine._backend)
    (thread,) = engine._loop._threads
    del engine
    thread.join(PATIENCE)
    del thread
    gc.collect()

    assert watched() is None


def test_callers_at_once_get_their_own_vectors(toy_path: Callable[[str], Path]) -> None:
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32", batch_tokens=64)
    texts = [
        [f"caller {caller} says {number} " + "word " * (number % 7) for number in range(30)] for caller in range(6)
    ]
    expected = [np.vstack([engine.embed([text]).vectors for text in caller_texts]) for caller_texts in texts]

    def call(caller: int) -> np.ndarray:
        return engine.embed(texts[caller], urgent=caller == 0).vectors

    embedded = together(*[partial(call, caller) for caller in range(6)])
    for vectors, own in zip(embedded, expected, strict=True):
        np.testing.assert_allclose(vectors, own, atol=1e-5)


def test_passes_hold_rows_of_several_callers(toy_path: Callable[[str], Path]) -> None:
    """Of two calls whose rows are few, one pass serves both: a worker's device does not wait at a task's edge."""
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32", batch_tokens=512)
    backend, under_way, go_on = engine._runner.backend, threading.Event(), threading.Event()
    passes: list[int] = []

    class Held:
        device, packed, dtype, concurrent = backend.device, backend.packed, backend.dtype, False

        def __call__(self, token_ids: Sequence[Ids], **options: object) -> object:
            passes.append(len(token_ids))
            under_way.set()
            assert go_on.wait(PATIENCE)
            return backend(token_ids, **options)  # type: ignore[arg-type]

    engine._runner.backend = Held()  # type: ignore[assignment]
    engine._loop._most_threads = 1
    embed = partial(engine.embed, ["a", "b", "c"])
    with running(embed, release=go_on.set):
        assert under_way.wait(PATIENCE)
        with running(embed, embed, release=go_on.set):
            until(lambda: engine._loop.waiting == 6)

    assert passes == [3, 6]


def test_each_core_has_a_device_thread_and_a_lone_pass_has_them_all(
    toy_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "four words are here"
    tokens = int(Engine.load(str(toy_path("bert-mean")), device="cpu").embed([text]).n_tokens[0])
    engine = Engine.load(str(toy_path("bert-mean")), device="cpu", dtype="fp32", batch_tokens=10 * tokens, threads=2)
    launch, both = engine._runner.launch, threading.Barrier(2)
    seen: list[tuple[str, int]] = []

    def recording(batch: TokenBatch) -> Pass:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        if len(batch.rows) > 1:
            both.wait(PATIENCE)  # broken, unless two passes are under way at once
        return launch(batch)

    engine._runner.launch = recording  # type: ignore[method-assign]
    texts = [text] * 20  # two passes

    engine.embed(["short"])
    assert [threads for _, threads in seen] == [1]  # a few tokens are not worth the barriers
    seen.clear()
    monkeypatch.setattr(loop, "ALL_CORES_FROM", 2)
    engine.embed(["alone"])
    assert [threads for _, threads in seen] == [2]
    seen.clear()
    vectors = engine.embed(texts).vectors

    assert [threads for _, threads in seen] == [1, 1]
    np.testing.assert_allclose(vectors, np.repeat(engine.embed(texts[:1]).vectors, 20, axis=0), atol=1e-5)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU has nothing to share out")
def test_device_threads_that_have_the_machine_keep_to_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a pass that runs alone may use all of them."""
    everywhere = os.sched_getaffinity(0)
    first, second = sorted(everywhere)[:2]
    monkeypatch.setattr(loop, "cores", lambda: 2)
    monkeypatch.setattr(loop, "core_blocks", lambda n: [{first}, {second}])
    monkeypatch.setattr(loop, "ALL_CORES_FROM", 10)
    places: list[set[int]] = []
    both = threading.Barrier(2, timeout=PATIENCE)

    class Noting(FakeRunner):
        def launch(self, batch: TokenBatch) -> Pass:
            places.append(os.sched_getaffinity(0))
            if len(batch.rows) == 1:
                both.wait()
            return Pass(batch)

    device = DeviceLoop(Noting(concurrent=True), TokenLimit(20), threads=2)  # type: ignore[arg-type]
    values(device, add(device, rows(1, 2, length=20)))
    assert sorted(places, key=min) == [{first}, {second}]
    places.clear()
    values(device, add(device, rows(5, 6, length=5)))
    assert places == [{first, second}]
