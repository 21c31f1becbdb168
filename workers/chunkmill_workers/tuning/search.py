"""Decides which setups are tried and in what order. Successive halving spends the time on those that may win.

First come all backends and number formats at the default token limit, then the other token limits of the better half,
then fewer threads or more ChunkBatches at a time for the best two. At the end the best four run side by side, and then
the best two of them once more.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from chunkmill.tuning.choose import Backend, Candidate, Constraints, Dtype, Setup, SetupMeasurement, ranked
from chunkmill_workers.tuning.process import CandidateFailed, CandidateProcess, Task, Turn, Vectors

FINALISTS, WINNERS, ROUNDS = 4, 2, 3
SHARE = 0.6
"""The share of the device's memory that the peaks of all finalists may take together."""
_WARM_UP = 32
"""How many texts a finalist embeds before its first round."""

Tell = Callable[[Setup], None]


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that are tried. The first of ``threads`` and of ``parallel_batches`` is the default."""

    kinds: Sequence[tuple[Backend, Dtype]]
    batch_tokens: Sequence[int]
    default_batch_tokens: int
    threads: Sequence[int]
    parallel_batches: Sequence[int]

    @property
    def steps(self) -> int:
        """How many measurements there will be at most."""
        screened = len(self.kinds) + _half(len(self.kinds)) * (len(self.batch_tokens) - 1)
        screened += WINNERS * (len(self.threads) - 1 + len(self.parallel_batches) - 1)
        return screened + ROUNDS * (min(FINALISTS, screened) + min(WINNERS, screened))


class Search:
    """One tuning. ``exact`` are the fp32 vectors of ``gate``, and ``tell`` is called at each step."""

    def __init__(
        self, grid: Grid, constraints: Constraints, task: Task, gate: Sequence[str], exact: Vectors, tell: Tell
    ) -> None:
        self._grid = grid
        self._constraints = constraints
        self._task = task
        self._gate = gate
        self._exact = exact
        self._tell = tell
        self._memory_mib = 0.0
        self.candidates_by_setup: dict[Setup, Candidate] = {}

    def run(self) -> list[Candidate]:
        """Try the setups. Returns all candidates in the order in which they were tried."""
        grid = self._grid
        first = [
            Setup(backend, dtype, grid.default_batch_tokens, grid.threads[0], grid.parallel_batches[0])
            for backend, dtype in grid.kinds
        ]
        self._screen(first)
        kept = self._best(_half(len(first)))
        self._screen(replace(setup, batch_tokens=tokens) for setup in kept for tokens in grid.batch_tokens)
        self._screen(replace(setup, threads=count) for setup in self._best(WINNERS) for count in grid.threads)
        self._screen(
            replace(setup, parallel_batches=count) for setup in self._best(WINNERS) for count in grid.parallel_batches
        )
        self._race()
        return list(self.candidates_by_setup.values())

    def _best(self, count: int, of: Iterable[Setup] | None = None) -> list[Setup]:
        candidates = (
            self.candidates_by_setup.values() if of is None else [self.candidates_by_setup[setup] for setup in of]
        )
        return [candidate.setup for candidate in ranked(list(candidates), self._constraints)[:count]]

    def _screen(self, setups: Iterable[Setup]) -> None:
        """Measure the setups that are new, one after the other: accuracy, speed, latency and memory."""
        for setup in dict.fromkeys(setups):
            if setup not in self.candidates_by_setup:
                self._tell(setup)
                self.candidates_by_setup[setup] = self._measure(setup)

    def _measure(self, setup: Setup) -> Candidate:
        try:
            with CandidateProcess(self._task, setup) as process:
                minimum, mean = cosines(process.vectors(self._gate), self._exact)
                if not self._constraints.passes_gate(minimum, mean):
                    return Candidate(setup, SetupMeasurement(minimum, mean))
                turn = process.turn()
                self._memory_mib = turn.memory_mib
        except CandidateFailed as reason:
            return Candidate(setup, problem=str(reason))
        return Candidate(
            setup, SetupMeasurement(minimum, mean, turn.tokens_per_second, turn.latency_ms, turn.peak_mib, rounds=1)
        )

    def _race(self) -> None:
        """Measure the best side by side and in turns, so that what disturbs the machine disturbs all of them."""
        turns: dict[Setup, list[Turn]] = {setup: [] for setup in self._together()}
        with ExitStack() as stack:
            running: dict[Setup, CandidateProcess] = {}
            for setup in turns:
                try:
                    running[setup] = stack.enter_context(CandidateProcess(self._task, setup))
                    running[setup].vectors(self._gate[:_WARM_UP])
                except CandidateFailed as reason:
                    self._fail(setup, reason, running)
            self._rounds(running, turns)
            for setup in running.keys() - self._best(WINNERS, of=running):
                running.pop(setup).stop()
            self._rounds(running, turns)

    def _together(self) -> list[Setup]:
        """As many of the best as the device's memory holds at a time, and at least one."""
        fitting: list[Setup] = []
        held = 0.0
        for setup in self._best(FINALISTS):
            measured = self.candidates_by_setup[setup].measured
            held += measured.peak_mib or 0.0 if measured is not None else 0.0
            if not fitting or held <= SHARE * self._memory_mib:
                fitting.append(setup)
        return fitting

    def _rounds(self, running: dict[Setup, CandidateProcess], turns: dict[Setup, list[Turn]]) -> None:
        for number in range(ROUNDS):
            # Each round begins with another setup, because the first one of a round may be slower.
            order = list(running)
            first = number % max(len(order), 1)
            for setup in order[first:] + order[:first]:
                self._tell(setup)
                try:
                    turns[setup].append(running[setup].turn())
                except CandidateFailed as reason:
                    self._fail(setup, reason, running)
        for setup in running:
            self.candidates_by_setup[setup] = _median(self.candidates_by_setup[setup], turns[setup])

    def _fail(self, setup: Setup, reason: CandidateFailed, running: dict[Setup, CandidateProcess]) -> None:
        if setup in running:
            running.pop(setup).stop()
        self.candidates_by_setup[setup] = Candidate(setup, problem=f"in the last rounds: {reason}")


def cosines(vectors: Vectors, exact: Vectors) -> tuple[float, float]:
    """The lowest and the mean cosine of the texts' vectors, in fp64. Zeros on both sides count as equal."""
    a, b = vectors.vectors.astype(np.float64), exact.vectors.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both = np.where((a == 0).all(axis=1) & (b == 0).all(axis=1), 1.0, np.nan)
    cosine = np.where(norms == 0, both, np.einsum("nd,nd->n", a, b) / np.where(norms == 0, 1.0, norms))
    return float(cosine.min()), float(cosine.mean())


def take(texts: Sequence[str], weights: Sequence[float], wanted: float) -> list[str]:
    """The texts in their order until their weights reach ``wanted``. They are repeated if they are too few."""
    chosen: list[str] = []
    total = 0.0
    for text, weight in itertools.cycle(zip(texts, weights, strict=True)):
        if total >= wanted and chosen:
            return chosen
        chosen.append(text)
        total += max(weight, 1.0)
    raise ValueError("no texts")


def _half(count: int) -> int:
    return max(min(count, 2), math.ceil(count / 2))


def _median(before: Candidate, turns: Sequence[Turn]) -> Candidate:
    """The medians of all rounds side by side. The pass of the screening counts only for the peak of memory."""
    old = before.measured
    assert old is not None  # noqa: S101 - only what was measured gets into a race
    speed = statistics.median(turn.tokens_per_second for turn in turns)
    latency = statistics.median(turn.latency_ms for turn in turns)
    peak = max(old.peak_mib or 0.0, *(turn.peak_mib for turn in turns))
    measured = replace(old, tokens_per_second=speed, latency_ms=latency, peak_mib=peak, rounds=1 + len(turns))
    return replace(before, measured=measured)
