"""Which setting of the engine is best on a machine. Pure: measurements and constraints in, a choice out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

# Differences that mean nothing: two runs of one setting on a quiet machine differ by so much.
NOISE: Final = 0.03


Backend = Literal["native", "transformers", "onnx", "openvino"]
Dtype = Literal["float32", "bfloat16", "float16"]
SHORT: Final = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Setup:
    """What is tuned."""

    backend: Backend
    dtype: Dtype
    batch_tokens: int
    threads: int
    parallel_batches: int
    """ChunkBatches in work at a time: a large budget is filled from several of them."""

    @property
    def kind(self) -> str:
        return f"{self.backend} {SHORT[self.dtype]}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a setup did. Cosines are to fp32 on the same texts."""

    cosine_min: float
    cosine_mean: float
    tokens_per_second: float | None = None
    """Text to NumPy, the median of its rounds. None: under the gate, where speed means nothing."""
    latency_ms: float | None = None
    """One short text, the median."""
    peak_mib: float | None = None
    """Most memory that its process held on a CPU, or torch on a GPU."""
    rounds: int = 0
    """Passes over the texts, interleaved with other setups' from the second on."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setup with what was measured of it, or with the ``problem`` that kept it from being measured."""

    setup: Setup
    measured: Measured | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the winner has to keep to; None: no limit."""

    min_cosine: float
    of_mean: bool = False
    """The gate is held against the mean over the texts, as for int8; otherwise against the lowest."""
    max_memory_mib: float | None = None
    max_latency_ms: float | None = None
    min_throughput: float | None = None

    def passes_gate(self, cosine_min: float, cosine_mean: float) -> bool:
        """NaN does not pass."""
        return (cosine_mean if self.of_mean else cosine_min) >= self.min_cosine

    def failures(self, candidate: Candidate) -> tuple[str, ...]:
        """Which of them it breaks: ``cosine``, ``memory``, ``latency``, ``throughput``, or ``problem`` alone."""
        measured = candidate.measured
        if candidate.problem is not None or measured is None:
            return ("problem",)
        if not self.passes_gate(measured.cosine_min, measured.cosine_mean):
            return ("cosine",)
        found = (
            ("memory", _over(measured.peak_mib, self.max_memory_mib)),
            ("latency", _over(measured.latency_ms, self.max_latency_ms)),
            ("throughput", _over(self.min_throughput, measured.tokens_per_second)),
        )
        return tuple(name for name, broken in found if broken)


def choose(candidates: Sequence[Candidate], constraints: Constraints) -> Candidate | None:
    """The fastest that keeps all constraints; None where none does.

    Of those that were measured in the most rounds: one lucky pass does not beat a median. Of equally fast ones that
    with less memory, then the quicker answer, then the smaller budget.
    """
    fitting = [each for each in candidates if not constraints.failures(each)]
    return max(fitting, key=lambda each: (_rounds(each), *_merit(each)), default=None)


def ranked(candidates: Sequence[Candidate], constraints: Constraints) -> list[Candidate]:
    """Those that have a speed, best first: who keeps all constraints, then who is fast."""
    running = [each for each in candidates if each.measured is not None and each.measured.tokens_per_second]
    return sorted(running, key=lambda each: (not constraints.failures(each), *_merit(each)), reverse=True)


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that none beats: faster, quicker to answer or smaller, and worse in nothing, by more than noise."""
    running = [each for each in candidates if each.measured is not None and each.measured.tokens_per_second]
    costs = [_costs(each) for each in running]
    return [each for each, mine in zip(running, costs, strict=True) if not any(_beats(other, mine) for other in costs)]


def _merit(candidate: Candidate) -> tuple[float, float, float, int]:
    found = candidate.measured
    assert found is not None  # noqa: S101 - only of candidates that were measured
    speed, memory, latency = found.tokens_per_second or 0.0, found.peak_mib or 0.0, found.latency_ms or 0.0
    return speed, -memory, -latency, -candidate.setup.batch_tokens


def _rounds(candidate: Candidate) -> int:
    return candidate.measured.rounds if candidate.measured is not None else 0


def _costs(candidate: Candidate) -> tuple[int, ...]:
    """Time per token, time for one text and memory, in steps of the noise."""
    speed, memory, latency, _ = _merit(candidate)
    return tuple(round(math.log(max(each, 1e-9)) / math.log1p(NOISE)) for each in (1 / speed, -latency, -memory))


def _beats(mine: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return mine != other and all(a <= b for a, b in zip(mine, other, strict=True))


def _over(value: float | None, limit: float | None) -> bool:
    return value is not None and limit is not None and value > limit
