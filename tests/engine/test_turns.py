"""Who is next on the device. Order only; no time is measured."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from app.domain.spaces import OnLong
from app.models import resolve_model
from workers.engine import Engine
from workers.engine.turns import Turns

PATIENCE = 30  # seconds until a hanging test fails instead of hanging on


def wait_until(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(PATIENCE * 1000):
        if condition():
            return
        tick.wait(0.001)
    raise AssertionError("the threads did not get that far")


def queue_up(turns: Turns, callers: Sequence[tuple[str, bool]]) -> list[str]:
    """Let ``(name, urgent)`` callers queue in this order while the device is held; the order served."""
    served: list[str] = []

    def work(name: str, urgent: bool) -> None:
        with turns.turn(urgent=urgent):
            served.append(name)

    threads = []
    with turns.turn():
        for count, (name, urgent) in enumerate(callers, 1):
            threads.append(threading.Thread(target=work, args=(name, urgent)))
            threads[-1].start()
            wait_until(lambda count=count: turns.waiting == count)  # type: ignore[misc]
    for thread in threads:
        thread.join(PATIENCE)
    return served


def test_turns_are_taken_in_order_of_arrival() -> None:
    names = [f"bulk {number}" for number in range(6)]

    assert queue_up(Turns(), [(name, False) for name in names]) == names


def test_an_urgent_caller_goes_first() -> None:
    callers = [("bulk 1", False), ("bulk 2", False), ("query 1", True), ("query 2", True)]

    assert queue_up(Turns(), callers) == ["query 1", "query 2", "bulk 1", "bulk 2"]


def test_a_flood_of_urgent_callers_starves_nobody() -> None:
    served = queue_up(Turns(), [("bulk", False), *((f"query {number}", True) for number in range(20))])

    assert served.index("bulk") == 8


def test_who_just_had_a_turn_waits_behind_who_was_waiting() -> None:
    turns = Turns()
    served: list[str] = []
    both_running = threading.Barrier(2)

    def loop(name: str, other: str) -> None:
        both_running.wait(PATIENCE)
        for _ in range(20):
            with turns.turn():
                served.append(name)
                if served.count(other) < 20:
                    wait_until(lambda: turns.waiting == 1 or served.count(other) == 20)

    threads = [threading.Thread(target=loop, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert len(served) == 40
    assert all(left != right for left, right in itertools.pairwise(served))


def test_an_interrupted_wait_leaves_no_ticket() -> None:
    turns = Turns()

    def interrupted(_: object) -> bool:
        raise KeyboardInterrupt

    with turns.turn():
        turns._changed.wait_for = interrupted  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt), turns.turn():
            pass
        assert turns.waiting == 0


def test_a_query_overtakes_a_job_between_two_token_batches(toy_path: Callable[[str], Path]) -> None:
    engine = Engine.load(
        resolve_model(str(toy_path("bert-mean")), on_long=OnLong.TRUNCATE),
        device="cpu",
        dtype="fp32",
        batch_tokens=48,
    )
    order: list[str] = []
    first_running, go_on = threading.Event(), threading.Event()
    forward = engine._runner._backbone

    class Recorder:
        device, dtype = forward.device, forward.dtype

        def __call__(self, rows: Sequence[object]) -> object:
            order.append("query" if len(rows[0]) < 6 else "job")  # type: ignore[arg-type]
            first_running.set()
            assert go_on.wait(PATIENCE)
            return forward(rows)  # type: ignore[arg-type]

    engine._runner._backbone = Recorder()  # type: ignore[assignment]
    job = threading.Thread(target=lambda: list(engine.stream(["a long text about many words " * 9] * 3)))
    query = threading.Thread(target=lambda: engine.embed(["q"], "query", urgent=True))
    other = threading.Thread(target=lambda: list(engine.stream(["another long text of many words " * 9])))
    job.start()
    assert first_running.wait(PATIENCE)
    other.start()
    wait_until(lambda: engine._turns.waiting == 1)  # tokenized already, while the job holds the device
    query.start()
    wait_until(lambda: engine._turns.waiting == 2)
    go_on.set()
    for thread in (job, query, other):
        thread.join(PATIENCE)

    assert order == ["job", "query", "job", "job", "job"]
