"""Which setups a tuning tries, on a machine made up for it: what a process does is a function of its setup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import pytest

from chunkmill.tuning.choose import Candidate, Constraints, Setup, choose
from chunkmill_workers.tuning import search as tune_search
from chunkmill_workers.tuning.process import CandidateFailed, Task, Turn, Vectors
from chunkmill_workers.tuning.search import ROUNDS, Grid, Search, cosines

EXACT = Vectors(np.eye(4, dtype=np.float32), [1] * 4, 4, 1.0)
GRID = Grid(
    [("native", "bfloat16"), ("native", "float32"), ("onnx", "float32"), ("openvino", "float32")],
    [256, 512, 1024], 512, [4, 2, 1], [2],
)  # fmt: skip


class Machine:
    """``speed`` gives a setup's tokens/s; it may raise CandidateFailed."""

    speed: ClassVar[Callable[[Setup], float]]
    vectors_of: ClassVar[Callable[[Setup], np.ndarray[Any, Any]]]
    memory_mib: ClassVar[float] = 1e6
    alive: ClassVar[int] = 0
    most_alive: ClassVar[int] = 0
    turns: ClassVar[list[Setup]] = []

    def __init__(self, task: Task, setup: Setup) -> None:
        self._setup = setup
        self._runs = True
        Machine.alive += 1
        Machine.most_alive = max(Machine.most_alive, Machine.alive)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def vectors(self, texts: Sequence[str]) -> Vectors:
        return Vectors(Machine.vectors_of(self._setup), [1] * 4, 4, 1.0)

    def turn(self) -> Turn:
        Machine.turns.append(self._setup)
        return Turn(1000, 1000 / Machine.speed(self._setup), 7.0, 500.0, Machine.memory_mib)

    def stop(self) -> None:
        Machine.alive -= self._runs
        self._runs = False


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_search, "CandidateProcess", Machine)
    monkeypatch.setattr(Machine, "vectors_of", staticmethod(lambda setup: EXACT.vectors), raising=False)
    monkeypatch.setattr(Machine, "turns", [])
    monkeypatch.setattr(Machine, "most_alive", 0)


def run(
    speed: Callable[[Setup], float], monkeypatch: pytest.MonkeyPatch, grid: Grid = GRID, **limits: Any
) -> dict[Setup, Candidate]:
    monkeypatch.setattr(Machine, "speed", staticmethod(speed), raising=False)
    steps: list[Setup] = []
    task = Task("m", "float", "cpu", ["text"], 512)
    search = Search(grid, Constraints(0.9999, **limits), task, ["text"] * 4, EXACT, steps.append)
    candidates = {candidate.setup: candidate for candidate in search.run()}
    assert Machine.alive == 0
    assert len(steps) <= grid.steps
    return candidates


def by_kind(setup: Setup) -> float:
    """native bf16 is the fastest kind, 1,024 tokens the best limit of a pass, and all threads the best number."""
    kind = {"native bf16": 4.0, "native fp32": 2.0, "onnx fp32": 3.0, "openvino fp32": 1.0}[setup.kind]
    return kind * {256: 1.0, 512: 1.1, 1024: 1.2}[setup.batch_tokens] * setup.threads


def test_the_clock_is_spent_on_those_that_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = run(by_kind, monkeypatch)
    limits = {kind: sorted(s.batch_tokens for s in candidates if s.kind == kind and s.threads == 4) for kind in
               ("native bf16", "native fp32", "onnx fp32", "openvino fp32")}  # fmt: skip
    assert limits == {
        "native bf16": [256, 512, 1024],  # the better half
        "native fp32": [512],
        "onnx fp32": [256, 512, 1024],
        "openvino fp32": [512],
    }
    assert {(s.kind, s.batch_tokens, s.threads) for s in candidates if s.threads < 4} == {
        ("native bf16", limit, threads) for limit in (512, 1024) for threads in (1, 2)
    }  # the best two alone
    rounds = sorted(candidate.measured.rounds for candidate in candidates.values() if candidate.measured)
    assert rounds == [1] * (len(candidates) - 4) + [1 + ROUNDS] * 2 + [1 + 2 * ROUNDS] * 2
    winner = choose(list(candidates.values()), Constraints(0.9999))
    assert winner is not None
    assert winner.setup == Setup("native", "bfloat16", 1024, 4, 2)


def test_finalists_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = run(by_kind, monkeypatch)
    last = Machine.turns[len(candidates) :]
    first, second = last[: 4 * ROUNDS], last[4 * ROUNDS :]
    assert [len(set(first[at : at + 4])) for at in range(0, len(first), 4)] == [4] * ROUNDS
    assert [len(set(second[at : at + 2])) for at in range(0, len(second), 2)] == [2] * ROUNDS
    assert len({first[at] for at in range(0, len(first), 4)}) > 1  # another begins


def test_no_more_finalists_run_at_once_than_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "memory_mib", 2000.0)  # for two of 500 MiB, with room to spare
    run(by_kind, monkeypatch)
    assert Machine.most_alive == 2
    monkeypatch.setattr(Machine, "memory_mib", 100.0)
    monkeypatch.setattr(Machine, "most_alive", 0)
    candidates = run(by_kind, monkeypatch)
    assert Machine.most_alive == 1
    assert choose(list(candidates.values()), Constraints(0.9999)) is not None


def test_a_limit_decides_who_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving prefers those that meet the limits, so the winner under a limit is measured as often as any."""
    candidates = run(by_kind, monkeypatch, min_throughput=13.0)
    winner = choose(list(candidates.values()), Constraints(0.9999, min_throughput=13.0))
    assert winner is not None
    assert winner.measured is not None
    assert winner.measured.rounds == 1 + 2 * ROUNDS


def test_under_the_gate_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = np.eye(4, dtype=np.float32) + 0.02
    monkeypatch.setattr(
        Machine, "vectors_of", staticmethod(lambda setup: turned if setup.dtype == "bfloat16" else EXACT.vectors)
    )
    candidates = run(by_kind, monkeypatch)
    gated = [candidate for candidate in candidates.values() if candidate.setup.dtype == "bfloat16"]
    assert len(gated) == 1
    assert gated[0].measured is not None
    assert gated[0].measured.tokens_per_second is None
    assert gated[0].measured.cosine_min < 0.9999
    assert not any(setup.dtype == "bfloat16" for setup in Machine.turns)


def test_one_that_fails_in_the_last_rounds_leaves_the_others_be(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Setup("native", "bfloat16", 1024, 4, 2)

    def speed(setup: Setup) -> float:
        if setup == best and Machine.turns.count(setup) > 2:
            raise CandidateFailed("its process was ended by SIGKILL")
        return by_kind(setup)

    candidates = run(speed, monkeypatch)
    assert candidates[best].problem == "in the last rounds: its process was ended by SIGKILL"
    winner = choose(list(candidates.values()), Constraints(0.9999))
    assert winner is not None
    assert winner.setup == Setup("native", "bfloat16", 512, 4, 2)


def test_where_nothing_runs_every_row_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(setup: Setup) -> float:
        raise CandidateFailed(f"no {setup.kind}")

    candidates = run(speed, monkeypatch)
    assert [candidate.problem for candidate in candidates.values()] == [f"no {setup.kind}" for setup in candidates]
    assert choose(list(candidates.values()), Constraints(0.9999)) is None


def test_zeros_equal_zeros_and_nothing_else() -> None:
    zeros = Vectors(np.zeros((2, 4), np.float32), [1, 1], 2, 1.0)
    half = Vectors(np.array([[0, 0, 0, 0], [1, 0, 0, 0]], np.float32), [1, 1], 2, 1.0)
    assert cosines(zeros, zeros) == (1.0, 1.0)
    assert np.isnan(cosines(half, zeros)[0])
